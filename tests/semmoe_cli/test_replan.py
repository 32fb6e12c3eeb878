"""`semmoe place --from-plan` at the command line: what is refused, what is written, and what other
commands say of it."""

import json
import re
from pathlib import Path

import pytest
from command_line import run
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic

SIZES = {"num_layers": 2, "num_experts": 16, "top_k": 3, "vocab_size": 200, "num_domains": 1}


def world(requests: int, tokens: int, seed: int) -> SyntheticWorld:
    return SyntheticWorld(**SIZES, num_requests=requests, tokens_per_request=tokens, noise=0.03, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An old plan for 4 ranks, p; traces of its traffic, t0, and of other traffic, t1."""
    folder = tmp_path_factory.mktemp("replan")
    for seed in (0, 1):  # of other lengths, so that no request is the same to a plan
        write_synthetic(folder / f"t{seed}", world(48, 64 + seed, seed))
    run("place", folder / "t0", "--ranks", 4, "--effort", "fast", "--processes", 1, "-o", folder / "p")
    return folder


def test_a_plan_a_delta_and_what_other_commands_say(made):
    printed = run(
        *("place", made / "t1", "--from-plan", made / "p", "--moves", "50%", "--force", "--no-refit", "--processes", 1),
        *("-o", made / "n", "--json"),
    )
    told = json.loads(printed)["replan"]
    delta = json.loads((made / "n" / "delta.json").read_text())
    plans = [json.loads((made / name / "plan.json").read_text()) for name in ("p", "n")]
    assert told["new"] == delta["new"] and told["budget"] == delta["budget"]
    assert 0 < delta["budget"]["used"] <= delta["budget"]["asked"] == 16
    moved = [(layer["layer"], move) for layer in delta["layers"] for move in layer["moves"]]
    for layer, move in moved:
        assert plans[0]["placement"][layer][move["from_rank"]][move["from_slot"]] == move["expert"]
        assert plans[1]["placement"][layer][move["to_rank"]][move["to_slot"]] == move["expert"]
    slots = sum(a != b for a, b in zip(*(str(p["placement"]).split() for p in plans), strict=True))
    assert slots == delta["budget"]["used"], "no other slot changed"
    for kind, name in (
        (("sglang",), "map.json"),
        (("vllm", "--format", "pr41141"), "vllm.json"),
        (("vllm-ascend",), "ascend.json"),
        (("trtllm",), "map.yaml"),
    ):
        numbers = []
        for plan in ("p", "n"):
            exported = json.loads(run("export", made / plan, "--to", *kind, "-o", made / f"{plan}-{name}", "--json"))
            numbers.append(re.findall(r"-?\d+", (made / f"{plan}-{name}").read_text()))
        assert json.loads(Path(exported["delta"]).read_text()) == delta
        assert sum(a != b for a, b in zip(*numbers, strict=True)) == delta["budget"]["used"], f"{kind}: no other slot"
    compared = json.loads(run("compare", made / "p", made / "n", made / "t1", "--json"))
    assert compared["requests"] == 10 and "curve" not in compared, "10 held-out requests are too few for a curve"


def test_a_trace_of_other_traffic_has_a_curve_and_a_drift_finding(made):
    run("place", made / "t0", "--ranks", 4, "--method", "metis", "--processes", 1, "-o", made / "q")
    compared = json.loads(run("compare", made / "p", made / "q", made / "t1", "--json", "-o", made / "c.md"))
    points = compared["curve"]["points"]
    assert {point["kind"] for point in points} == {"keep", "budget", "plan", "free", "eplb"}
    assert points[0]["kind"] == "keep" and points[0]["gain"] == 0
    assert [point["moves"] for point in points] == sorted(point["moves"] for point in points)
    assert next(point["kept"] for point in points if point["kind"] == "free") in (1, None)
    assert "Gain against moves" in (made / "c.md").read_text()
    drift = json.loads(run("report", made / "p", made / "t1", "--json"))["drift"]
    assert drift["lo"] <= drift["gain"] <= drift["hi"] and drift["requests"] == 48
    assert drift["worth_it"] == (drift["lo"] > 0) and ("--from-plan" in drift["command"]) == drift["worth_it"]


def test_no_shift_writes_the_old_plan_to_the_byte(made):
    write_synthetic(made / "t2", world(96, 66, 0))
    run("place", made / "t2", "--from-plan", made / "p", "--processes", 1, "-o", made / "same")
    for name in ("plan.json", "tables.safetensors"):
        assert (made / "same" / name).read_bytes() == (made / "p" / name).read_bytes()
    assert json.loads((made / "same" / "delta.json").read_text())["decision"]["move"] is False


def test_with_hardware_gain_and_price_are_microseconds(made):
    machine = ("--hardware", "h100", "--hidden-size", 2048, "--expert-size", 768, "--tokens-per-rank", 64)
    words = ("place", made / "t1", "--from-plan", made / "p", *machine, "--phase", "generated", "--processes", 1)
    printed = run(*words, "--force", "--moves", "50%", "--horizon-tokens", 10**9, "-o", made / "timed", "--json")
    told, delta = json.loads(printed), json.loads((made / "timed" / "delta.json").read_text())
    assert delta["decision"]["unit"] == told["replan"]["decision"]["unit"] == "us per layer"
    assert told["time"]["hardware"] == "h100" and 0 < delta["decision"]["cost"] < delta["decision"]["gain"]
    assert delta["budget"]["used"] > 0 and sum(layer["gain"] for layer in delta["layers"]) > 0
    dear = json.loads(run(*words, "--force", "--move-cost", 1e6, "-o", made / "dear", "--json"))["replan"]
    assert dear["budget"]["used"] == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--moves", "10", "--moves-per-layer", "2"),
        ("--moves", "many"),
        ("--moves", "101%"),
        ("--moves", "-3"),
        ("--move-cost", "inf"),
        ("--move-cost", "0.1", "--horizon-tokens", "1000"),
        ("--method", "metis"),
        ("--objective", "tp"),
        ("--import", "eplb", "map.json"),
        ("--topology", "links.json"),
        ("--minimize", "bytes"),
        ("--minimize", "time"),
        ("--hardware", "h100", "--minimize", "bytes"),
        ("--phase", "prompt"),
        ("--engine", "vllm"),
        ("--lar-weight", "auto"),
    ],
)
def test_options_that_do_not_go_together_are_a_wrong_use(made, words):
    result = CliRunner().invoke(app, ["place", str(made / "t1"), "--from-plan", str(made / "p"), "-o", "n", *words])
    assert result.exit_code == 2, result.output


def test_options_without_a_plan_are_a_wrong_use(made):
    for words in (["--moves", "10%", "--ranks", "4"], ["--move-cost", "1", "--ranks", "4"], []):
        result = CliRunner().invoke(app, ["place", str(made / "t1"), "-o", "n", *words])
        assert result.exit_code == 2, result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ranks", "8"), "the old plan is for 4"),
        (("--nodes", "2"), "the old plan is for 1"),
        (("--horizon-tokens", "1000"), "needs the size of an expert"),
        (("--hardware", "h100"), "sizes of 2 layers of 16 experts, top-3, are not known"),
    ],
)
def test_what_the_old_plan_cannot_be_is_one_line(made, words, said):
    result = CliRunner().invoke(app, ["place", str(made / "t1"), "--from-plan", str(made / "p"), "-o", "n", *words])
    assert isinstance(result.exception, InputError) and said in str(result.exception)
    assert not Path("n").exists()
