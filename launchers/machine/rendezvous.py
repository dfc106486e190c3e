"""Checks that ranks on this machine can find each other."""

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but in no __all__


def check_store() -> int:
    """Write to a rendezvous store on loopback and read the value back; return the store's port.

    Raises:
        OSError: if the store does not answer, or answers something else.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("megatune", "here")
    if store.get("megatune") != b"here":
        raise OSError("the rendezvous store returned another value than was written to it")
    return int(store.port)
