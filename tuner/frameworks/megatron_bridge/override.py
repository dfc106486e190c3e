"""Writes the override that selects a trial's layout in a recipe of Megatron Bridge: as arguments, YAML or Python."""

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from tuner.core.layout import Layout
from tuner.errors import InputError
from tuner.frameworks.megatron_bridge.settings import COMM_OVERLAP, bridge_changes
from tuner.frameworks.megatron_fields import expert_metadata
from tuner.trial.contract import TrialSpec

_PLAIN: Final = re.compile(r"[\w.+|*(),-]*", re.ASCII)
"""Matches a text with harmless characters only: those of names, of joined names and of placements of layers. Hydra and
OmegaConf interpret others: `${oc.env:NAME}` reads an environment variable."""

_COMM_OVERLAP_CLASS: Final = "megatron.bridge.training.comm_overlap.CommOverlapConfig"


def bridge_overrides(spec: TrialSpec, recipe_layout: Layout | None) -> dict[str, Any]:
    """Return the fields of Bridge's config to set, as values by path, so that a recipe trains with a trial's layout.

    Args:
        spec: The spec of the trial.
        recipe_layout: The layout that the recipe has now, so that only differences are set; None sets every field that
            selects a layout.

    Raises:
        InputError: if a text in the layout has a character that Hydra or OmegaConf would interpret.
    """
    changes = bridge_changes(spec.layout, recipe_layout)
    if recipe_layout is None and not spec.workload.model.is_moe:
        changes = {path: value for path, value in changes.items() if path not in expert_metadata("megatron")}
    # Bridge's benchmark recipes scale the global batch with dp, which would change the training.
    changes["train.global_batch_size"] = spec.workload.global_batch_size
    for path, value in changes.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _PLAIN.fullmatch(text):
                raise InputError(
                    f"{path}: '{text}' cannot become an override: it may have only letters, digits and . + | * ( ) , -"
                )
    return changes


def bridge_words(spec: TrialSpec, recipe_layout: Layout | None = None) -> list[str]:
    """Return `bridge_overrides` as arguments `++PATH=VALUE` for Bridge's run_recipe.py, in Hydra's grammar."""
    changes = _with_overlap_class(bridge_overrides(spec, recipe_layout))
    return [f"++{path}={_hydra_text(value)}" for path, value in changes.items()]


def bridge_yaml(overrides: Mapping[str, Any]) -> str:
    """Return the text of a YAML file that sets overrides, given as values by path; each config section is a mapping."""
    sections: dict[str, Any] = {}
    for path, value in _with_overlap_class(overrides).items():
        section, _, name = path.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    return yaml.safe_dump(sections, sort_keys=False)


def bridge_python(overrides: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Return the text of a Python module whose function `apply` sets the overrides on a ConfigContainer.

    Args:
        overrides: The fields to set, as values by path.
        environment: Environment variables that `apply` sets, too.
    """
    has_overlaps = _sets_overlaps(overrides)
    module, _, name = _COMM_OVERLAP_CLASS.rpartition(".")
    lines = ["import os", ""] if environment else []
    variables = [f"    {variable!r}: {value!r}," for variable, value in environment.items()]
    lines += [f"from {module} import {name}"] if has_overlaps else []
    lines += ["from megatron.bridge.training.config import ConfigContainer", ""]
    lines += ["ENVIRONMENT = {", *variables, "}", "", ""] if environment else [""]
    lines += ["def apply(cfg: ConfigContainer) -> ConfigContainer:", '    """Select the measured layout."""']
    # CUDA reads these variables when it starts, after the recipe is built. A recipe's env_vars do not overwrite them.
    lines += ["    os.environ.update(ENVIRONMENT)"] if environment else []
    if has_overlaps:
        lines += [
            "    if cfg.comm_overlap is None:",
            f"        cfg.comm_overlap = {name}(tp_comm_overlap=False)",
        ]
    lines += [f"    cfg.{path} = {value!r}" for path, value in overrides.items()]
    return "\n".join([*lines, "    return cfg", ""])


def _with_overlap_class(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides, with the class of `comm_overlap` added if they set one of its fields.

    Bridge needs the class if the recipe's `comm_overlap` is None.
    """
    if _sets_overlaps(overrides):
        return {**overrides, f"{COMM_OVERLAP}._target_": _COMM_OVERLAP_CLASS}
    return dict(overrides)


def _sets_overlaps(overrides: Mapping[str, Any]) -> bool:
    return any(path.startswith(f"{COMM_OVERLAP}.") for path in overrides)


def _hydra_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    # Other characters, such as the bars of a placement, have a meaning in Hydra's grammar.
    return str(value) if re.fullmatch(r"[\w.+-]*", str(value)) else f'"{value}"'
