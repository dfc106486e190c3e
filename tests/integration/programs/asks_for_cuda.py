"""Two modules in one: imported ahead, it notes who asks torch for CUDA; as a rank's program, it asks.

Each question adds the process's id to the file that the variable ASKED names.
"""

import os
from pathlib import Path

import torch


def _note(*_: object) -> int:
    with Path(os.environ["ASKED"]).open("a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    return 0


if __name__ == "__main__":
    torch.cuda.is_available()
    Path(os.environ["ASKED"]).with_name(f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
else:
    torch.cuda.is_available = torch.cuda.device_count = _note  # type: ignore[assignment]
