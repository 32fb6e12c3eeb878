"""A schedule's tables on a device read the features that the solvers do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.runtime.serving.home_tables import Chosen, HomeTables
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.placement import Placement
from semmoe.solvers.schedule.features import Seen
from semmoe.solvers.schedule.fit import fit_schedule

LAYERS, EXPERTS, TOP_K = 5, 8, 2


@pytest.mark.parametrize("is_prompt", [True, False])
def test_the_device_has_features_in_the_same_places(tmp_path: Path, is_prompt: bool):
    sizes = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=8, tokens_per_request=20, **sizes))  # pyright: ignore
    batch = RoutingTrace.open(tmp_path / "t").load()
    placement = Placement.from_ranks(place_contiguous(LAYERS, EXPERTS, 2), 2)
    schedule = fit_schedule(batch, placement, seed=0)
    tables = HomeTables.of(schedule, placement, TOP_K, torch.device("cpu"))
    seen = Seen.of(batch, EXPERTS, np.flatnonzero(batch.is_prompt_T == is_prompt))
    rows = len(seen.chosen_TLK)
    known = tables.known(np.zeros(rows, np.int32), np.zeros(rows, np.int32), seen.position_ids_TC)
    nothing_T1K = np.full((rows, 1, TOP_K), EXPERTS)
    previous_TLK = np.concatenate([nothing_T1K, seen.previous_TLK], axis=1)
    chosen = Chosen(*(torch.from_numpy(ids.astype(np.int32)) for ids in (seen.chosen_TLK, previous_TLK)))
    for layer in range(LAYERS):
        ids_TX = tables.context_ids_TX(layer, known, chosen, is_prompt=is_prompt)
        np.testing.assert_array_equal(ids_TX, schedule.context.places.ids_TX(layer, seen))
