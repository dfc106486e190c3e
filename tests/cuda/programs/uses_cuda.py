"""Writes what a rank sees: whether CUDA can be used, and its environment. Run with the path of a folder."""

import json
import os
import sys
from pathlib import Path

import torch


def main(folder: Path) -> None:
    error = ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    told = {"error": error, "devices": torch.cuda.device_count(), "environment": dict(os.environ)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
