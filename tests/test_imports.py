"""The packages import in one direction, and solvers run without torch."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = ["profiles", "solvers", "runtime", "semmoe_cli"]  # folders; the last is semmoe itself


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def folder_of(module: str) -> str | None:
    """The folder that a module of ours lies in; None for another's."""
    if module.partition(".")[0] != "semmoe":
        return None
    part = module.split(".")[1] if "." in module else ""
    return part if part in ORDER else "semmoe_cli"


def test_packages_import_in_one_direction():
    for position, package in enumerate(ORDER):
        for path in (ROOT / package).rglob("*.py"):
            later = {folder_of(name) for name in imported(path)} & set(ORDER[position + 1 :])
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


def test_nothing_imports_click_and_solvers_never_import_torch():
    for package in ORDER:
        for path in (ROOT / package).rglob("*.py"):
            tops = {name.partition(".")[0] for name in imported(path)}
            assert "click" not in tops, path
            assert package != "solvers" or "torch" not in tops, path
