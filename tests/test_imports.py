"""Imports go one way: between folders, between the rooms of a folder, and between any two modules;
solvers run without torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Folders, and their rooms, each of which may import what stands before it; a folder's own files are
# records that all share.
ORDER = {
    "profiles": ["hub", "demo", "engines", "router", "capture"],
    "solvers": ["schedule", "place", "evaluate", "time", "health", "replan", "maps"],
    "runtime": ["ranks", "reshard", "engines", "router", "layer", "transformers", "serving", "replay"],
    "semmoe_cli": ["terminal", "pages.figures", "pages", "commands"],
}
PACKAGES = {"semmoe_cli": "semmoe", **{folder: f"semmoe.{folder}" for folder in list(ORDER)[:3]}}
# What a token reaches must be one count: the exact objective of placement asks the evaluator's.
SHARED = {"semmoe.solvers.evaluate.reached"}


def module_files() -> dict[str, Path]:
    """Every module of ours by its installed name."""
    files = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


FILES = module_files()


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from executed(child)


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    names = set()
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in modules}
    return names


IMPORTS = {name: imported(path) for name, path in FILES.items()}


def place_of(module: str) -> tuple[str, str]:
    """Folder and room of a module of ours; a room of "" for a folder's own files."""
    folder = next(
        (f for f, package in list(PACKAGES.items())[1:] if f"{module}.".startswith(f"{package}.")), "semmoe_cli"
    )
    inside = f"{module}.".removeprefix(f"{PACKAGES[folder]}.")
    return folder, next((room for room in ORDER[folder] if room and inside.startswith(f"{room}.")), "")


def ours() -> Iterator[tuple[str, str]]:
    return ((name, other) for name, found in IMPORTS.items() for other in found if other in FILES)


def test_folders_import_in_one_direction():
    folders = list(ORDER)
    for name, other in ours():
        assert folders.index(place_of(other)[0]) <= folders.index(place_of(name)[0]), f"{name} imports {other}"


def test_rooms_import_in_one_direction():
    for name, other in ours():
        (folder, room), (its_folder, its_room) = place_of(name), place_of(other)
        order = ORDER[folder]
        if folder == its_folder and room in order and its_room in order and other not in SHARED:
            assert order.index(its_room) <= order.index(room), f"{name} imports {other}"


def test_no_two_modules_import_each_other():
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(IMPORTS[name] & FILES.keys() - {name}):
                follow(other, [*path, name])
            done.add(name)

    for name in FILES:
        follow(name, [])


def test_nothing_imports_click_and_solvers_never_import_torch():
    for name, found in IMPORTS.items():
        tops = {other.partition(".")[0] for other in found}
        assert "click" not in tops, name
        assert place_of(name)[0] != "solvers" or not tops & {"torch", "transformers"}, name
