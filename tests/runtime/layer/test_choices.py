"""The rules that choose copies token by token are the evaluator's, choice for choice."""

import numpy as np
import pytest
import torch

from semmoe.runtime.layer.choices import chosen_copies
from semmoe.runtime.layer.tables import layer_tables
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.place.baselines import baselines
from semmoe.solvers.place.replicas import REPLICA_RULES
from semmoe.solvers.placement import Topology
from semmoe.solvers.slots import Slots


@pytest.mark.parametrize("rule", REPLICA_RULES)
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(8, 3, 4), (6, 4, 2), (4, 5, 1), (10, 5, 6)])
def test_a_rank_chooses_as_the_evaluator_counts(rule: str, experts: int, ranks: int, slots: int) -> None:
    rng = np.random.default_rng(experts)
    load_LE = rng.integers(1, 50, (2, experts))
    placement = baselines(load_LE, Topology(ranks), slots=Slots(slots))["load"]
    deployment = Deployment(placement, load_LE, Topology(ranks), replica_choice=rule)
    ids_TK = np.stack([rng.permutation(experts + 1)[:3] for _ in range(40)])  # the id E among them
    for rank in range(ranks):
        options = {"moving": deployment.moving}
        tables_L = layer_tables(placement, deployment.serving_LRE, rank, ["a", "b"], torch.device("cpu"), **options)
        for layer, tables in enumerate(tables_L):
            rank_TK, slot_TK = chosen_copies(tables, torch.from_numpy(ids_TK))
            expected_TK = np.pad(deployment.serving_LRE[layer], ((0, 0), (0, 1)), constant_values=ranks)[rank][ids_TK]
            if deployment.moving is not None:
                expected_TK = deployment.moving.ranks_TK(layer, ids_TK, np.full(40, rank))
            assert rank_TK.tolist() == expected_TK.tolist()
            routed = ids_TK < experts
            held_TK = placement.experts_LRS[layer][rank_TK.numpy()[routed], slot_TK.numpy()[routed]]
            assert held_TK.tolist() == ids_TK[routed].tolist()
        assert chosen_copies(tables, torch.from_numpy(ids_TK[:0]))[0].shape == (0, 3)
