"""torchrun with a rendezvous that listens on loopback alone: `python -m launchers.local.agent TORCHRUN'S ARGUMENTS`.

torchrun's own rendezvous stores listen on every network interface, and the default one unpickles what it finds in its
store, so a stranger on the network could run code in a trial. The ranks of one machine are known in advance and need
no negotiation: this rendezvous hands out one store, which is bound to 127.0.0.1, and unpickles nothing.
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
    """Run torchrun with its own arguments; `--rdzv-backend=loopback` names the rendezvous of this module."""
    register_loopback()
    torchrun.main(list(arguments))


def register_loopback() -> None:
    """Make the rendezvous known to torchrun in this process; may be called once per process."""
    rendezvous_handler_registry.register("loopback", LoopbackRendezvous)


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent, whose store listens on a port of 127.0.0.1 that the kernel chooses."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        """Start to listen.

        Raises:
            ValueError: if more than one node is asked for.
        """
        if parameters.max_nodes != 1:
            raise ValueError(
                f"the loopback rendezvous joins the ranks of 1 node, not of {parameters.max_nodes}"
            )
        self._run_id = parameters.run_id
        self._store = loopback_store()

    def get_backend(self) -> str:
        """Return the name that torchrun's arguments give."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks join the agent's store, so that none of them opens another."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, and the rank and number of nodes: 0 of 1."""
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store),
            0,
            1,
            RendezvousStoreInfo(LOOPBACK_ADDRESS, self._store.port),
        )

    def is_closed(self) -> bool:
        """False: nobody else joins, so nobody needs to be kept out."""
        return False

    def set_closed(self) -> None:
        """Do nothing: see `is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other node may join."""
        return 0

    def get_run_id(self) -> str:
        """Return the id that torchrun's arguments give."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: the store closes with the agent's process."""
        return True


if __name__ == "__main__":
    main(sys.argv[1:])
