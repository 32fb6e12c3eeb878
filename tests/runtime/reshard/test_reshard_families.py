"""Every MoE family, stored as the hub stores it, computes the same after its experts were
relabelled at random.

The model is saved, resharded on bytes, loaded again by Transformers, and its logits compared: a
tensor of an expert or a router that stayed behind shows as a large difference, because routing and
experts of tiny_model are far from uniform.
"""

import json
from pathlib import Path

import pytest
from random_plans import random_plan
from tiny_models import FAMILIES, tiny_input_ids, tiny_model

from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.source import open_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def logits(model) -> "torch.Tensor":
    with torch.no_grad():
        output = model(input_ids=tiny_input_ids(model.config.model_type))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_the_same_after_relabelling(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    plan = random_plan(tmp_path / "source")
    result = reshard_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    relabelled = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    before, after = logits(model), logits(relabelled)
    assert result.experts_moved > 0
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)

    sidecar = json.loads((tmp_path / "out" / "semmoe.json").read_text())
    assert sidecar["plan"]["fingerprint"] == plan.fingerprint

    undo_reshard(tmp_path / "out", tmp_path / "back")
    for shard in open_checkpoint(tmp_path / "source").shards:
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.path.read_bytes()
    assert not (tmp_path / "back" / "semmoe.json").exists()
