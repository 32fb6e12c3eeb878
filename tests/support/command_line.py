"""Commands as a user types them, run in this process."""

from typer.testing import CliRunner

from semmoe.main import app


def run(*words: object) -> str:
    """Output of a command that must succeed, run in this process."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout
