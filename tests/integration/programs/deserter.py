"""A trainer whose child leaves it: `deserter.py FILE`, where FILE gets the process id of each child, a line each.

The child has a session of its own, no environment variable of its parent, and outlives it. The trainer prints the lines
of Megatron-LM's log for a minute or more.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(300)"], env={}, start_new_session=True
)
with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
    file.write(f"{child.pid}\n{os.getpid()}\n")
for step in range(1, 1000):
    time.sleep(0.1)
    print(
        f" iteration {step:8d}/    1000 | elapsed time per iteration (ms): 100.0 | lm loss: 1.0 |", flush=True
    )
    if step == 2:
        print("[Rank 0] (after 2 iterations) memory (GB) | mem-max-allocated-gigabytes: 1.0 |", flush=True)
