"""The peak memory of a rank: CUDA's allocator knows it; on CPU every tensor is accounted."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1024**3
MIB = 1024**2


class TensorAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, accounts the storage of every tensor that an operation returns, until the storage is freed.

    Enter it before the model is built, so that weights, gradient buffers and optimizer state are in the account, and
    keep it until the end of the step after the one that creates Adam's state: that step holds the peak. It sees the
    forward pass, the backward pass (which runs on the calling thread on CPU) and the optimizer; views share their
    storage. It does not see what a kernel allocates inside itself, nor the buffers of Gloo.

    Args:
        limit_bytes: The capacity of the rank: more live bytes raise torch.OutOfMemoryError.
    """

    def __init__(self, limit_bytes: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        """Bytes of each storage in the account, by its address."""

    def __enter__(self) -> "TensorAccount":
        """Begin to account.

        The account also follows `resize_` of a storage, by which Megatron empties tensors that it will recompute, and
        which does not pass through torch's dispatcher.
        """
        resize = torch.UntypedStorage.resize_

        def accounted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._account(storage)
            return result

        torch.UntypedStorage.resize_ = accounted  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Stop accounting new storages; those in the account still leave it when they are freed."""
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        del torch.UntypedStorage.resize_

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and account the tensors that it returned.

        Raises:
            torch.OutOfMemoryError: if the live tensors exceed the limit.
        """
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._account(leaf.untyped_storage())
        return result

    def _account(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        accounted_bytes = self._sizes.get(key)
        if accounted_bytes == size:
            return
        if accounted_bytes is None:
            weakref.finalize(storage, self._release, key).atexit = False
        self._sizes[key] = size
        self.live_bytes += size - (accounted_bytes or 0)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(self._message(size))

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def _message(self, size: int) -> str:
        before = self.live_bytes - size
        return (
            f"CPU out of memory. Tried to allocate {size / MIB:.2f} MiB. The cluster states a capacity of "
            f"{self.limit_bytes / GIB:.4f} GiB a rank, of which {(self.limit_bytes - before) / MIB:.2f} MiB "
            f"is free. Of the allocated memory {before / GIB:.4f} GiB is held by live tensors."
        )


def peak_gib(account: TensorAccount | None) -> tuple[float, float | None]:
    """Return this rank's peak of allocated, and of reserved memory (None on CPU), in GiB."""
    if account is not None:
        return account.peak_bytes / GIB, None
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
