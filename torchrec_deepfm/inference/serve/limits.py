"""What ``serve`` takes at most. Standard library only, for the command line."""

from dataclasses import dataclass

from torchrec_deepfm.errors import UserError, flag


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of ``serve``; beyond them a request is refused, and the others are still answered.

    Raises:
        UserError: A limit is out of range.
    """

    batch_rows: int = 256
    """Rows that are scored together at most, unless a single request has more."""
    batch_wait_ms: float = 0.0
    """How long a request may wait for others to be scored with."""
    queue_rows: int = 4096
    """Rows that may wait for the model; a request beyond them is answered 429 with Retry-After."""
    queue_requests: int = 128
    """Requests that may wait or be scored; a further one is answered 429 before its body is read."""
    max_rows: int = 4096
    """Rows per request of predict; explain takes a hundred. A larger request is answered 413."""
    max_body_mb: float = 8.0
    """Size of a request in MiB. A larger one is answered 413."""
    max_connections: int = 4096
    """Open connections; a further one waits until another has ended."""
    timeout: float = 10.0
    """Seconds for a request, from its first byte to its answer: 408 if its body is late, 503 if the model is."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least, most in (
            ("batch_rows", 1, 2**20),
            ("batch_wait_ms", 0, 60_000),
            ("queue_rows", 1, 2**20),
            ("queue_requests", 1, 2**16),
            ("max_rows", 1, 2**20),
            ("max_body_mb", 0.001, 1024),
            ("max_connections", 1, 2**16),
            ("timeout", 0.1, 3600),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UserError(f"must be {least} to {most:,}", where=f"{flag(name)} {value}")
