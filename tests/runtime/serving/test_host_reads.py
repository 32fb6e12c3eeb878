"""Attention-TP with tensors that have no values: between the layers the host reads nothing but
the split sizes of the expert exchange."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from random_plans import random_plan
from shapes_only import emptied, shapes_only
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from semmoe.profiles.capture.loading import find_model
from semmoe.profiles.counts import profile_traces
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace, TraceBatch
from semmoe.runtime.ranks.group import Group
from semmoe.runtime.serving import weight_learner
from semmoe.runtime.serving.tensor_parallel import ShuffledModel
from semmoe.runtime.serving.token_homes import TokenHomes
from semmoe.runtime.transformers.attention_heads import keep_heads
from semmoe.runtime.transformers.placed_model import load_placed
from semmoe.runtime.transformers.rank_parts import rank_checkpoints
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.fit import fit_schedule
from semmoe.solvers.schedule.token_fit import MAX_CANDIDATES

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[Group]:
    """Rank 0 of two; the collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Group(0, 2, CPU, "fake", dist.group.WORLD)  # pyright: ignore
    dist.destroy_process_group()


def traced(folder: Path, num_layers: int, num_experts: int, top_k: int) -> TraceBatch:
    sizes = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    write_synthetic(folder, SyntheticWorld(**sizes, num_requests=12, tokens_per_request=10))  # pyright: ignore
    return profile_traces([RoutingTrace.open(folder)], seed=0).sample


@pytest.mark.parametrize("is_prompt", [True, False])
@pytest.mark.parametrize("predict", ["context", "learning", "table", "paper", "none"])
@pytest.mark.parametrize("ranks", [2, 16])
def test_homes_are_predicted_without_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Group, ranks: int, predict: str, is_prompt: bool
) -> None:
    monkeypatch.setattr(weight_learner, "LEARN_EVERY", 7)  # a step with every batch
    batch = traced(tmp_path / "t", 3, 16, 2)
    assert (ranks > MAX_CANDIDATES) == (ranks == 16)  # tables that store some ranks only
    experts_LRS = np.stack([np.random.default_rng(i).permutation(16).reshape(ranks, -1) for i in range(3)])
    placement = Placement(experts_LRS.astype(np.int32), 16)
    logical_LP = placement.physical_to_logical_LP
    schedule, put_on = fit_schedule(batch, placement, seed=0), {"group": group, "device": CPU}
    homes = TokenHomes(predict, schedule, placement, 2, logical_LP=logical_LP, **put_on)  # pyright: ignore
    request_T = np.repeat([0, 1], [4, 3]) if is_prompt else np.arange(7)
    for _ in range(2):  # the second batch follows the first
        homes.begin(np.arange(7), request_T, is_prompt=is_prompt)
        without_values = deepcopy(homes, {id(group): group})
        with shapes_only():
            emptied(without_values)
            for layer in (0, 1, 2, None):
                slices = without_values.slices(layer)
                assert isinstance(slices.token_P, FakeTensor) and len(slices.token_P) == ranks * -(-7 // ranks)
                if layer is not None:
                    without_values.record(layer, torch.zeros((7, 2), dtype=torch.int16))
            without_values.finish()
        for layer in (0, 1, 2):
            homes.slices(layer)
            homes.record(layer, torch.zeros((7, 2), dtype=torch.int16))
        homes.finish()


def test_a_layer_reads_the_split_sizes_only(tmp_path: Path, group: Group) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "m")
    plan = random_plan(tmp_path / "m", grouped=False)
    source, checkpoint = find_model(str(tmp_path / "m")), rank_checkpoints(tmp_path / "m", plan)[0]
    placed: Any = load_placed(source, tmp_path / "m", checkpoint, plan, group, dtype="bfloat16")
    placement = plan.placement
    batch = traced(tmp_path / "t", placement.num_layers, placement.num_experts, plan.model.top_k)
    schedule = fit_schedule(batch, plan.placement, seed=0)
    homes = TokenHomes("context", schedule, plan.placement, plan.model.top_k, device=CPU)
    shuffled = ShuffledModel(placed, homes)
    for layer in placed.model.model.layers:
        keep_heads(layer.self_attn, 0, 2, "a layer")
    # 2 rows of 3 positions, the first of which is padding in one of them: 5 tokens, 3 places on
    # each rank.
    shuffled.begin(np.arange(6).reshape(2, 3), np.arange(1, 6), [0, 1], is_prompt=True)
    hidden_BSD = torch.zeros((2, 3, placed.layers[0].hidden_size), dtype=torch.bfloat16)
    named = {
        "position_embeddings": placed.model.model.rotary_emb(hidden_BSD, torch.arange(3)[None].expand(2, -1)),
        "attention_mask": torch.zeros((2, 1, 3, 3), dtype=torch.bfloat16),
    }
    # Of rank 0's choices it serves 3 and rank 1 serves 3, from 2 rows; rank 1 sends 1 row with 1
    # choice.
    sizes_6R = [[2, 2], [3, 3], [3, 3], [2, 1], [3, 1], [2, 2]]
    num_layers = plan.placement.num_layers
    with shapes_only(num_layers * np.array(sizes_6R).ravel().tolist()) as left:
        emptied(placed.model)
        emptied(homes)
        for expert_layer in placed.layers:
            emptied(expert_layer.tables)
        shuffled.valid_T = emptied(shuffled.valid_T)
        hidden_BSD, named = emptied(hidden_BSD), emptied(named)
        for number, layer in enumerate(placed.model.model.layers):
            hidden_BSD = shuffled.run_layer(layer, number, f"layer {number}", hidden_BSD, named)
            assert len(left) == (num_layers - 1 - number) * np.size(sizes_6R)
        assert hidden_BSD.shape == (2, 3, placed.layers[0].hidden_size) and isinstance(hidden_BSD, FakeTensor)
    assert placed.state.counters.tokens_L.tolist() == [3] * num_layers


@pytest.mark.parametrize(
    "read",
    [
        lambda rows: rows.sum().item(),
        lambda rows: rows.tolist(),
        lambda rows: rows.cpu(),
        lambda rows: rows.to("cpu"),
        lambda rows: rows.numpy(),
        lambda rows: rows.nonzero(),
        lambda rows: rows[rows > 0],
        lambda rows: bool(rows.any()),
        lambda rows: rows + torch.from_numpy(np.ones(3)),
        lambda rows: rows + torch.tensor([1, 2, 3]),
    ],
)
def test_reads_and_copies_are_noticed(read: Any) -> None:
    with shapes_only(), pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
        read(torch.zeros(3))
