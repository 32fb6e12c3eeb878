"""Help: panels, metavars, summaries and examples that are whole."""

import re

import pytest
import typer
from typer.testing import CliRunner

from semmoe.help import PANELS, PANELS_OF
from semmoe.main import app

PROGRAM = typer.main.get_command(app)
COMMANDS = list(PROGRAM.commands)  # pyright: ignore[reportAttributeAccessIssue]


def shown(*words: str, width: int = 80) -> str:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_h_is_help_and_every_option_has_a_panel_and_a_metavar(command):
    text = shown(command, "-h")
    assert text == shown(command, "--help")
    panels = re.findall(r"^(\w[\w ]+):$", text, re.M)
    assert set(panels) <= {"Arguments", "Example", "Examples", *PANELS} and len(set(panels)) == len(panels) > 2
    assert "Options:" not in text and not re.search(r"<[\w ]+>|x[<>]=|INTEGER|FLOAT", text)
    assert all(len(line) <= 80 or line.lstrip().startswith("semmoe ") for line in text.splitlines())
    for parameter in PROGRAM.commands[command].params:  # pyright: ignore[reportAttributeAccessIssue]
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert re.search(rf"^  .*{option}\b", text, re.M), option


def test_what_is_named_in_panels_exists():
    of_command = {name: {p.name for p in c.params} for name, c in PROGRAM.commands.items()}  # pyright: ignore[reportAttributeAccessIssue]
    for command, option in PANELS_OF:
        assert option in of_command[command], (command, option)
    assert set(PANELS_OF.values()) <= set(PANELS)


def test_summaries_and_examples_are_whole():
    text = shown("-h")
    assert "..." not in text and "check the health of a trace; in a screen or as a page" in " ".join(text.split())
    examples = shown("reshard", "-h", width=60).partition("Examples:\n")[2].splitlines()[:2]
    assert examples == [
        "  semmoe reshard Qwen3-30B-A3B p -o Qwen3-30B-A3B-placed",
        "  semmoe reshard --undo Qwen3-30B-A3B-placed -o back",
    ]


def test_the_usage_names_what_is_needed():
    assert shown("place", "-h").startswith("Usage: semmoe place TRACE... -o PLAN [OPTIONS]")


@pytest.mark.parametrize("words", [["--method", "best"], ["--import", "best", "f"], ["--ranks", "0"]])
def test_a_wrong_value_is_told_without_the_words_of_a_library(words):
    result = CliRunner().invoke(app, ["place", "t", "--ranks", "4", "-o", "p", *words])
    assert result.exit_code == 2 and f"Invalid value for '{words[0]}'" in result.output
    assert "Value error" not in result.output
