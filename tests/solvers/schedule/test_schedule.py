"""Schedules on planted structure: what is found, what is never read, what is stored; and how the
simulation keeps capacities."""

from dataclasses import replace

import numpy as np
import pytest

from semmoe.profiles import mapped as mapped_module
from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import rows_of, select_requests
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceBatch, TraceInfo, concat_batches
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule import fit, learning, token_fit
from semmoe.solvers.schedule import simulate as simulate_module
from semmoe.solvers.schedule.context import context_scores_TR, default_depth
from semmoe.solvers.schedule.features import NUM_POSITION_IDS, Seen, position_ids_TC, previous_experts_TLK
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.learning import LEARN_EVERY, RIDGE, learned_scores_TR, request_groups
from semmoe.solvers.schedule.paper_table import build_sequence_table, needed_rank_T, paper_scores_TR
from semmoe.solvers.schedule.request_scorer import fit_request_scorer, request_shares_BR
from semmoe.solvers.schedule.schedule import PREFIX, Schedule
from semmoe.solvers.schedule.simulate import (
    SCHEDULES,
    Setting,
    available_schedules,
    rows_that_run,
    simulate,
    simulate_rows,
)
from semmoe.solvers.schedule.token_fit import build_token_table
from semmoe.solvers.schedule.token_table import previous_token_ids_T

RANKS = 4
SIZES = {"batch_tokens": 128, "window": 40, "seed": 0}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[TraceBatch, TraceBatch, Placement]:
    """Training and held-out requests of a synthetic trace, and its best placement with labels
    that agree over layers."""
    path = tmp_path_factory.mktemp("schedule") / "trace"
    group_of_LE = write_synthetic(path, SyntheticWorld(num_requests=120, vocab_size=300, noise=0.1, seed=4))
    batch = RoutingTrace.open(path).load()
    train_B = np.arange(batch.num_requests) // 4 % 2 == 0  # domains take turns of four
    placement = Placement.from_ranks(group_of_LE, RANKS)
    return select_requests(batch, train_B), select_requests(batch, ~train_B), placement


@pytest.fixture(scope="module")
def schedule(planted) -> Schedule:
    train, _, placement = planted
    return fit_schedule(train, placement, seed=0)


def local_share(batch: TraceBatch, placement: Placement, homes_TL: np.ndarray) -> float:
    layers = np.arange(placement.num_layers)[None, :, None]
    return float(placement.hosts_LER[layers, batch.expert_ids_TLK, homes_TL[:, :, None]].mean())


def test_better_informed_schedules_are_more_local(planted, schedule):
    _, held_out, placement = planted
    assert available_schedules(schedule) == list(SCHEDULES)
    found = {
        n: local_share(held_out, placement, simulate(n, held_out, placement, schedule, **SIZES).homes_TL)
        for n in SCHEDULES
    }
    assert found["random"] == pytest.approx(1 / RANKS, abs=0.02)
    assert found["tp-table"] > 0.65  # 90 % of the tokens follow their id's group, and slices are equal
    assert found["tp-context"] >= found["tp-table"] - 0.01
    assert found["tp-context"] > found["tp-paper"] - 0.01 > 0.5
    assert found["tp-oracle"] >= found["tp-context"]
    assert found["dp-oracle"] >= found["dp-scorer"] > found["dp-roundrobin"] + 0.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_capacities_hold_in_every_batch_and_window(planted, schedule, name):
    _, held_out, placement = planted
    homes_TL, imbalance = simulate(name, held_out, placement, schedule, **SIZES)
    assert homes_TL.shape == (held_out.num_tokens, placement.num_layers)
    assert homes_TL.min() >= 0 and homes_TL.max() < RANKS
    if name.startswith("dp-"):
        assert (homes_TL == homes_TL[:, :1]).all()
        first_T = np.repeat(homes_TL[held_out.starts_B1[:-1], 0], np.diff(held_out.starts_B1))
        np.testing.assert_array_equal(homes_TL[:, 0], first_T)
        assert imbalance <= 1.2
    else:
        assert imbalance <= RANKS * np.ceil(120 / RANKS) / 120  # slices of the smallest batch, rounded up
    again = simulate(name, held_out, placement, schedule, **SIZES)
    np.testing.assert_array_equal(homes_TL, again.homes_TL)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("tp-")])
def test_some_rows_run_as_a_batch_of_fewer_tokens_does(planted, schedule, name, monkeypatch):
    _, held_out, placement = planted
    assert rows_that_run(name, held_out, placement, 0) is None  # small traces are looked at whole
    monkeypatch.setattr(simulate_module, "MOST_CELLS", held_out.num_tokens // 2 * placement.num_layers * RANKS)
    assert rows_that_run("dp-scorer", held_out, placement, 0) is None
    rows = rows_that_run(name, held_out, placement, 0)
    assert rows is not None and len(rows) == held_out.num_tokens // 2 and (np.diff(rows) > 0).all()
    homes_TL, imbalance = simulate_rows(name, held_out, placement, schedule, Setting(128, 40), rows)
    assert homes_TL.shape == (len(rows), placement.num_layers) and imbalance < 1.1
    some = rows_of(held_out, np.isin(np.arange(held_out.num_tokens), rows))
    np.testing.assert_array_equal(some.request_of_T, held_out.request_of_T[rows])
    whole_TL = simulate(name, held_out, placement, schedule, **SIZES).homes_TL
    shares = local_share(some, placement, homes_TL), local_share(held_out, placement, whole_TL)
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_copies_are_counted_by_rank_over_many_ranks_as_by_expert(planted, monkeypatch):
    train, _, _ = planted
    rng = np.random.default_rng(0)
    hosts_LER = np.zeros((4, 32, 40), bool)
    hosts_LER[:, np.arange(32), np.arange(32)] = True
    hosts_LER[:, rng.integers(0, 32, 30), rng.integers(0, 40, 30)] = True
    by_rank = build_token_table(train, hosts_LER)
    monkeypatch.setattr(token_fit, "MANY_RANKS", 40)
    by_expert = build_token_table(train, hosts_LER)
    np.testing.assert_allclose(by_rank.own.shares_LUC, by_expert.own.shares_LUC, atol=1e-3)
    np.testing.assert_allclose(by_rank.after.shares_LUC, by_expert.after.shares_LUC, atol=1e-3)
    np.testing.assert_allclose(by_rank.rare_LR, by_expert.rare_LR, atol=1e-6)


def test_context_reads_only_what_is_known_before_the_layer(planted, schedule):
    _, held_out, placement = planted
    seen = Seen.of(held_out, placement.num_experts, np.arange(200))
    is_prompt_T = seen.is_prompt_T
    assert is_prompt_T.any() and not is_prompt_T.all()
    shares_TR = np.zeros((200, RANKS), np.float32)
    layer = 2
    scores_TR = context_scores_TR(schedule.context, layer, shares_TR, seen)
    future_TLK = seen.chosen_TLK.copy()
    future_TLK[:, layer:] = 0
    before_TLK = seen.previous_TLK.copy()
    before_TLK[is_prompt_T, layer:] = 0  # runs in the same pass
    before_TLK[~is_prompt_T, layer + 1 :] = 0
    unread = seen._replace(chosen_TLK=future_TLK, previous_TLK=before_TLK)
    np.testing.assert_array_equal(scores_TR, context_scores_TR(schedule.context, layer, shares_TR, unread))
    past_TLK = seen.chosen_TLK.copy()
    past_TLK[:, layer - 1] = 0
    read = seen._replace(chosen_TLK=past_TLK)
    assert not np.allclose(scores_TR, context_scores_TR(schedule.context, layer, shares_TR, read))


def test_learning_finds_structure_that_training_did_not_have(planted, schedule):
    """Other layers than those of training: the tables mislead, what runs tells."""
    _, held_out, placement = planted
    turned = replace(held_out, expert_ids_TLK=np.ascontiguousarray((held_out.expert_ids_TLK + 5) % 32))
    found = {
        name: local_share(turned, placement, simulate(name, turned, placement, schedule, **SIZES).homes_TL)
        for name in ("tp-context", "tp-learning", "tp-oracle")
    }
    assert found["tp-learning"] > found["tp-context"] + 0.05
    assert found["tp-learning"] <= found["tp-oracle"]


def learnable(num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of features, the plan's scores of ranks, and shares that follow the features."""
    rng = np.random.default_rng(0)
    ids_TX = rng.integers(0, 20, (num_tokens, 3)).astype(np.int32)
    return ids_TX, rng.random((num_tokens, 4)).astype(np.float32), rng.standard_normal((20, 4))[ids_TX].sum(1)


def test_learning_reads_earlier_groups_only():
    ids_TX, scores_TR, served_TR = learnable(300)
    groups = np.array_split(np.random.default_rng(1).permutation(300), 3)
    learned_TR = learned_scores_TR(scores_TR, ids_TX, served_TR, 20, groups)
    np.testing.assert_array_equal(learned_TR[groups[0]], scores_TR[groups[0]])
    assert (learned_TR[groups[1]] != scores_TR[groups[1]]).all()
    other_TR = served_TR.copy()
    other_TR[groups[1]] *= 0.5  # the answer of the second group
    other_TR = learned_scores_TR(scores_TR, ids_TX, other_TR, 20, groups)
    np.testing.assert_array_equal(other_TR[groups[1]], learned_TR[groups[1]])
    assert (other_TR[groups[2]] != learned_TR[groups[2]]).all()


def test_noise_is_not_trusted():
    ids_TX, scores_TR, served_TR = learnable(20_000)
    groups = np.array_split(np.arange(20_000), 20)
    noise_TR = scores_TR + np.random.default_rng(2).standard_normal(scores_TR.shape)
    found = {
        name: np.abs(learned_scores_TR(scores_TR, ids_TX, truth_TR, 20, groups) - scores_TR)[groups[-1]].mean()
        for name, truth_TR in (("noise", noise_TR), ("structure", served_TR))
    }
    assert found["noise"] < 0.02 < 0.5 < found["structure"]


def test_learning_is_ridge_regression_of_what_was_missed(monkeypatch):
    monkeypatch.setattr(learning, "BLOCK_TOKENS", 64)  # pairs of a group are counted in parts
    ids_TX, scores_TR, served_TR = learnable(400)
    features_TF = np.eye(20)[ids_TX].sum(1)
    seen, new = np.arange(300), np.arange(300, 400)
    learned_TR = learned_scores_TR(scores_TR, ids_TX, served_TR, 20, [seen, new])
    gram_FF = features_TF[seen].T @ features_TF[seen] + RIDGE * np.eye(20)
    weights_FR = np.linalg.solve(gram_FF, features_TF[seen].T @ (served_TR - scores_TR)[seen])
    np.testing.assert_allclose(learned_TR[new], scores_TR[new] + features_TF[new] @ weights_FR, atol=1e-5)


def test_groups_are_whole_requests_of_enough_tokens(planted):
    _, held_out, _ = planted
    groups = request_groups(held_out, np.random.default_rng(0))
    assert sorted(np.concatenate(groups).tolist()) == list(range(held_out.num_tokens))
    assert all(len(group) >= LEARN_EVERY for group in groups[:-1]) and len(groups) > 2
    requests = [set(held_out.request_of_T[group].tolist()) for group in groups]
    assert sum(map(len, requests)) == held_out.num_requests  # each in one group


def test_previous_experts_stay_within_the_request(planted):
    train, _, placement = planted
    previous_TLK = previous_experts_TLK(train, placement.num_experts)
    assert (previous_TLK[train.starts_B1[:-1]] == placement.num_experts).all()
    np.testing.assert_array_equal(previous_TLK[1], train.expert_ids_TLK[0])


def test_previous_token_ids_come_from_the_sequence(planted):
    train, _, _ = planted
    previous_T = previous_token_ids_T(train)
    assert previous_T[0] == -1  # the first row is the first token of the sequence
    np.testing.assert_array_equal(previous_T[1:5], train.token_ids_T[:4])
    # A request whose rows begin after its prompt: the last prompt token comes before the first row.
    shifted = replace(train, first_position_B=train.first_position_B + 3)
    assert previous_token_ids_T(shifted)[0] == train.sequence(0)[2]


def test_table_traffic_is_capped_and_unknown_ids_are_spread(planted, schedule):
    train, _, _ = planted
    token = schedule.token
    lookup = token.lookup(token.own.ids_U, np.full(len(token.own.ids_U), -1))
    unknown = token.lookup(np.array([-1, 10**6]), np.array([-1, 10**6]))
    assert (unknown.row_T == -1).all() and (unknown.after_T == -1).all()
    counts_U = np.bincount(np.searchsorted(token.own.ids_U, train.token_ids_T))
    for layer in range(len(token.rare_LR)):
        traffic_R = counts_U @ token.homes_TR(layer, lookup)
        assert traffic_R.max() <= 1.06 * traffic_R.mean()
        np.testing.assert_allclose(token.homes_TR(layer, unknown), 1 / RANKS)


def test_unseen_ids_follow_what_came_before_them():
    # Ids 1..40 are seen once each; those after id 100 need expert 0, those after id 101 expert 3.
    # Id 77 is new.
    follows = np.arange(40) % 2
    pairs = np.stack([100 + follows, 1 + np.arange(40)], axis=1).reshape(-1).astype(np.int32)
    experts = np.stack([np.arange(40) % 4, np.where(follows, 3, 0)], axis=1).reshape(-1, 1, 1).astype(np.uint8)
    batch = one_request(pairs, experts)
    hosts_LER = np.eye(4, dtype=bool)[None]
    table = build_token_table(batch, hosts_LER)
    shares_TR = table.shares_TR(0, table.lookup(np.array([77, 77]), np.array([100, 101])))
    assert shares_TR.argmax(axis=1).tolist() == [0, 3]
    assert shares_TR.max(axis=1).min() > 0.7


def test_embedding_gives_unseen_ids_a_row():
    rng = np.random.default_rng(0)
    embedding_VD = rng.normal(size=(200, 6)).astype(np.float32)
    expert_V = (embedding_VD[:, 0] > 0).astype(np.uint8) * 3
    ids = rng.integers(0, 100, 2000).astype(np.int32)  # ids 100..199 are never seen
    batch = one_request(ids, expert_V[ids].reshape(-1, 1, 1))
    table = build_token_table(batch, np.eye(4, dtype=bool)[None], embedding_VD=embedding_VD)
    unseen = np.arange(100, 200)
    lookup = table.lookup(unseen, np.full(100, -1))
    assert (lookup.row_T >= 0).all() and (table.own.weight_U[lookup.row_T] == 0).all()
    assert (table.shares_TR(0, lookup).argmax(axis=1) == expert_V[unseen]).mean() > 0.85


def test_tables_of_many_ranks_keep_the_best_candidates(planted):
    train, _, _ = planted
    hosts_LER = np.tile(np.eye(32, dtype=bool)[None], (4, 1, 1))
    whole = build_token_table(train, hosts_LER, max_candidates=32)
    cut = build_token_table(train, hosts_LER, max_candidates=6)
    assert cut.own.shares_LUC.shape[2] == 6
    lookup = whole.lookup(train.token_ids_T[:50], np.full(50, -1))
    best_T6 = np.argsort(-whole.own.shares_TR(1, lookup.row_T, whole.rare_LR[1]), axis=1)[:, :3]
    shares_TR = cut.own.shares_TR(1, lookup.row_T, cut.rare_LR[1])
    expected = np.take_along_axis(whole.own.shares_TR(1, lookup.row_T, whole.rare_LR[1]), best_T6, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(shares_TR, best_T6, axis=1), expected)


def test_a_schedule_survives_the_plan_file(planted, schedule):
    _, held_out, placement = planted
    tables = schedule.to_tables()
    assert all(name.startswith(PREFIX) for name in tables)
    again = Schedule.from_tables({"expert_load": np.zeros(1), **tables})
    assert again is not None
    for name in ("tp-context", "dp-scorer"):
        homes = [simulate(name, held_out, placement, s, **SIZES).homes_TL for s in (schedule, again)]
        np.testing.assert_array_equal(*homes)
    assert Schedule.from_tables({"expert_load": np.zeros(1)}) is None
    # A plan written before positions were read.
    del tables["schedule.context.position_LQR"]
    assert not Schedule.from_tables(tables).context.position_LQR.any()
    del tables["schedule.context.bias_LR"]
    with pytest.raises(InputError, match=r"lacks the table schedule\.context\.bias_LR"):
        Schedule.from_tables(tables)


@pytest.mark.parametrize("where", ["sent", "mapped"])
def test_layers_fitted_apart_give_the_same_schedule(planted, schedule, monkeypatch, where):
    train, _, placement = planted
    if where == "mapped":  # as rows of a large table are
        monkeypatch.setattr(mapped_module, "SMALL_BYTES", 0)
    whole = schedule.to_tables()
    monkeypatch.setattr(fit, "SCORER_LAYERS", 2)  # the first process gets one layer of four
    monkeypatch.setattr(fit, "SMALL_TASK", 1)
    for name, array in fit_schedule(train, placement, seed=0, processes=2).to_tables().items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_a_trace_without_token_ids_is_scheduled_by_context(planted):
    train, held_out, placement = planted
    hidden = [
        replace(
            b,
            token_ids_T=np.full(b.num_tokens, -1, np.int32),
            sequences=np.zeros(0, np.int32),
            sequence_starts_B1=0 * b.starts_B1,
        )
        for b in (train, held_out)
    ]
    schedule = fit_schedule(hidden[0], placement, seed=0)
    assert available_schedules(schedule) == [
        "random",
        "dp-roundrobin",
        "dp-oracle",
        "tp-context",
        "tp-learning",
        "tp-oracle",
    ]
    homes_TL = simulate("tp-context", hidden[1], placement, schedule, **SIZES).homes_TL
    assert local_share(hidden[1], placement, homes_TL[:, :]) > 0.55


def test_position_ids_name_the_ends_of_a_prompt_and_its_length():
    nothing = NUM_POSITION_IDS
    found = position_ids_TC(np.array([0, 1, 19, 20, 63, 64, -1]), np.array([20, 20, 20, 20, 0, 2000, 0]))
    assert found[:, 0].tolist() == [0, 1, 19, 20, 63, nothing, nothing]
    assert found[:, 1].tolist() == [nothing, nothing, 64, nothing, nothing, nothing, nothing]
    assert position_ids_TC(np.arange(4), np.full(4, 20))[:, 1].tolist() == [nothing] * 4
    assert position_ids_TC(np.arange(16, 20), np.full(4, 20))[:, 1].tolist() == [67, 66, 65, 64]
    assert found[:, 2].tolist() == [84, 84, 84, 84, nothing, 91, nothing]


def test_the_first_layer_of_a_trace_without_token_ids_learns_templates():
    # Every request opens with the same four tokens; the rest are drawn anew.
    rng = np.random.default_rng(0)
    lengths_B = rng.integers(8, 13, 60)
    requests = []
    for length in lengths_B:
        experts = rng.integers(0, 4, (length, 1, 1))
        experts[:4, 0, 0] = [3, 1, 2, 0]
        requests.append(experts)
    starts_B1 = np.concatenate([[0], np.cumsum(lengths_B)])
    total = int(starts_B1[-1])
    batch = replace(
        one_request(np.full(total, -1, np.int32), np.concatenate(requests).astype(np.uint8)),
        request_ids=[f"r{b}" for b in range(60)],
        domains=[""] * 60,
        starts_B1=starts_B1,
        is_prompt_T=np.ones(total, bool),
        num_prompt_tokens_B=lengths_B,
        first_position_B=np.zeros(60, np.int64),
        sequence_starts_B1=np.zeros(61, np.int64),
        sequences=np.zeros(0, np.int32),
    )
    train, held_out = (select_requests(batch, np.arange(60) % 2 == part) for part in (0, 1))
    placement = Placement.from_ranks(np.arange(4)[None], 4)
    homes_TL = simulate("tp-context", held_out, placement, fit_schedule(train, placement, seed=0), **SIZES).homes_TL
    template_T = (np.arange(held_out.num_tokens) - held_out.starts_B1[held_out.request_of_T]) < 4
    local_T = homes_TL[:, 0] == held_out.expert_ids_TLK[:, 0, 0]
    assert local_T[template_T].mean() > 0.95
    assert local_T[~template_T].mean() < 0.4


def test_a_placement_of_another_model_is_refused(planted):
    train, _, _ = planted
    small = Placement.from_ranks(np.tile(np.repeat(np.arange(2), 2), (4, 1)), 2)
    with pytest.raises(InputError, match="4 layers of 4 experts"):
        fit_schedule(train, small, seed=0)


def test_unknown_schedules_and_sizes_are_refused(planted, schedule):
    _, held_out, placement = planted
    with pytest.raises(InputError, match="'tp-magic' is none of random"):
        simulate("tp-magic", held_out, placement, schedule, **SIZES)
    with pytest.raises(InputError, match="0 tokens a batch"):
        simulate("tp-table", held_out, placement, schedule, batch_tokens=0, window=1, seed=0)


def test_the_scorer_predicts_the_ranks_of_new_prompts(planted):
    train, held_out, placement = planted
    scorer = fit_request_scorer(train, placement.hosts_LER, seed=0)
    scores_BR = scorer.scores_BR([held_out.prompt(b) for b in range(held_out.num_requests)])
    best_B = request_shares_BR(held_out, placement.hosts_LER).argmax(axis=1)
    assert (scores_BR.argmax(axis=1) == best_B).mean() > 0.9
    assert (scorer.scores_BR([np.array([10**6]), np.zeros(0, np.int32)]) == 0).all()


def test_the_device_sequence_table_counts_where_tokens_go_next():
    # One expert per rank. Tokens on rank 1, then 0, go to rank 1; one of four goes elsewhere.
    expert_ids_TLK = np.array([[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]], np.uint8)[:, :, None]
    table = build_sequence_table(expert_ids_TLK, np.tile(np.eye(2, dtype=bool)[None], (3, 1, 1)))
    assert table.rank_LRR[2, 0, 1] == 1 and table.confidence_LRR[2, 0, 1] == 0.75
    assert table.rank_LRR[2, 0, 0] == 0 and table.confidence_LRR[2, 0, 0] == 1
    assert (table.confidence_LRR[:2] == 0).all() and table.confidence_LRR[2, 1, 1] == 0


def test_the_paper_follows_the_table_only_where_it_is_the_more_confident():
    table_TR = np.array([[0.7, 0.3], [0.7, 0.3], [0.9, 0.1]])
    scores_TR = paper_scores_TR(table_TR, np.array([True, True, False]), np.array([1, 1, 1]), np.array([0.6, 0.8, 0.1]))
    assert scores_TR.argmax(axis=1).tolist() == [0, 1, 1]


def test_needed_rank_ignores_empty_slots():
    hosts_ER = np.array([[True, False], [False, True], [False, True]])
    assert needed_rank_T(np.array([[0, 3], [1, 2], [3, 2]]), hosts_ER).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("layers", "experts", "depth"), [(24, 32, 23), (26, 64, 24), (58, 256, 6), (58, 512, 3), (1, 8, 1)]
)
def test_depth_is_bounded_by_the_size_of_the_equations(layers, experts, depth):
    assert default_depth(layers, experts) == depth


def one_request(token_ids: np.ndarray, expert_ids_TLK: np.ndarray) -> TraceBatch:
    """One request of generated tokens whose ids are all known."""
    ends = np.array([0, len(token_ids)], np.int64)
    return TraceBatch(
        request_ids=["only"],
        domains=[""],
        starts_B1=ends,
        expert_ids_TLK=expert_ids_TLK,
        token_ids_T=token_ids,
        is_prompt_T=np.zeros(len(token_ids), bool),
        num_prompt_tokens_B=np.zeros(1, np.int64),
        first_position_B=np.zeros(1, np.int64),
        sequence_starts_B1=ends,
        sequences=token_ids,
    )


def test_prompts_are_scored_by_what_they_say_and_not_by_how_often():
    # Ids 0-9 and 10-19 go with two topics; id 20 is in every prompt.
    rng = np.random.default_rng(0)
    requests = []
    for b in range(40):
        topic = b % 2
        prompt = np.append(20, 10 * topic + rng.integers(0, 10, 6))
        sequence = np.concatenate([prompt, 10 * topic + rng.integers(0, 10, 12)])
        request = one_request(sequence.astype(np.int32), np.full((len(sequence), 1, 1), topic, np.uint8))
        requests.append(replace(request, num_prompt_tokens_B=np.full(1, 7)))
    batch = concat_batches(requests, TraceInfo("two topics", 1, 2, 1, (0,)))
    hosts_LER = np.eye(2, dtype=bool)[None]
    scorer = fit_request_scorer(batch, hosts_LER, seed=0)
    prompts = [
        np.array([20, 9, 2]),
        np.array([20, 19, 15]),
        np.array([20, 3, 99]),
        np.array([98]),
        np.array([], np.int32),
    ]
    scores_BR = scorer.scores_BR(prompts)
    assert scores_BR.argmax(axis=1)[:3].tolist() == [0, 1, 0]
    assert not scores_BR[3:].any()  # nothing known, nothing said
    np.testing.assert_allclose(scorer.scores_BR(prompts[1:2])[0], scores_BR[1], atol=1e-12)
    np.testing.assert_allclose(scorer.scores_BR([np.tile(prompts[2], 2)])[0], scores_BR[2], atol=1e-12)
