"""A placed model is compared with its own experts before it serves: slots in a wrong order are
refused in one line, alike on all ranks."""

from pathlib import Path

import numpy as np
import pytest
from cases import rank_cases
from tiny_models import tiny_model

from semmoe.runtime.layer.reference import counted_slots_LE
from semmoe.runtime.ranks.launch import launch

FAMILIES = ["qwen3_moe", "gpt_oss"]  # a key for each expert; all experts in one tensor


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_wrong_slot_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
    told = launch(rank_cases.probe_wrong_orders, (str(tmp_path), FAMILIES, replicas), 2)
    assert len(told) == 2 * 2 * 3
    for (family, dtype, what), by_rank in told.items():
        assert by_rank[0] == by_rank[1]
        if what == "right":
            assert by_rank[0] == "", (family, dtype)
        else:
            begin = f"{family}: layer 1 (model.layers.1.mlp.experts) gives other values through the exchange than its"
            assert by_rank[0].startswith(begin) and "\n" not in by_rank[0], (dtype, by_rank[0])


def test_one_slot_answers_for_each_expert() -> None:
    held_RLS = np.array([[[2, 0, 2]], [[1, 0, -1]]])  # expert 0 on both ranks, 2 twice on one, 3 nowhere
    assert counted_slots_LE(held_RLS, 0, 4).tolist() == [[1, -1, 0, -1, -1]]
    assert counted_slots_LE(held_RLS, 1, 4).tolist() == [[-1, 0, -1, -1, -1]]
