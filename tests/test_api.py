"""`import semmoe`: fast, typed, documented, and its page runs."""

import ast
import inspect
import json
import logging
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from engine_samples import config, routing, sglang_record, write_lines

import semmoe
from semmoe import api
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.solvers.plan import ModelFacts

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
OFFERED = [name for name in semmoe.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict:
    """The page's lines, run in a directory with what they name; what they leave."""
    root = tmp_path_factory.mktemp("api")
    for name, num_requests in (("t", 60), ("later", 90)):
        write_synthetic(root / name, SyntheticWorld(num_layers=2, num_requests=num_requests, tokens_per_request=40))
    write_lines(root / "responses.jsonl", [sglang_record(routing(40))])
    (root / "config.json").write_text(json.dumps(config()))
    names: dict = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"docs/api.md, block {number + 1}", "exec"), names)
    return names


def test_importing_is_quick_and_brings_no_heavy_module():
    code = (
        "import sys, semmoe; light = set(sys.modules); from semmoe import *; semmoe.place; "
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'matplotlib', 'typer', 'rich'}; "
        "print({'numpy', 'pyarrow', 'semmoe.api'} & light, heavy & set(sys.modules), semmoe.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"set\(\) set\(\) \d+\.\d+.*\n", done.stdout), done.stdout


def test_names_are_the_same_for_people_programs_and_type_checkers():
    tree = ast.parse(Path(semmoe.__file__).read_text(encoding="utf-8"))
    typed = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert typed - {"TYPE_CHECKING", "Any", "version", "api"} == set(OFFERED)
    assert set(semmoe.__all__) <= set(dir(semmoe)) and set(api.__all__) == set(OFFERED)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        semmoe.nothing  # noqa: B018
    assert (Path(semmoe.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", OFFERED)
def test_every_name_is_documented_and_used_on_the_page(name):
    value = getattr(semmoe, name)
    text = inspect.getdoc(value) or ""
    prose = " ".join(text.split())
    assert re.search(rf"\b{name}\b", PAGE)
    for path in re.findall(r"\b(?:docs|profiles|solvers)/[\w/.]+\w", prose[prose.index("Source: ") :]):
        assert (ROOT / path).exists(), path
    if inspect.isfunction(value):
        assert "Returns " in prose and "Raises InputError" in prose
        named = inspect.signature(value).parameters
        hints = inspect.get_annotations(value)
        assert set(hints) == {*named, "return"}, "typed in full"
    else:
        named = [field.name for field in fields(value)] if is_dataclass(value) else []
    for parameter in named:
        assert re.search(rf"^ +(?:\w+, )*{parameter}(?:, \w+)*: ", text, re.M), parameter


@pytest.mark.parametrize(
    "name",
    ["Plan", "Placement", "Topology", "RequestScorer", "RoutingTrace", "place", "read_topology", "request_scorer"],
)
def test_arrays_have_types_and_axes_in_words(name):
    prose = " ".join((inspect.getdoc(getattr(semmoe, name)) or "").split())
    assert re.search(r"\b(int|uint|float)\d* \[[A-Z]", prose)


def test_the_page_runs(ran):
    assert ran["plan"].placement.experts_LRS.shape == (2, 4, 8) and ran["other"].topology.num_nodes == 2
    assert ran["scores_BR"].shape == (2, 4) and len(ran["domains"]) == 4
    assert ran["fresh"].requests == 30, "the others are those that the plan was fitted on"
    assert {row.placement for row in ran["found"].rows} == {"now", "next"}


class Cells(HTMLParser):
    """The texts of cells, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_notebook_shows_plans_and_reports_as_safe_html(ran):
    plan = ran["plan"]
    hostile = '<img src=x onerror="alert(1)">'
    facts = {f.name: getattr(plan.model, f.name) for f in fields(ModelFacts)} | {"model": hostile}
    shown = replace(plan, model=ModelFacts(**facts), notes=[hostile], scores=replace(plan.scores, model=hostile))
    cells = Cells()
    cells.feed(shown._repr_html_())
    assert cells.tags == {"p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert hostile in cells.texts and {"contiguous", "rem"} <= set(cells.texts)
    row = ran["fresh"].rows[0]
    low, high = row.interval("rem")
    assert f"<td>{row.rem:.3f} [{low:.3f}, {high:.3f}]</td>" in ran["fresh"]._repr_html_()


def test_what_a_command_notes_goes_to_the_log(ran, caplog):
    with caplog.at_level(logging.INFO, "semmoe"):
        semmoe.score(ran["plan"], ran["later"])
    assert "60 requests of this trace were used to fit the plan and are left out" in caplog.text


def test_misuse_is_an_input_error(ran, tmp_path):
    plan, trace = ran["plan"], ran["trace"]
    for misuse, message in (
        (lambda: semmoe.open_trace(tmp_path), "trace.json"),
        (lambda: semmoe.place([], ranks=4), "no trace"),
        (lambda: semmoe.place(trace, 4, options=semmoe.PlanOptions(method="magic")), "magic"),
        (lambda: semmoe.compare({"a": plan}, trace), "1 plans to compare"),
        (lambda: semmoe.export(plan, "magic", tmp_path / "m.json"), "magic"),
        (lambda: semmoe.request_scorer(replace(plan, tables={})), "scores no requests"),
        (lambda: plan.save(ROOT), "is not a plan"),
        (lambda: semmoe.read_plan(tmp_path / "none"), "not a plan"),
    ):
        with pytest.raises(semmoe.InputError, match=message):
            misuse()


def test_shapes_on_the_page_are_those_of_the_arrays(ran):
    table = PAGE.partition("## Shapes")[2].partition("## Errors")[0]
    rows = re.findall(r"^\| `([\w.]+)`[^|]*\| ([^|]+) \| ([^|]+) \|", table, re.M)
    assert len(rows) > 8
    for name, kinds, shape in rows:
        array = eval(name, {"batch": ran["batch"], "plan": ran["plan"], "scorer": ran["scorer"]})
        assert str(array.dtype) in kinds and array.ndim == len(shape.split(",")), (name, array.dtype, array.shape)
