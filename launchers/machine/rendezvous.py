"""Opens the rendezvous store through which the ranks on this machine find each other, on loopback only."""

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but in no __all__

LOOPBACK_ADDRESS = "127.0.0.1"
_TIMEOUT = timedelta(minutes=15)
"""How long a rank waits for a value in the store. Assumed: longer than the limits of a trial, which end it first."""


def loopback_store() -> TCPStore:
    """Return a new store that listens on the loopback interface only, on a port that the kernel chooses.

    Raises:
        OSError: if nothing can listen on loopback.
    """
    listener = socket.create_server((LOOPBACK_ADDRESS, 0), backlog=socket.SOMAXCONN)
    port = int(listener.getsockname()[1])
    # Without this socket, the store would listen on every network interface. It takes over the socket and closes it.
    return TCPStore(
        LOOPBACK_ADDRESS,
        port,
        is_master=True,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def check_store() -> int:
    """Check that a rendezvous store works here: open one, write a value and read it back. Return the store's port.

    Raises:
        OSError: if the store cannot be opened, or returns another value.
    """
    store = loopback_store()
    store.set("megatune", "here")
    if store.get("megatune") != b"here":
        raise OSError("the rendezvous store returned another value than was written to it")
    return int(store.port)
