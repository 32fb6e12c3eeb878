"""A plan comes back from disk as it was, the same input gives the same bytes, and nobody is
scored on what was learned from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles import safetensors_file
from semmoe.profiles.counts import profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.split import split_requests
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers import make_plan as make_plan_module
from semmoe.solvers.demands import Demands
from semmoe.solvers.evaluate.sums import MAX_GROUPS, resampling_groups
from semmoe.solvers.make_plan import PlanOptions, make_plan, score_plan
from semmoe.solvers.place.bounds import certificate_of
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import NO_DIGEST, RESIGNED, Plan, sign_again
from semmoe.solvers.schedule.simulate import Setting

SETTING = Setting(batch_tokens=128, window=8)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "t"
    write_synthetic(path, SyntheticWorld(num_requests=60))
    return RoutingTrace.open(path)


@pytest.fixture(scope="module")
def stored(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "p"
    plan_of(trace).save(path)
    return path


def plan_of(trace, **options) -> Plan:
    usual = {"method": "spectral", "holdout": 0.25, "made_by": "semmoe place"}
    return make_plan([trace], Topology(4), Demands(load_cap=1.2), PlanOptions(setting=SETTING, **{**usual, **options}))


def test_a_plan_round_trips_and_repeats_to_the_byte(trace, tmp_path):
    plan = plan_of(trace)
    plan.save(tmp_path / "a")
    plan_of(trace).save(tmp_path / "b")
    for name in ("plan.json", "tables.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    read = Plan.load(tmp_path / "a")
    stored = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert {key: stored[key] for key in stored if not key.endswith(("digest", "sha256"))} == plan.to_json()
    assert read.to_json() == plan.to_json() and read.unchecked == {}
    np.testing.assert_array_equal(read.load_LE, plan.load_LE)
    assert read.fingerprint == plan.fingerprint


def test_scores_are_held_out_and_refitting_changes_only_the_placement(trace, tmp_path):
    refitted, scored = plan_of(trace), plan_of(trace, refit=False)
    assert refitted.scores == scored.scores and refitted.scores.requests == 15
    assert refitted.load_LE.sum() == 60 * 64 * 4 * 4 and scored.load_LE.sum() == 45 * 64 * 4 * 4
    again, notes = score_plan(scored, trace, setting=SETTING)
    assert again.rows == scored.scores.rows and "45 requests" in notes[0]
    again, notes = score_plan(refitted, trace, setting=SETTING)
    assert again == refitted.scores and "15 held-out requests" in notes[0]


def test_a_refit_of_very_many_requests_counts_token_tables_alone(trace, monkeypatch):
    scored = plan_of(trace, refit=False)
    monkeypatch.setattr(make_plan_module, "AMPLE_IDS", 1)
    plan = plan_of(trace)
    np.testing.assert_array_equal(plan.placement.experts_LRS, scored.placement.experts_LRS)
    assert plan.scores == scored.scores and make_plan_module.AMPLE in plan.notes
    assert plan.load_LE.sum() == 60 * 64 * 4 * 4 and plan.split["refit"]
    counted, before = (
        plan.deployment.schedule.token.own.weight_U.sum(),
        scored.deployment.schedule.token.own.weight_U.sum(),
    )
    assert counted == 60 * 64 and before == 45 * 64
    np.testing.assert_array_equal(
        plan.deployment.schedule.context.own_LDER, scored.deployment.schedule.context.own_LDER
    )
    # Requests of a domain that nothing was learned from are another matter.
    plan = plan_of(trace, holdout_domains=[trace.requests().column("domain")[0].as_py()])
    assert make_plan_module.AMPLE not in plan.notes


def test_a_trace_that_was_learned_from_is_never_scored(trace, tmp_path):
    write_synthetic(tmp_path / "more", SyntheticWorld(num_requests=90))  # its first 60 requests are those of the trace
    report, notes = score_plan(plan_of(trace), RoutingTrace.open(tmp_path / "more"), setting=SETTING)
    assert report.requests == 30 and "60 requests" in notes[0]
    write_synthetic(tmp_path / "fewer", SyntheticWorld(num_requests=20))
    with pytest.raises(InputError, match="fitted on every request"):
        score_plan(plan_of(trace), RoutingTrace.open(tmp_path / "fewer"), setting=SETTING)


def test_the_planted_structure_pays_on_held_out_requests(trace):
    rows = {row.placement: row for row in plan_of(trace).scores.rows if row.schedule == "random"}
    assert rows["plan"].rem < 0.75 * min(rows["contiguous"].rem, rows["load"].rem)
    assert rows["plan"].ci["rem"][1] < rows["load"].ci["rem"][0]
    assert rows["load"].lar == pytest.approx(0.25)


def test_a_request_is_given_once(trace):
    with pytest.raises(InputError, match="60 requests are in more than one of the traces"):
        split_requests([trace, trace], holdout=0.2, holdout_domains=[], seed=0)


def test_domains_can_be_held_out(trace):
    domain = trace.requests().column("domain")[0].as_py()
    plan = plan_of(trace, holdout_domains=[domain])
    assert plan.split["holdout_domains"] == [domain]
    held_out = sum(d == domain for d in trace.requests().column("domain").to_pylist())
    assert plan.scores.requests == held_out == plan.split["held_out_requests"]


def test_a_plan_for_another_model_or_a_damaged_one_is_one_line(trace, tmp_path):
    plan = plan_of(trace)
    write_synthetic(tmp_path / "other", SyntheticWorld(num_requests=5, num_experts=16))
    with pytest.raises(InputError, match="num_experts 16, the plan is for num_experts 32"):
        score_plan(plan, RoutingTrace.open(tmp_path / "other"), setting=SETTING)
    plan.save(tmp_path / "p")
    text = (tmp_path / "p" / "plan.json").read_text()
    facts = {key: value for key, value in json.loads(text).items() if key not in ("digest", "tables_sha256")}
    for broken, message in [
        (text[: len(text) // 2], "is not JSON"),
        (json.dumps({**facts, "format": "x"}), "is not a plan"),
        (json.dumps({**facts, "version": 7}), "has version 7"),
        (json.dumps({k: v for k, v in facts.items() if k != "split"}), "lacks the key 'split'"),
        (json.dumps({**facts, "placement": [[[0]]]}), "is on no rank"),
        (json.dumps({**facts, "placement": "abc"}), "placement is 'abc', expected a list of at least 1"),
        (
            json.dumps({**facts, "placement": [[[0, 1], [2]]]}),
            r"placement\[0\]\[1\] is a list of 1, expected a list of 2",
        ),
        (
            json.dumps({**facts, "placement": [[[0, True]]]}),
            r"placement\[0\]\[0\]\[1\] is True, expected a whole number",
        ),
        (json.dumps({**facts, "placement": [[[0, 10**30]]]}), r"placement\[0\]\[0\]\[1\] is 10+, expected"),
        (json.dumps({**facts, "seed": 1.5}), "seed is 1.5, expected a whole number"),
        (json.dumps({**facts, "load_cap": "1"}), "load_cap is '1', expected a finite number from 0"),
        (json.dumps({**facts, "notes": "x"}), "notes is 'x', expected a list"),
        (json.dumps({**facts, "load_cap": float("nan")}), "NaN is no number of JSON"),
        (json.dumps({**facts, "topology": {"ranks": 10**12, "nodes": 1}}), "topology.ranks is 10+, expected"),
        (json.dumps({**facts, "topology": {"ranks": 4, "nodes": 3}}), "4 ranks|nodes"),
        (
            json.dumps({**facts, "scores": {**facts["scores"], "rows": [{"placement": "plan"}]}}),
            "rows.0. lacks 'schedule'",
        ),
        (json.dumps({**facts, "scores": {**facts["scores"], "ranks": "4"}}), "ranks is '4', expected int"),
        (json.dumps({**facts, "topology": {"ranks": 2, "nodes": 1}}), "4 ranks, its topology 2"),
    ]:
        (tmp_path / "p" / "plan.json").write_text(broken)
        with pytest.raises(InputError, match=message):
            Plan.load(tmp_path / "p")
    (tmp_path / "p" / "plan.json").write_text(text)
    tables = tmp_path / "p" / "tables.safetensors"
    tables.write_bytes(tables.read_bytes()[:40])
    with pytest.raises(InputError, match="tables.safetensors is not what .* was written with"):
        Plan.load(tmp_path / "p")
    tables.unlink()
    with pytest.raises(InputError, match="no tables.safetensors"):
        Plan.load(tmp_path / "p")


def test_a_plan_says_which_outputs_can_express_it(trace, tmp_path):
    plan = plan_of(trace, method="contiguous", refit=False)
    possible = {"engine_map": True, "ranks_checkpoint": True, "permuted_checkpoint": True, "why_not": ""}
    assert plan.outputs == possible
    grouped = replace(plan.model, n_group=8, topk_group=2)  # 32 experts on 4 ranks: two whole groups on each
    assert replace(plan, model=grouped).outputs == possible
    experts_LRS = plan.placement.experts_LRS.copy()
    experts_LRS[0, 0, 0], experts_LRS[0, 3, 7] = experts_LRS[0, 3, 7], experts_LRS[0, 0, 0]
    split = replace(plan, model=grouped, placement=Placement(experts_LRS, 32))
    split.save(tmp_path / "p")
    found = json.loads((tmp_path / "p" / "plan.json").read_text())["outputs"]
    assert not found["permuted_checkpoint"]
    assert found["why_not"] == "the router picks 2 of 8 groups of experts, and 1 of 4 layers split a group"
    assert replace(split, model=replace(grouped, topk_group=8)).outputs == possible  # a choice of all groups is free
    more_LRS = np.concatenate([experts_LRS, np.roll(experts_LRS, 1, axis=1)[:, :, :1]], axis=2)
    assert replace(plan, placement=Placement(more_LRS, 32)).outputs["why_not"] == "1 replica slots per rank"


def test_saving_never_overwrites_something_else(trace, tmp_path):
    plan = plan_of(trace)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(InputError, match="is not a plan: choose another name"):
        plan.save(tmp_path / "notes")
    with pytest.raises(InputError, match="does not exist"):
        plan.save(tmp_path / "nowhere" / "p")
    plan.save(tmp_path / "p")
    plan.save(tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "p"]


def test_scores_by_domain_add_up(trace):
    scores = plan_of(trace, method="metis", refit=False).scores
    domains = scores.domains
    assert len(domains) > 1 and {d.domain for d in domains} == set(trace.requests().column("domain").to_pylist())
    assert sum(d.tokens for d in domains) == scores.tokens
    assert sum(d.requests for d in domains) == scores.requests
    for i, whole in enumerate(scores.rows):
        rows = [d.rows[i] for d in domains]
        assert {row.key for row in rows} == {whole.key}
        assert np.average([row.rem for row in rows], weights=[d.tokens for d in domains]) == pytest.approx(whole.rem)
        assert all(row.ci["rem"][0] <= row.rem <= row.ci["rem"][1] for row in rows)


def test_groups_of_many_requests_are_of_one_domain():
    domain_of_B = np.random.default_rng(0).integers(0, 3, 2_000) * 2  # the domains 1 and 3 have no request
    domain_of_B[5] = 5
    group_of_B, domain_of_G = resampling_groups(domain_of_B)
    np.testing.assert_array_equal(domain_of_G[group_of_B], domain_of_B)
    assert len(domain_of_G) <= MAX_GROUPS + 1 and np.bincount(group_of_B).min() > 0
    few = np.array([1, 0, 1])
    assert [part.tolist() for part in resampling_groups(few)] == [[0, 1, 2], [1, 0, 1]]


def test_schedules_and_the_certificate_are_in_the_scores(trace):
    plan = plan_of(trace, method="semmoe", certify=True, refit=False)
    rows = {row.schedule: row for row in plan.scores.plan_rows}
    assert set(rows) >= {"random", "dp-roundrobin", "dp-scorer", "dp-oracle", "tp-table", "tp-paper", "tp-context"}
    assert rows["random"].lar == pytest.approx(0.25)
    assert 0.3 < rows["tp-table"].lar <= rows["tp-oracle"].lar
    verdict = plan.scores.verdict
    assert (verdict.decision, verdict.schedule) == ("insufficient evidence", "random")  # 15 requests
    assert verdict.saved > 0.2 and verdict.with_schedule.saved > verdict.saved
    assert rows["tp-context"].token_imbalance == pytest.approx(1.0)
    certificate = plan.scores.certificate
    assert 0 <= certificate.gap < 0.3 and len(certificate.layers) == 4
    assert all(layer.co_activation <= layer.co_activation_bound for layer in certificate.layers)
    assert any(name.startswith("schedule.") for name in plan.tables)


def oracle_rem(plan: Plan) -> float:
    return next(row.rem for row in plan.scores.rows if row.schedule == "tp-oracle")


def test_bounds_are_for_the_load_that_a_placement_has(trace):
    # Contiguous placement does not look at the cap: what it reaches must be under a bound that
    # allows its load.
    profile = profile_traces([trace])
    placement = Placement.from_ranks(np.repeat(np.arange(4), 8)[None].repeat(4, axis=0), 4)
    load_LR = profile.load_LE.reshape(4, 4, 8).sum(2)
    loosest = [certificate_of(profile, placement, load_cap=cap) for cap in (1.0, 1.05, 3.0)]
    assert (load_LR.max(1) > 1.05 * load_LR.mean(1)).all()
    for entries in zip(*(found.layers for found in loosest), strict=True):
        assert entries[0] == entries[1]
        assert entries[0].lar_bound < entries[2].lar_bound or entries[0].lar_bound == 1


def test_replicas_are_placed_and_scored_but_have_no_certificate(trace):
    demands = Demands(load_cap=1.2, replicas=2, effort="fast")
    more = make_plan([trace], Topology(4), demands, PlanOptions(holdout=0.25, setting=SETTING))
    assert more.placement.slots_per_rank == 10
    assert oracle_rem(more) < oracle_rem(plan_of(trace, method="semmoe"))
    with pytest.raises(InputError, match="--certify bounds placements without replicas"):
        make_plan([trace], Topology(4), Demands(replicas=1), PlanOptions(method="metis", certify=True))


def edit(path, change) -> None:
    facts = json.loads((path / "plan.json").read_text())
    change(facts)
    (path / "plan.json").write_text(json.dumps(facts))


def swap_experts(facts) -> None:
    (first, *_), (second, *_), *_ = facts["placement"][0]
    facts["placement"][0][0][0], facts["placement"][0][1][0] = second, first


@pytest.mark.parametrize(
    "change",
    [
        swap_experts,
        lambda facts: facts["scores"]["rows"][0].update(rem=0.01),
        lambda facts: facts["scores"].update(verdict=None),
        lambda facts: facts["model"].update(model="another"),
        lambda facts: facts["split"].update(refit=False),
        lambda facts: facts.update(more=1),
    ],
)
def test_an_edited_plan_is_refused_and_can_be_signed_again(stored, tmp_path, change):
    path = shutil.copytree(stored, tmp_path / "p")
    facts = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps(dict(reversed(facts.items())), indent=2))
    assert Plan.load(path).notes == facts["notes"]  # laid out anew, nothing edited
    edit(path, change)
    before = (path / "plan.json").read_bytes()
    with pytest.raises(InputError, match=f"plan.json was edited .* `semmoe show {path} --accept-edits`"):
        Plan.load(path)
    assert (path / "plan.json").read_bytes() == before
    assert sign_again(path).notes == [*facts["notes"], RESIGNED]
    assert Plan.load(path).notes == [*facts["notes"], RESIGNED]
    edit(path, lambda facts: facts.update(placement=[[[0]]]))
    before = (path / "plan.json").read_bytes()
    with pytest.raises(InputError, match="is on no rank"):
        sign_again(path)
    assert (path / "plan.json").read_bytes() == before


def test_mapped_tables_are_the_same_and_outlive_the_plan_that_replaces_them(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 1000)
    shutil.copytree(stored, tmp_path / "p")
    read, mapped = Plan.load(tmp_path / "p"), Plan.load(tmp_path / "p", mapped=True)
    assert sum(isinstance(table, np.memmap) for table in mapped.tables.values()) > 3
    replace(read, tables={name: np.zeros_like(table) for name, table in read.tables.items()}).save(tmp_path / "p")
    assert mapped.to_json() == read.to_json() and mapped.tables.keys() == read.tables.keys()
    for name, table in read.tables.items():
        np.testing.assert_array_equal(mapped.tables[name], table)


def test_tables_of_another_plan_are_refused(stored, tmp_path):
    plan = Plan.load(shutil.copytree(stored, tmp_path / "p"))
    replace(plan, load_LE=plan.load_LE + 1).save(tmp_path / "q")
    own, tables = (tmp_path / "p" / "tables.safetensors").read_bytes(), tmp_path / "p" / "tables.safetensors"
    flipped = bytearray(own)
    flipped[-1] ^= 1
    for wrong in ((tmp_path / "q" / "tables.safetensors").read_bytes(), bytes(flipped), own[:-8]):
        tables.write_bytes(wrong)
        for load in (Plan.load, sign_again):
            with pytest.raises(InputError, match="tables.safetensors is not what .* was written with: .* another plan"):
                load(tmp_path / "p")
    tables.unlink()
    tables.symlink_to(tmp_path / "q" / "tables.safetensors")
    with pytest.raises(InputError, match="a link out of"):
        Plan.load(tmp_path / "p")


def test_a_plan_of_before_digests_is_read_with_a_word(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "p")
    edit(tmp_path / "p", lambda facts: [facts.pop(key) for key in ("digest", "tables_sha256")])
    assert Plan.load(tmp_path / "p").unchecked == {str(tmp_path / "p"): NO_DIGEST}


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("expert_load", np.zeros((1, 2), np.int64), r"expert_load is I64 \[1, 2\], expected I64"),
        ("expert_load", None, "lacks the tensor expert_load"),
        ("fitted_requests", np.zeros(3, np.int32), r"fitted_requests is I32 \[3\], expected U64 \[3\]"),
        ("schedule.x", np.array([np.nan], np.float32), "schedule.x holds values that are no finite numbers"),
    ],
)
def test_tables_are_what_they_must_be(stored, tmp_path, name, table, message):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(stored, tmp_path / "p")
    edit(tmp_path / "p", lambda facts: [facts.pop(key) for key in ("digest", "tables_sha256")])
    file = tmp_path / "p" / "tables.safetensors"
    tables = load_file(file)
    tables.pop(name, None)
    save_file(tables if table is None else {**tables, name: table}, file)
    with pytest.raises(InputError, match=message):
        Plan.load(tmp_path / "p")
