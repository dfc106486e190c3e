"""The table of real messages of failures, with the outcome that each means and where it was read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from tuner.trial.contract import Failure, Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureText:
    """A message that a project prints when a trial fails before its first step."""

    outcome: Outcome
    kind: str
    """The exception's qualified name."""
    text: str
    source: str
    """The project and file, or the issue, in which the message was read."""

    @property
    def failure(self) -> Failure:
        """The exception, as C++ raises it below a call of Megatron."""
        call = '  File "/opt/megatron/core/transformer/mlp.py", line 7, in forward\n    hidden = self.fc1(hidden)\n'
        return Failure(kind=self.kind, message=self.text, traceback=f"{call}{self.printed}", time_s=0.0)

    @property
    def printed(self) -> str:
        """The last lines of the rank's output."""
        return f"{self.kind}: {self.text.rstrip()}\n"


FAILURE_TEXTS: Final = tuple(
    FailureText(**row | {"outcome": Outcome(row["outcome"])})
    for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
)
