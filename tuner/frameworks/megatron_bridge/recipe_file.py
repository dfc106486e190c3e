"""Reads the text of a recipe's Python file, so that it can be recorded with every trial."""

from dataclasses import replace
from pathlib import Path

from tuner.errors import InputError
from tuner.files import read_text
from tuner.trial.program import BridgeRecipe


def with_file_text(program: BridgeRecipe) -> BridgeRecipe:
    """Return the recipe with the text of its Python file.

    The file is read only if the recipe names a file and does not have the text yet.

    Raises:
        InputError: if the file cannot be read.
    """
    if program.text or not program.recipe.endswith(".py"):
        return program
    try:
        return replace(program, text=read_text(Path(program.recipe)))
    except InputError as error:
        raise InputError(f"key 'program.recipe': {error}") from None
