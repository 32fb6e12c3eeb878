"""The command line: help, examples, choices, exit codes, and the main job end to end."""

import errno
import inspect
import io
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from semmoe.commands.compare import compare
from semmoe.commands.place import place
from semmoe.commands.report import report
from semmoe.main import app, main
from semmoe.options import Dispatch, Effort, Method, Objective, command_line
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.reference import render_reference
from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS, METRICS
from semmoe.solvers.place.joint import OBJECTIVES
from semmoe.solvers.place.partition import EFFORTS
from semmoe.solvers.place.solve import METHODS
from semmoe.solvers.schedule.windows import WINDOW
from semmoe.terminal.tables import print_json

COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands]


def semmoe(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed program, as a user starts it."""
    words = [sys.executable, "-m", "semmoe", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=60))
    return path


def test_help_needs_no_heavy_module():
    code = (
        "import sys, semmoe.main;"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'pymetis', 'numpy', 'pyarrow', 'matplotlib', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_quiet_leaves_results_and_errors_and_verbose_adds_what_it_took(trace, tmp_path):
    made = {}
    for where, loud in (("before", ["-q"]), ("after", ["--quiet"]), ("after", ["-v"]), ("after", [])):
        out, words = tmp_path / "-".join([where, *loud]), ["place", trace, "--ranks", 2, "--method", "load"]
        done = semmoe(*(loud if where == "before" else []), *words, "-o", out, *(loud if where == "after" else []))
        assert done.returncode == 0 and "EPLB's way" in done.stdout
        quiet = set(loud) & {"-q", "--quiet"}
        assert bool(done.stderr) != bool(quiet) and ("Next: " in done.stdout) != bool(quiet)
        assert bool(re.search(r"reading tokens: [\d.]+ s\n(.*\n)*semmoe: [\d.]+ s, at most", done.stderr)) == (
            "-v" in loud
        )
        made[out] = (out / "plan.json").read_bytes()
    assert len(set(made.values())) == 1  # how loud a command was is not recorded
    refused = semmoe("-q", "show", tmp_path / "nowhere")
    assert refused.returncode == 1 and refused.stderr.startswith("semmoe: ") and not refused.stdout


def test_version_and_completion():
    assert semmoe("--version").stdout.startswith("semmoe 0.")
    # A test may have no shell among its parents.
    words = [sys.executable, "-m", "semmoe", "--show-completion", "bash"]
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(words, capture_output=True, text=True, env=environment).stdout
    assert "complete -o" in shown and "semmoe" in shown


PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "start",
    [
        f"import pkgutil; pkgutil.resolve_name({PYPROJECT['project']['scripts']['semmoe']!r})()",
        "import runpy; runpy.run_module('semmoe', run_name='__main__')",
    ],
)
def test_ctrl_c_while_the_command_line_is_imported_is_one_line(start):
    code = (
        "import signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer': signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "sys.meta_path.insert(0, Stop())\n" + start
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "semmoe: interrupted\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Example" in result.output and f"semmoe {command} " in result.output


def test_choices_equal_what_the_solvers_offer():
    assert [m.value for m in Method] == list(METHODS)
    assert [d.value for d in Dispatch] == list(DISPATCH_KINDS)
    assert [o.value for o in Objective] == list(OBJECTIVES)
    assert [e.value for e in Effort] == list(EFFORTS)


def test_the_reference_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == render_reference(), "run: python -m semmoe.reference > docs/cli.md"


def test_every_command_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"## semmoe {command}" in page for command in COMMANDS)


def test_place_report_and_show_end_to_end(trace, tmp_path):
    placed = semmoe("place", trace, "--ranks", 4, "--method", "metis", "-o", tmp_path / "p", "--json")
    assert placed.returncode == 0, placed.stderr
    report = json.loads(placed.stdout)
    assert {(r["placement"], r["schedule"]) for r in report["rows"]} >= {
        (p, "random") for p in ("plan", "contiguous", "load")
    }
    for row in [*report["rows"], *report["layers"][2]["rows"]]:
        assert set(METRICS) <= set(row)
    assert all(set(row["ci"]) == set(METRICS) for row in report["rows"])
    assert (report["ranks"], report["tokens"], len(report["layers"])) == (4, 12 * 64, 4)
    again = semmoe("report", tmp_path / "p", trace, "--json")
    assert json.loads(again.stdout) == report | {"plan": str(tmp_path / "p"), "trace": str(trace)}
    table = semmoe("report", tmp_path / "p", trace).stdout
    assert "contiguous" in table and "REM" in table
    for path, word in ((trace, "routing per token"), (tmp_path / "p", "fitted load imbalance")):
        assert word in semmoe("show", path).stdout
        assert json.loads(semmoe("show", path, "--json").stdout)["kind"] in ("trace", "plan")


def test_gather_says_that_placement_cannot_help(trace, tmp_path):
    result = semmoe("place", trace, "--ranks", 4, "--dispatch", "gather", "--method", "load", "-o", tmp_path / "p")
    assert "cannot reduce traffic" in result.stdout and result.stdout.count("whatever the placement") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 5, "--redundant", 1], "32 + 1 slots do not divide over 5 ranks; --redundant 3 would"),
        (["--ranks", 5, "--slots", 6], "5 ranks hold 32 experts in 7 to 32 slots each"),
        (["--ranks", 5, "--certify"], "--certify bounds placements without copies: add --spare empty"),
        (["--ranks", 5, "--spare", "empty", "--replicas", 1], "--spare empty holds every expert once, in 7 slots"),
        (["--ranks", 8, "--nodes", 3], "8 ranks do not divide over 3 nodes"),
        (["--ranks", 4, "--holdout", 2], "--holdout is 2.0"),
        (["--ranks", 4, "--holdout-domain", "x"], "no request has the domain 'x'"),
        (["--ranks", 4, "--load-cap", 0.5], "--load-cap is 0.5"),
        (["--ranks", 4, "--load-cap", "inf"], "--load-cap is inf"),
        (["--ranks", 4, "--lar-weight", "inf"], "--lar-weight is inf"),
        (["--ranks", 4, "--replicas", 1, "--certify"], "--certify bounds placements without replicas"),
        (
            ["--ranks", 4, "--replicas", 1, "--expressible", "permutation"],
            "a permuted checkpoint holds every expert once",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(trace, tmp_path, arguments, message):
    result = semmoe("place", trace, *arguments, "-o", tmp_path / "p")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("semmoe: ") and message in result.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("asked", ["--debug", "SEMMOE_DEBUG"])
def test_debug_shows_the_traceback_behind_the_line(tmp_path, monkeypatch, asked):
    """Also what `raise ... from None` hides."""
    line = f"semmoe: {tmp_path}/p is not a plan: it holds no plan.json; nothing of that name is there"
    words = ["export", f"{tmp_path}/p", "--to", "eplb", "-o", f"{tmp_path}/m.npz"]
    plain = semmoe(*words)
    assert (plain.returncode, plain.stderr) == (1, f"{line}\n")
    if asked == "--debug":
        words.insert(0, "--debug")
    else:
        monkeypatch.setenv(asked, "1")
    shown = semmoe(*words)
    assert shown.returncode == 1 and shown.stderr.splitlines()[-1] == line
    assert re.findall(r"^([\w.]*Error)\b", shown.stderr, re.M) == [
        "FileNotFoundError",
        "semmoe.profiles.errors.InputError",
    ]
    monkeypatch.setenv("SEMMOE_DEBUG", "0")
    assert semmoe(*words).stderr.count("\n") == (1 if asked == "SEMMOE_DEBUG" else shown.stderr.count("\n"))


def test_a_bug_is_a_traceback_and_other_ends_are_a_line_unless_debugged(monkeypatch, capsys):
    def fail(error: BaseException) -> str:
        def work() -> None:
            raise error

        monkeypatch.setattr("semmoe.main.app", work)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        return capsys.readouterr().err

    with pytest.raises(KeyError):
        fail(KeyError("ours"))
    for error in (InputError("no"), BrokenProcessPool("died"), OSError(errno.ENOSPC, "No space left on device")):
        monkeypatch.delenv("SEMMOE_DEBUG", raising=False)
        assert fail(error).count("\n") == 1
        monkeypatch.setenv("SEMMOE_DEBUG", "1")
        assert fail(error).startswith("Traceback")


def test_one_thing_in_place_of_another_is_named(trace, tmp_path):
    assert semmoe("place", trace, "--ranks", 4, "--method", "load", "-o", tmp_path / "p").returncode == 0
    for words, message in (
        (["report", tmp_path / "p"], "it is a plan"),
        (["report", trace, trace], "semmoe place makes a plan of it"),
        (["report", tmp_path / "absent"], "nothing of that name is there"),
        (["show", tmp_path / "absent"], "does not exist: expected a trace or a plan"),
        (["demo", "-o", tmp_path / "p" / "plan.json" / "x"], "cannot make the directory"),
        (["place", trace, "--ranks", 4, "--load-cap", "nan", "-o", tmp_path / "q"], "--load-cap is nan"),
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert isinstance(result.exception, InputError) and message in str(result.exception), words
        assert "\n" not in str(result.exception)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "route"])  # which runs until it is stopped
def test_every_command_prints_json(command):
    assert "--json " in CliRunner().invoke(app, [command, "--help"]).output


def test_no_color_is_obeyed_on_a_terminal(trace, tmp_path):
    assert semmoe("place", trace, "--ranks", 4, "--method", "load", "-o", tmp_path / "p").returncode == 0
    seen = {}
    for value in ("", "1"):
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "NO_COLOR": value}
        words = [sys.executable, "-m", "semmoe", "report", str(tmp_path / "p"), str(trace)]
        child = subprocess.Popen(words, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
        os.close(theirs)
        printed = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how a terminal on Linux ends
                break
            if not part:
                break
            printed += part
        os.close(ours)
        assert child.wait() == 0
        seen[value] = printed
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-7]")
    assert colour.search(seen[""]) and not colour.search(seen["1"])
    assert b"REM" in seen["1"]


def test_a_worker_that_died_is_one_line(monkeypatch, capsys):
    def die() -> None:
        raise BrokenProcessPool

    monkeypatch.setattr("semmoe.main.app", die)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "--processes 1" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(trace):
    assert semmoe("place", trace).returncode == 2
    assert semmoe("place", trace, "--ranks", 4, "-o", "p", "--method", "magic").returncode == 2


@pytest.mark.parametrize(
    "option", ["--max-requests", "--max-length", "--text-field", "--revision", "--batch-tokens", "--temperature"]
)
def test_options_of_a_model_do_not_go_with_an_import(tmp_path, option):
    result = semmoe("trace", "--from", "sglang", tmp_path / "none.jsonl", option, 2, "-o", tmp_path / "t")
    assert result.returncode == 2 and f"{option} does not go with --from" in result.stderr


@pytest.mark.parametrize("words", [["--generate", 1, "--temperature", "inf"], ["--temperature", 1]])
def test_a_temperature_is_finite_and_for_generations(tmp_path, words):
    result = semmoe("trace", "demo", "--data", "demo", *words, "-o", tmp_path / "t")
    assert result.returncode == 2 and "--temperature" in result.stderr and not list(tmp_path.iterdir())


def test_a_page_that_the_disk_cannot_hold_leaves_nothing(trace, tmp_path):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from semmoe.main import main; main()"
    )
    # -B: else byte code that is cut short stays in the interpreter's cache for other tests.
    words = [sys.executable, "-B", "-c", code, "report", str(trace), "-o", str(tmp_path / "h.html")]
    # A measurement of coverage could not write its own file there either.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1 and "h.html: File too large" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_that_ends_too_soon_for_the_interpreter_is_a_traceback():
    code = "import semmoe.main as m\n@m.app.command()\ndef broken(): raise EOFError('marshal data too short')\nm.main()"
    result = subprocess.run([sys.executable, "-c", code, "broken"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "EOFError: marshal data too short"


def test_what_a_report_would_pass_over_or_print_as_infinity_is_refused():
    assert semmoe("report", "p", "t", "--ranks", 8).returncode == 2
    assert semmoe("report", "p", "t", "--hidden-size", 8, "--dispatch-bytes", "inf").returncode == 2
    assert semmoe("compare", "p", "q", "t", "--dtype-bytes", "inf").returncode == 2


@pytest.mark.parametrize(
    "words", [["--method", "metis"], ["--holdout", 0.5], ["--replicas", 1], ["--no-refit"], ["--holdout-domain", "a"]]
)
def test_options_of_placing_have_no_use_with_an_import(tmp_path, words):
    result = semmoe("place", "t", "--ranks", 4, "--import", "eplb", "m.npy", *words, "-o", tmp_path / "p")
    assert f"--import takes the map as it is: {words[0]} has no use there" in result.stderr


def test_json_goes_into_a_buffer_too():
    with redirect_stdout(io.StringIO()) as printed:
        print_json({"p": "\u00fc"})
    assert printed.getvalue() == '{"p": "\u00fc"}\n'


def test_names_with_brackets_and_letters_that_stdout_lacks_are_shown(trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names are not folded
    plans = ["p [bold] \u00fc", "q"]
    for method, name in zip(("load", "contiguous"), plans, strict=True):
        assert semmoe("place", trace, "--ranks", 4, "--method", method, "-o", name).returncode == 0
    assert semmoe("compare", *plans, trace).stdout.count("p [bold] \u00fc") >= 2
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert "p [bold] \\xfc" in semmoe("compare", *plans, trace).stdout
    told = json.loads(semmoe("compare", *plans, trace, "--json").stdout)
    assert told["plans"][0]["plan"].endswith("p [bold] \u00fc")


def test_a_closed_pipe_is_quiet(trace):
    code = f"{sys.executable} -m semmoe show {trace} | true"
    assert "Traceback" not in subprocess.run(["bash", "-c", code], capture_output=True, text=True).stderr


@pytest.mark.parametrize("command", [place, report, compare])
def test_windows_are_those_of_the_runtime(command):
    assert inspect.signature(command).parameters["window"].default == WINDOW


WATCH = """
import os, sys
seen = []
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            seen.append(os.environ["OMP_NUM_THREADS"])
sys.meta_path.insert(0, Watch)
from semmoe.main import app
try:
    app(["place", "absent", "--ranks", "4", "-o", "p"])
except Exception as error:
    assert "absent is not a trace" in str(error), error
print(seen)
"""


def test_place_computes_on_one_thread_whatever_the_machine(tmp_path):
    """More threads add in another order: the same input would give other bytes on another number
    of cores."""
    environment = os.environ | {"OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.stdout == "['1']\n", done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=2))
    for words in (["--version"], ["show", str(tmp_path / "t")], ["show", str(tmp_path / "t"), "--json"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-u", "-m", "semmoe", *words], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1 and done.stderr == "semmoe: cannot write: No space left on device\n", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["place", "t", "--ranks", "4", "--topology", "f.json", "-o", "p", "--processes", "2", "--json"],
        ["--debug", "place", "t", "--ranks", "4", "--topology", "f.json", "-o", "p"],
        ["place", "t/", "--ranks", "4", "--topology=f.json", "-op", "--processes=1"],
        ["place", "--output=p", "--ranks", "4", "--topology", "f.json", "t"],
    ],
)
def test_the_recorded_command_line_names_no_file(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["semmoe", *words])
    assert command_line(Path("p"), Path("f.json"), "t") == "semmoe place --ranks 4 --topology"
