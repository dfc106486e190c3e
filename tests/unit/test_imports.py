"""Importing a module changes nothing: neither the environment nor another module, and it starts nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tuner", "launchers", "search_spaces")

ACTS_ON_PURPOSE = "launchers/programs/megatron_bridge/ahead.py"
"""The process that trials are forked from imports this module for what it does."""


def acts(source: str) -> list[str]:
    """The top-level statements of a module that act when it is imported, instead of defining a name."""
    return [ast.unparse(node) for node in ast.parse(source).body if _acts(node)]


def _acts(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return False
        case ast.Assign(targets=targets):
            return not all(isinstance(target, ast.Name | ast.Tuple) for target in targets)
        case ast.AnnAssign(target=target):
            return not isinstance(target, ast.Name)
        case ast.Delete(targets=targets):  # of an entry of the module's own table
            return not all(
                isinstance(each, ast.Subscript) and isinstance(each.value, ast.Name) for each in targets
            )
        case ast.If(test=test):
            return ast.unparse(test) not in {"TYPE_CHECKING", "__name__ == '__main__'"}
        case _:
            return not isinstance(
                node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            )


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['A'] = '1'",
        "os.environ.update(A='1')",
        "main()",
        "torch.backends.cudnn.enabled = False",
        "for name in names: register(name)",
        "if ready: start()",
        "del os.environ['A']",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert len(acts(source)) == 1


def test_no_module_acts_when_it_is_imported() -> None:
    modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    statements = {str(path.relative_to(ROOT)): acts(path.read_text(encoding="utf-8")) for path in modules}
    assert len(statements) > 80
    assert {path for path, acting in statements.items() if acting} <= {ACTS_ON_PURPOSE}
