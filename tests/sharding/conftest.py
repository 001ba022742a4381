from tests.distributed.conftest import device

__all__ = ["device"]
