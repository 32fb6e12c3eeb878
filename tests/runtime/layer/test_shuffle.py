"""Attention-TP without ranks: slices, heads and online homes, by hand and against the simulation
that plans are scored with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_plans import random_plan
from tiny_models import tiny_model

from semmoe.profiles.counts import profile_traces
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.serving.equal_slices import contiguous_slices, equal_slices, slices_by_home
from semmoe.runtime.serving.token_homes import TokenHomes, make_homes
from semmoe.runtime.transformers.attention_heads import heads_of_rank, keep_heads, key_heads
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.features import NUM_POSITION_IDS
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.simulate import TP_SCHEDULES
from semmoe.solvers.schedule.slices import assign_equal_slices

CPU = torch.device("cpu")


def test_slices_are_sorted_by_home_and_keep_the_order_inside() -> None:
    slices = slices_by_home(torch.tensor([1, 0, 1, 3, 0]), 4)
    assert slices.places == 2 and slices.empty_P is not None
    assert slices.token_P.tolist() == [1, 4, 0, 2, 0, 0, 3, 0]
    assert slices.empty_P.tolist() == [False, False, False, False, True, True, False, True]
    assert slices.place_T.tolist() == [2, 0, 3, 6, 1]
    assert [slices.token_P[slices.of_rank(rank)].tolist() for rank in (0, 1)] == [[1, 4], [0, 2]]


def test_contiguous_slices_are_equal_runs() -> None:
    slices = contiguous_slices(8, 4, CPU)
    assert slices.token_P.tolist() == slices.place_T.tolist() == list(range(8)) and slices.empty_P is None
    slices = contiguous_slices(5, 4, CPU)
    assert slices.token_P.tolist() == [0, 1, 2, 3, 4, 0, 0, 0] and slices.empty_P is not None
    assert slices.empty_P.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 9])
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 61, 512])
def test_slices_are_those_of_the_evaluator(num_tokens: int, num_ranks: int) -> None:
    rng = np.random.default_rng(num_tokens + num_ranks)
    for scale in (0.01, 1.0, 300.0):
        # A third of the tokens wants the same rank, so that slices overflow.
        scores_TR = rng.dirichlet(np.ones(num_ranks) * 0.5, num_tokens).astype(np.float32)
        scores_TR[: num_tokens // 3, -1] += 1
        slices = equal_slices(torch.from_numpy(scores_TR * np.float32(scale)) + 7)
        home_T = assign_equal_slices(scores_TR * np.float32(scale))
        assert (slices.place_T // slices.places).tolist() == home_T.tolist()
        torch.testing.assert_close(slices.token_P[slices.place_T], torch.arange(num_tokens))
    even = equal_slices(torch.full((num_tokens, num_ranks), -3.5))
    assert sorted(set(even.place_T.tolist())) == sorted(even.place_T.tolist())


def test_heads_of_ranks() -> None:
    assert [heads_of_rank(6, rank, 4) for rank in range(4)] == [[0, 1], [2, 3], [4], [5]]
    assert key_heads([0, 1, 2, 3], 2) == ([0, 1], 2)  # two keys, each shared by two
    assert key_heads([4], 2) == ([2], 1)
    assert key_heads([0, 1, 2], 2) == ([0, 0, 1], 1)  # uneven: a copy for every query head


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe"])
def test_partial_sums_of_heads_add_up_to_the_attention(family: str) -> None:
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for rank in (None, 0, 1, 2):  # 4 heads over 3 ranks: 2, 1, 1
        model = tiny_model(family)
        attention = model.model.layers[0].self_attn
        if rank is not None:
            keep_heads(attention, rank, 3, "layer 0")
        positions = torch.arange(9)[None].expand(2, -1)
        with torch.inference_mode():
            embeddings = model.model.rotary_emb(hidden, positions)
            mask = torch.full((9, 9), float("-inf")).triu(1)[None, None].expand(2, 1, 9, 9)
            outputs.append(attention(hidden, position_embeddings=embeddings, attention_mask=mask)[0])
    torch.testing.assert_close(sum(outputs[1:]), outputs[0], atol=1e-5, rtol=1e-5)


def test_more_ranks_than_heads_is_refused() -> None:
    with pytest.raises(InputError, match="layer 0 has 4 heads, fewer than the 5 ranks"):
        keep_heads(tiny_model("qwen3_moe").model.layers[0].self_attn, 0, 5, "layer 0")


@pytest.mark.parametrize("predict", ["context", "table", "paper"])
def test_online_scores_are_those_of_the_simulation(tmp_path: Path, predict: str) -> None:
    write_synthetic(
        tmp_path / "t", SyntheticWorld(num_layers=3, num_experts=8, top_k=2, num_requests=12, tokens_per_request=10)
    )
    batch = profile_traces([RoutingTrace.open(tmp_path / "t")], seed=0).sample
    placement = Placement.from_ranks(place_contiguous(3, 8, 2), 2)
    schedule = fit_schedule(batch, placement, seed=0)
    expected = TP_SCHEDULES[f"tp-{predict}"](batch, placement, schedule, np.random.default_rng(0))
    homes = TokenHomes(predict, schedule, placement, 2, device=CPU)
    prompt = batch.is_prompt_T
    for row in range(batch.num_requests):
        rows = np.arange(batch.starts_B1[row], batch.starts_B1[row + 1])
        # The prompt in one batch, then one token after the other.
        for part in [rows[prompt[rows]], *rows[~prompt[rows], None]]:
            homes.begin(batch.token_ids_T[part], np.full(len(part), row), is_prompt=bool(prompt[part[0]]))
            for layer in range(3):
                np.testing.assert_allclose(homes.scores_TR(layer), expected(layer)[part], atol=1e-6)
                homes.record(layer, torch.from_numpy(batch.expert_ids_TLK[part, layer].astype(np.int16)))
            homes.finish()
    homes.forget(list(range(batch.num_requests)))
    assert homes.memory == {}


def test_a_running_token_without_its_prompt_has_no_position(tmp_path: Path) -> None:
    write_synthetic(
        tmp_path / "t", SyntheticWorld(num_layers=3, num_experts=8, top_k=2, num_requests=12, tokens_per_request=10)
    )
    batch = profile_traces([RoutingTrace.open(tmp_path / "t")], seed=0).sample
    placement = Placement.from_ranks(place_contiguous(3, 8, 2), 2)
    homes = TokenHomes("context", fit_schedule(batch, placement, seed=0), placement, 2, device=CPU)
    for _ in range(2):  # still none after its first batch
        homes.begin(np.array([4, 5]), np.array([0, 1]), is_prompt=False)
        assert (homes._position_ids_TC == NUM_POSITION_IDS).all()
        homes.finish()


def test_predictions_need_tables(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "m")
    plan = random_plan(tmp_path / "m")
    with pytest.raises(InputError, match="--predict context: the plan holds no schedule"):
        make_homes("context", plan, relabelled=False, device=CPU)
    with pytest.raises(InputError, match="--predict best: expected one of context, learning, table, paper, none"):
        make_homes("best", plan, relabelled=False, device=CPU)
    homes = make_homes("none", plan, relabelled=False, device=CPU)
    homes.begin(np.arange(5), np.zeros(5, np.int64), is_prompt=True)
    assert homes.slices(0).token_P.tolist() == [0, 1, 2, 3, 4, 0]
