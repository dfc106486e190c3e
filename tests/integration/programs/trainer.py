"""A trainer that knows nothing of megatune: it prints Megatron-LM's lines, and is faster with a larger micro-batch."""

import sys
import time

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
micro_batch, steps = int(arguments["--micro-batch-size"]), int(arguments["--train-iters"])
if micro_batch > 4:
    raise SystemExit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
if arguments["--tensor-model-parallel-size"] == "4":
    raise AssertionError("this trainer has no tensor parallelism of 4")
for step in range(1, steps + 1):
    time_ms = 40.0 / micro_batch
    time.sleep(time_ms / 1000)
    print(
        f" iteration {step:8d}/{steps:8d} | elapsed time per iteration (ms): {time_ms:.1f} | "
        f"lm loss: {10 / step:.6E} | grad norm: 1.000 |"
    )
    if step == 2:
        print(
            f"[Rank 0] (after {step} iterations) memory (GB) | mem-max-allocated-gigabytes: {micro_batch}.0 |"
        )
    sys.stdout.flush()
