"""Reads the argument --moe-layer-freq, which states the layers with experts as a number or a Python list expression."""

import ast
from typing import Final

_LONGEST: Final = 10_000
"""The most layers in a pattern, so that a repetition such as `[0]*10**9` cannot fill the memory. Assumed."""


def read_pattern(text: str) -> int | list[int]:
    """Read a pattern: a number such as `2`, or an expression such as `([0]*3+[1]*1)*2`, without calling `eval`.

    Returns:
        A number N if every Nth layer has experts, or a list with 0 (dense) or 1 (experts) per layer.

    Raises:
        SyntaxError: if the text is no Python expression.
        ValueError: if it is another expression, or has more than 10,000 layers.
    """
    if len(text) > 4 * _LONGEST:
        raise ValueError(f"--moe-layer-freq: is longer than {4 * _LONGEST:,} characters")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (RecursionError, MemoryError):  # how Python refuses an expression that is nested too deeply
        raise ValueError("--moe-layer-freq: is nested too deeply") from None


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=[*items]):
            values = [_value(item) for item in items]
            if all(isinstance(value, int) for value in values):
                return [value for value in values if isinstance(value, int)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _value(left), _value(right)
            if isinstance(first, list) and isinstance(second, list) and len(first) + len(second) <= _LONGEST:
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _value(left), _value(right)
            if isinstance(second, list):
                first, second = second, first
            if isinstance(first, list) and isinstance(second, int) and len(first) * second <= _LONGEST:
                return first * second
    raise ValueError(
        f"--moe-layer-freq: cannot read {ast.unparse(node)[:100]!r}: only + and * of lists with 0 and 1, of at most "
        f"{_LONGEST:,} layers"
    )
