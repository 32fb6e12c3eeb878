"""The scorer of plug-ins and routers: the plan's own scores, from numpy alone."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from engine_plans import served_plan

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import POWER, read_plan_facts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.engines.write import write_plugin_directory
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule import request_scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plan in p, and what the plug-in of vLLM reads of it in x."""
    root = tmp_path_factory.mktemp("scorer")
    plan = served_plan(root)
    plan.save(root / "p")
    write_plugin_directory(plan, "vllm-plugin", root / "x")
    return root


@pytest.fixture(scope="module")
def plan(folder) -> Plan:
    return Plan.load(folder / "p")


def prompts(plan: Plan, count: int = 40) -> list[np.ndarray]:
    scorer = plan.request_scorer
    assert scorer is not None
    draw = np.random.default_rng(1)
    ids = np.append(scorer.ids_V, [scorer.ids_V[-1] + 1, 100_000])  # two that the plan does not know
    return [draw.choice(ids, draw.integers(1, 2_000)) for _ in range(count)]


@pytest.mark.parametrize("name", ["p", "x"])
def test_scores_are_the_plans_own(folder, plan, name):
    scorer = PlanScorer.open(folder / name)
    assert plan.request_scorer is not None
    texts = prompts(plan)
    expected_BR = plan.request_scorer.scores_BR(texts)
    found_BR = np.array([scorer.scores(ids) for ids in texts])
    assert found_BR.dtype == np.float64 and found_BR.shape == (40, 4)
    np.testing.assert_allclose(found_BR, expected_BR, atol=2e-6)
    np.testing.assert_array_equal(scorer.scores(texts[0].tolist()), found_BR[0])


def test_ranks_of_a_group_add_up(folder, plan):
    ids = prompts(plan)[3]
    of_ranks, of_groups = PlanScorer.open(folder / "p"), PlanScorer.open(folder / "p", ranks=2)
    scores_R, scores_G = of_ranks.scores(ids), of_groups.scores(ids)
    np.testing.assert_allclose(scores_G, scores_R.reshape(2, 2).sum(axis=1), atol=1e-6)
    assert of_groups.expected_lar(scores_G, 1) == pytest.approx(sum(of_ranks.expected_lar(scores_R, r) for r in (2, 3)))


def test_what_is_expected_is_what_happens_on_the_fitted_requests(folder, plan):
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.schedule.request_scorer import request_shares_BR

    batch, scorer = RoutingTrace.open(folder / "t").load(), PlanScorer.open(folder / "x")
    shares_BR = request_shares_BR(batch, plan.placement.hosts_LER)
    expected = [
        scorer.expected_lar(scores_R, rank)
        for scores_R in map(scorer.scores, map(batch.prompt, range(batch.num_requests)))
        for rank in range(4)
    ]
    np.testing.assert_allclose(np.mean(np.abs(np.array(expected) - shares_BR.ravel())), 0, atol=0.05)
    assert np.corrcoef(expected, shares_BR.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("ids", [[], [100_000], [-1, -7], np.zeros(0, np.int32), ["text"], [0.5]])
def test_a_prompt_of_nothing_known_scores_zeros(folder, ids):
    scores_R = PlanScorer.open(folder / "p").scores(ids)
    assert scores_R.shape == (4,) and not scores_R.any()


def test_the_power_is_that_of_the_fit():
    assert POWER == request_scorer.POWER


def test_the_fingerprint_is_the_plans(folder, plan):
    for name in ("p", "x"):
        assert read_plan_facts(folder / name).fingerprint == plan.fingerprint


def test_only_numpy_and_safetensors_are_imported(folder):
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'scipy', 'torch', 'transformers', 'pandas', 'typer', 'rich', 'fsspec'):\n"
        "    sys.modules[name] = None\n"
        "from semmoe.runtime.engines.scorer import PlanScorer\n"
        "from semmoe.runtime.engines.band import Band\n"
        f"scores = PlanScorer.open({str(folder / 'p')!r}).scores([1, 2, 3])\n"
        "assert Band(4).choose(scores, [0, 0, 0, 0]).decision == 'affine'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_refusals_name_what_is_wrong(folder, plan, tmp_path):
    with pytest.raises(InputError, match="4 ranks, which do not divide over 3 DP ranks"):
        PlanScorer.open(folder / "p", ranks=3)
    with pytest.raises(InputError, match="holds no plan.json"):
        PlanScorer.open(tmp_path)
    replace(plan, tables={}).save(tmp_path / "bare")
    with pytest.raises(InputError, match="no request scorer"):
        PlanScorer.open(tmp_path / "bare")
    plan.save(tmp_path / "edited")
    facts = (tmp_path / "edited" / "plan.json").read_text()
    (tmp_path / "edited" / "plan.json").write_text(facts.replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(InputError, match="was edited"):
        PlanScorer.open(tmp_path / "edited")
    (tmp_path / "edited" / "plan.json").write_text(facts)
    (tmp_path / "edited" / "tables.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="was changed"):
        PlanScorer.open(tmp_path / "edited")
