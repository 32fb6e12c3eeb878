"""The packages import in one direction, and solvers run without torch."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = ["profiles", "solvers", "runtime", "semmoe_cli"]


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_packages_import_in_one_direction():
    for position, package in enumerate(ORDER):
        for path in (ROOT / package).rglob("*.py"):
            later = imported(path) & set(ORDER[position + 1 :])
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


def test_nothing_imports_click_and_solvers_never_import_torch():
    for package in ORDER:
        for path in (ROOT / package).rglob("*.py"):
            assert "click" not in imported(path), path
            assert package != "solvers" or "torch" not in imported(path), path
