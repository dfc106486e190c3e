"""The part of megatune that decides: it plans, predicts, searches and reports, and starts no process.

`import tuner` loads neither torch nor pandas; the names below are imported when they are first used. They are the
interface for Python scripts, which docs/python.md shows at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tuner.analysis.answer import Answer as Answer
    from tuner.cli.api import answer as answer
    from tuner.cli.api import build_sweep as build_sweep
    from tuner.cli.api import export as export
    from tuner.cli.api import load_sweep as load_sweep
    from tuner.cli.api import plan as plan
    from tuner.cli.api import run as run
    from tuner.cli.session import SweepEnd as SweepEnd
    from tuner.core.layout import Layout as Layout
    from tuner.errors import InputError as InputError
    from tuner.errors import MegatuneError as MegatuneError
    from tuner.sweep.configuration import Sweep as Sweep
    from tuner.sweep.sinks import Sink as Observer

_HOMES: Final = {
    "Answer": "tuner.analysis.answer:Answer",
    "InputError": "tuner.errors:InputError",
    "Layout": "tuner.core.layout:Layout",
    "MegatuneError": "tuner.errors:MegatuneError",
    "Observer": "tuner.sweep.sinks:Sink",
    "Sweep": "tuner.sweep.configuration:Sweep",
    "SweepEnd": "tuner.cli.session:SweepEnd",
    "answer": "tuner.cli.api:answer",
    "build_sweep": "tuner.cli.api:build_sweep",
    "export": "tuner.cli.api:export",
    "load_sweep": "tuner.cli.api:load_sweep",
    "plan": "tuner.cli.api:plan",
    "run": "tuner.cli.api:run",
}
"""The module and the name in it that each exported name stands for."""

__all__ = [
    "Answer",
    "InputError",
    "Layout",
    "MegatuneError",
    "Observer",
    "Sweep",
    "SweepEnd",
    "answer",
    "build_sweep",
    "export",
    "load_sweep",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tuner' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
