"""torchrun with a rendezvous that listens on loopback only: `python -m launchers.local.agent TORCHRUN_ARGUMENTS...`.

torchrun's own rendezvous stores listen on every network interface, and the default rendezvous unpickles what it reads
from its store, so a stranger on the network could run code in a trial. The ranks of one machine are known in advance
and need no negotiation: this rendezvous provides one store, which is bound to 127.0.0.1, and unpickles nothing.
"""

import sys
from collections.abc import Sequence

from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but in no __all__
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from launchers.machine.rendezvous import LOOPBACK_ADDRESS, loopback_store


def main(arguments: Sequence[str]) -> None:
    """Run torchrun with these arguments, among which `--rdzv-backend=loopback` selects this module's rendezvous."""
    register_loopback()
    torchrun.main(list(arguments))


def register_loopback() -> None:
    """Register `LoopbackRendezvous` with torchrun as the backend `loopback`; may be called only once per process."""
    rendezvous_handler_registry.register("loopback", LoopbackRendezvous)


class LoopbackRendezvous(RendezvousHandler):
    """A rendezvous for a single torchrun agent; its store listens on 127.0.0.1, on a port that the kernel chooses."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        """Open the store, which starts to listen.

        Raises:
            ValueError: if `parameters` ask for more than one node.
        """
        if parameters.max_nodes != 1:
            raise ValueError(
                f"the loopback rendezvous joins the ranks of 1 node, not of {parameters.max_nodes}"
            )
        self._run_id = parameters.run_id
        self._store = loopback_store()

    def get_backend(self) -> str:
        """Return the backend's name, as in `--rdzv-backend=loopback`."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks use the agent's store, and open none of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, this node's rank 0, and the number of nodes 1."""
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store),
            0,
            1,
            RendezvousStoreInfo(LOOPBACK_ADDRESS, self._store.port),
        )

    def is_closed(self) -> bool:
        """Return False: no other node ever joins, so this rendezvous is never closed."""
        return False

    def set_closed(self) -> None:
        """Do nothing: this rendezvous is never closed."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other node waits to join."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of the rendezvous, from torchrun's argument `--rdzv-id`."""
        return self._run_id

    def shutdown(self) -> bool:
        """Do nothing and return True, for success: the store closes when the agent's process ends."""
        return True


if __name__ == "__main__":
    main(sys.argv[1:])
