"""Measures the peak memory of a rank: CUDA's allocator reports it; on CPU the bytes of every tensor are counted."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1024**3
MIB = 1024**2


class TensorAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of every tensor that an operation returns, until its storage is freed.

    Enter it before the model is built, so that weights, gradient buffers and optimizer state are counted, and leave it
    after the step that follows the creation of Adam's state: that step has the peak. It sees the forward pass, the
    backward pass (which runs on the calling thread on CPU) and the optimizer; views share their storage. It does not
    see what a kernel allocates inside itself, nor the buffers of Gloo.

    Args:
        limit_bytes: The capacity of the rank. If more bytes are in use, torch.OutOfMemoryError is raised.
    """

    def __init__(self, limit_bytes: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        """Bytes of each storage that is counted, by its address."""

    def __enter__(self) -> "TensorAccount":
        """Begin to count.

        The count also follows `resize_` of a storage, by which Megatron empties tensors that it will recompute, and
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
        """Stop counting new storages; those that are counted are still subtracted when they are freed."""
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        del torch.UntypedStorage.resize_

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the tensors that it returned.

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
            f"{self.limit_bytes / GIB:.4f} GiB per rank, of which {(self.limit_bytes - before) / MIB:.2f} MiB "
            f"is free. Of the allocated memory {before / GIB:.4f} GiB is held by live tensors."
        )


def peak_gib(account: TensorAccount | None) -> tuple[float, float | None]:
    """Return this rank's peak of allocated memory and its peak of reserved memory (None on CPU), in GiB.

    `account` has counted the tensors on CPU; with None, CUDA's allocator is asked.
    """
    if account is not None:
        return account.peak_bytes / GIB, None
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
