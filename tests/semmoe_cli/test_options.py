"""Option groups: records that a command takes, as options of its own."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from semmoe.options import Json, Loading, Simulation, given, grouped


@dataclass(frozen=True, kw_only=True)
class Model:
    name: Annotated[str, typer.Option()]
    loading: Loading
    quick: bool = True
    tags: Annotated[list[str] | None, typer.Option()] = None


def app_of(seen: list) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @grouped(first=("name",), last=("seed", "json_"))
    def take(
        files: Annotated[list[str], typer.Argument()], *, simulation: Simulation, model: Model, json_: Json = False
    ) -> None:
        """Take them."""
        seen.append((files, simulation, model, json_))

    return app


def test_a_command_gets_its_records():
    seen: list = []
    words = ["a", "b", "--name", "m", "--window", "7", "--dtype", "float16", "--no-quick", "--tags", "t", "--json"]
    assert CliRunner().invoke(app_of(seen), words).exit_code == 0
    assert CliRunner().invoke(app_of(seen), ["a", "--name", "m"]).exit_code == 0
    (files, simulation, model, as_json), (_, *plain) = seen
    assert (files, simulation, as_json) == (["a", "b"], Simulation(window=7), True)
    assert (model.name, model.loading.dtype.value, model.quick, model.tags) == ("m", "float16", False, ["t"])
    assert plain == [Simulation(), Model(name="m", loading=Loading()), False]
    assert given(model, but=("name",)) == ["--dtype", "--no-quick", "--tags"]
    assert given(*plain[:2], but=("name",), data=None, seed=0, max_tokens=3) == ["--max-tokens"]


def test_help_shows_the_options_in_the_order_of_fields_but_for_the_first_and_the_last():
    help_text = CliRunner().invoke(app_of([]), ["--help"]).output
    names = [line.split()[0] for line in help_text.splitlines() if line.strip().startswith("--")]
    options = ["--batch-tokens", "--window", "--score-from", "--dtype", "--device", "--quick", "--tags"]
    assert names[:9] == ["--name", *options, "--seed"]
    assert "Take them." in help_text


def test_a_missing_option_of_a_record_is_wrong_usage():
    seen: list = []
    assert CliRunner().invoke(app_of(seen), ["a"]).exit_code == 2 and not seen
