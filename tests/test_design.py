"""docs/design.md shows the house as it is: its tree names every file, folders stay small enough to
read, and so do functions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
FOLDERS = ("semmoe_cli", "profiles", "solvers", "runtime")
MOST_FILES = 18
MOST_LINES = 80
MOST_PARAMETERS = 8  # functions with as many are to be rare


def files_of_tree(tree: str) -> set[str]:
    """Paths that the drawn tree names: a folder stands at the beginning of a line, files behind
    it; two spaces in front make it a room of the folder above."""
    found, top, folder = set(), "", ""
    for line in tree.splitlines():
        if head := re.match(r"(  )?([\w/]+)/ ", line):
            top = top if head[1] else head[2]
            folder = f"{top}/{head[2]}" if head[1] else top
        found |= {f"{folder}/{name}" for name in re.findall(r"\w+\.py", line)}
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.relative_to(ROOT)}:{node.name}", node


def test_the_tree_is_that_of_the_folders():
    tree = re.search(r"^## The tree\n+```text\n(.*?)```", PAGE, re.M | re.S)
    assert tree is not None
    there = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert files_of_tree(tree[1]) == {path for path in there if not path.endswith("__init__.py")}


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:semmoe_cli|profiles|solvers|runtime|tests|docs)/[\w/]+\.\w+)", PAGE))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_function_that_the_page_names_is_there():
    for module, name in re.findall(r"`((?:profiles|solvers|runtime)(?:\.[a-z_]+)+)\.([a-z_]+)`", PAGE):
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert f"def {name}(" in text, f"{module}.{name}"


def test_no_folder_is_too_full():
    for folder in (*FOLDERS, "tests"):
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]:
            if path.is_dir():
                assert len(list(path.glob("*.py"))) <= MOST_FILES, path


def test_functions_are_short_and_take_few_parameters():
    many = []
    for name, node in functions():
        last = node.end_lineno or node.lineno
        assert last - node.body[0].lineno < MOST_LINES, f"{name} has {last - node.body[0].lineno + 1} lines"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        many += (
            [name] if len(arguments) - (arguments[:1] != [] and arguments[0].arg == "self") >= MOST_PARAMETERS else []
        )
    assert len(many) < 20, many
