"""docs/cli.md from the commands' own help: `python -m semmoe.reference > docs/cli.md`. A test
keeps the file equal to it."""

from typer.testing import CliRunner

from semmoe.main import app

HEADER = """# Command line

Made by `python -m semmoe.reference > docs/cli.md` from the commands' own help.

Results go to stdout, notes and progress to stderr. Exit code 0: done. 1: the input cannot be used, with one line that says why.
2: the command line is wrong. 3: less was saved than --fail-under asks for.
`semmoe --install-completion` sets up completion for your shell.
"""


def render_reference() -> str:
    """The text of docs/cli.md: the help of semmoe and of each command."""
    names = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    sections = [("semmoe", [])] + [(f"semmoe {name}", [name]) for name in sorted(names)]
    return HEADER + "".join(f"\n## {title}\n\n```text\n{_help(words)}\n```\n" for title, words in sections)


def _help(words: list[str]) -> str:
    """Help of one command at a fixed width, without the terminal's colours."""
    result = CliRunner().invoke(
        app, [*words, "--help"], prog_name="semmoe", env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    )
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


if __name__ == "__main__":
    print(render_reference(), end="")
