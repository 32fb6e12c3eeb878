"""`semmoe trace --hash-layers` of a checkpoint that Transformers does not know: nothing is run."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from semmoe.commands.trace_import import copy_hash_layers


def test_hash_tables_of_an_unknown_model(tmp_path):
    table_VK = np.random.default_rng(0).integers(0, 16, (97, 4))
    facts = {"model_type": "nobody_knows_it", "n_routed_experts": 16, "num_experts_per_tok": 4}
    save_file({"model.layers.1.mlp.gate.tid2eid": table_VK}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**facts, "num_hidden_layers": 3, "first_k_dense_replace": 1}))
    assert copy_hash_layers(str(tmp_path), tmp_path / "out.safetensors", None)["layers"] == 1
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["layer.0"], table_VK)
