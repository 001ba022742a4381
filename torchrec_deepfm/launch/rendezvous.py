"""How the hosts of a job find each other, with nothing more open to the network than that takes.

torchelastic's c10d rendezvous listens on all interfaces and unpickles its state from a store in which any client may
write. Here a job on one host needs no such thing: its store listens on the loopback address. Several hosts use c10d,
and their state is read by an unpickler that knows the classes of a rendezvous and nothing else.
"""

import contextlib
import io
import pickle
import socket
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from torchrec_deepfm.errors import UserError

ONE_HOST = "torchrec-deepfm-one-host"
LOOPBACK = "127.0.0.1"
# A store answers at once. Whatever has not answered by then is something else.
_SECONDS_TO_ANSWER = 10.0
# A cluster may need a moment to publish the name of a host that has just started.
_SECONDS_TO_RESOLVE = 120.0

_STATE_CLASSES: dict[tuple[str, str], Any] = {
    (each.__module__, each.__qualname__): each
    for each in (dynamic_rendezvous._RendezvousState, dynamic_rendezvous._NodeDesc, datetime, timedelta, timezone)
}


def harden() -> None:
    """Make torchelastic use this module, in the launcher's process."""
    rendezvous_handler_registry.register(ONE_HOST, _OneHost)
    # torchelastic calls pickle.loads on the state that any client of the store may have written.
    guarded = SimpleNamespace(dumps=pickle.dumps, loads=read_state, PickleError=pickle.PickleError)
    dynamic_rendezvous.pickle = guarded  # type: ignore[attr-defined, assignment]
    _restart_with_a_fresh_store()


class _OneHost(RendezvousHandler):
    """The rendezvous of a job on one host: nobody to meet, and a store for the ranks that only this host reaches."""

    def __init__(self, params: RendezvousParameters) -> None:
        self._run_id = params.run_id
        self._store_of_ranks: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return ONE_HOST

    def next_rendezvous(self) -> RendezvousInfo:
        listening = socket.create_server((LOOPBACK, 0), backlog=1024)
        port = listening.getsockname()[1]
        # A new store at each start: ranks that are started again must not find their predecessors' addresses.
        self._store_of_ranks = TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def read_state(state: bytes) -> Any:
    """Unpickle the state of a rendezvous.

    ``state``: what is in the store; anybody who reaches it may have written it. Raises ``RendezvousStateError``: it
    holds anything else than a rendezvous does. Nothing of it has been run.
    """
    try:
        found = _Unpickler(io.BytesIO(state)).load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise RendezvousStateError(f"not the state of a rendezvous ({error})") from error
    if not isinstance(found, dynamic_rendezvous._RendezvousState):
        raise RendezvousStateError(f"not the state of a rendezvous but of type {type(found).__name__}")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STATE_CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it has a persistent id")


def wait_for_name(endpoint: str) -> None:
    """Wait until the host of an endpoint has an address here: torchelastic would wait for it in silence.

    ``endpoint``: host and port of a c10d rendezvous. Raises ``UserError``: the name still does not resolve after two
    minutes.
    """
    host, _ = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_PORT)
    deadline = time.monotonic() + _SECONDS_TO_RESOLVE
    reported = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            reason = f"--rdzv_endpoint {endpoint}: {socket.gethostname()} knows no address of {host} ({error.strerror})"
        if not reported:
            sys.stderr.write(f"{reason}; waiting up to {_SECONDS_TO_RESOLVE:.0f} s for it\n")
            sys.stderr.flush()
            reported = True
        if time.monotonic() > deadline:
            raise UserError(reason, remedy="add the name to DNS or to /etc/hosts of every host")
        time.sleep(1)


def refuse_another_program(endpoint: str) -> None:
    """Find out whether what listens at an endpoint is a store: if it is not, torch waits for its answer without end.

    ``endpoint``: host and port of a c10d rendezvous. It is fine if nobody listens there yet.
    """
    host, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_PORT)
    try:
        socket.create_connection((host, port), timeout=_SECONDS_TO_ANSWER).close()
    except OSError:
        return
    answers = threading.Event()

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError, TimeoutError):
            TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_ANSWER)).num_keys()
            answers.set()

    threading.Thread(target=ask, daemon=True).start()
    if not answers.wait(_SECONDS_TO_ANSWER):
        raise UserError(
            "another program listens on this port",
            where=f"--rdzv_endpoint {host}:{port}",
            remedy="choose a free one (--rdzv_port of the TorchX component)",
        )


def explain_rendezvous(error: RendezvousError) -> str:
    """Say in one line why hosts did not find each other, and what to do."""
    match error:
        case RendezvousTimeoutError():
            return "fewer hosts have joined in time than --nnodes asks for; check the other hosts, then start again"
        case RendezvousClosedError():
            return "this job has ended on the other hosts; start it again under another --rdzv_id"
        case RendezvousStateError():
            return f"{error}; nothing of it was run: choose another port, which only the job's hosts can reach"
    reason = str(error.__cause__ or error).partition("\n")[0]
    return f"the hosts cannot meet there ({reason}); check the host's name, the port and the network between the hosts"


def _restart_with_a_fresh_store() -> None:
    """Give the ranks of several hosts a new store each time they are started.

    torchelastic shares one store with them and keeps it over restarts, while the ranks (since torch 2.5) count on a new
    one: they find the addresses of their dead predecessors in it, and hang or fail (pytorch/pytorch#135712).
    """
    meet = DynamicRendezvousHandler.next_rendezvous

    def meet_anew(self: DynamicRendezvousHandler) -> RendezvousInfo:
        self._bootstrap_store_info = self._shared_tcp_store_server = None
        return meet(self)

    DynamicRendezvousHandler.next_rendezvous = meet_anew  # type: ignore[method-assign]
