"""A recipe's Python file, whose text a trial records."""

from dataclasses import replace
from pathlib import Path

from tuner.errors import InputError
from tuner.trial.program import BridgeRecipe


def recorded(program: BridgeRecipe) -> BridgeRecipe:
    """The same recipe with the text of its Python file, read now unless it already was.

    Raises:
        InputError: if the file cannot be read.
    """
    if program.text or not program.recipe.endswith(".py"):
        return program
    try:
        return replace(program, text=Path(program.recipe).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"key 'program.recipe': {program.recipe} cannot be read: {error}") from None
