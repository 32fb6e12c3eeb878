"""The directory that a plug-in reads: written by export, whole or not at all, with vectors that
hold the formula of docs/formats.md."""

import json
from dataclasses import replace

import numpy as np
import pytest
from engine_plans import served_plan
from safetensors.numpy import load_file
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.options import ExportKind, MapKind
from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.write import KINDS
from semmoe.solvers.plan import Plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    served_plan(root).save(root / "p")
    served_plan(root, replicas=1).save(root / "copies")
    return root


def export(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_choices_equal_the_kinds():
    assert [kind.value for kind in ExportKind] == [*(kind.value for kind in MapKind), *KINDS]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_command_writes_what_the_plan_says(saved, tmp_path, kind):
    result = export(saved / "p", "--to", kind, "-o", tmp_path / "x", "--json")
    assert result.exit_code == 0, result.output
    plan, read = Plan.load(saved / "p"), read_plan_facts(tmp_path / "x")
    np.testing.assert_array_equal(read.experts_LRS, plan.placement.experts_LRS)
    assert json.loads(result.stdout)["plan"] == read.fingerprint == plan.fingerprint
    assert f"SEMMOE_PLAN={tmp_path}/x" in result.stderr
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "plugin.json",
        "tables.safetensors",
        "vectors.json",
    ]
    refused = export(saved / "p", "--to", kind, "-o", tmp_path / "x")
    assert "replace it with --force" in str(refused.exception)
    assert export(saved / "p", "--to", kind, "-o", tmp_path / "x", "--force").exit_code == 0


def test_the_vectors_are_those_of_the_page(saved, tmp_path):
    """The formula as docs/formats.md has it, with loops and dictionaries."""
    export(saved / "p", "--to", "vllm-plugin", "-o", tmp_path / "x")
    tables, document = (
        load_file(tmp_path / "x" / "tables.safetensors"),
        json.loads((tmp_path / "x" / "vectors.json").read_text()),
    )
    row_of = {int(v): row for row, v in enumerate(tables["ids_V"])}
    mean_V, hosts = tables["mean_V"].astype(float), read_plan_facts(tmp_path / "x").hosts_LEG(4)
    load_LE = tables["expert_load"]
    average_R = [
        np.mean([load_E[host_E].sum() / load_E.sum() for load_E, host_E in zip(load_LE, hosts[:, :, r], strict=True)])
        for r in range(4)
    ]
    decisions = set()
    for vector in document["vectors"]:
        counts = {}
        for i in vector["ids"]:
            if i in row_of:
                counts[row_of[i]] = counts.get(row_of[i], 0) + 1
        scores = np.zeros(4)
        if counts:
            known = sum(counts.values())
            topics = sum(tables["topic_VD"][v].astype(float) for v in counts)
            power = {v: (c / known) ** 0.7 for v, c in counts.items()}
            length = sum(p * p - 2 * p * mean_V[v] for v, p in power.items()) + (mean_V**2).sum()
            manner = (
                sum(p * tables["weight_VR"][v].astype(float) for v, p in power.items()) - mean_V @ tables["weight_VR"]
            )
            scores = topics / max(np.linalg.norm(topics), 1e-12) @ tables["topic_DR"] + manner / length**0.5
        np.testing.assert_allclose(vector["scores"], scores, atol=document["tolerance"])
        np.testing.assert_allclose(
            vector["expected_lar"], np.clip(average_R + scores, 0, 1), atol=2 * document["tolerance"]
        )
        decisions.add(vector["decision"])
        load, limit = (
            np.array(vector["tokens_in_flight"]),
            document["band"] * (sum(vector["tokens_in_flight"]) + len(vector["ids"])) / 4,
        )
        within = [r for r in range(4) if load[r] <= limit]
        assert vector["rank"] == (max(within, key=lambda r: scores[r]) if counts else -1)
    assert decisions == {"affine", "spilled", "unknown"}


def test_a_plan_that_a_plug_in_can_only_half_use_says_which_half(saved, tmp_path):
    result = export(saved / "copies", "--to", "vllm-plugin", "-o", tmp_path / "x")
    assert result.exit_code == 0 and "cannot place these experts: 1 replica slots per rank" in result.stderr
    with pytest.raises(InputError, match="replica slots"):
        _ = read_plan_facts(tmp_path / "x").orders_LE
    bare = replace(Plan.load(saved / "p"), tables={})
    bare.save(tmp_path / "bare")
    assert "chooses no rank" in export(tmp_path / "bare", "--to", "vllm-plugin", "-o", tmp_path / "y").stderr


def test_what_cannot_be_written_is_refused(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    result = export(saved / "p", "--to", "vllm-plugin", "-o", tmp_path / "mine")
    assert "semmoe export did not write it" in str(result.exception)
    assert export(saved / "p", "--to", "vllm-plugin", "--redundant", "1", "-o", tmp_path / "z").exit_code == 2
    replace(Plan.load(saved / "copies"), tables={}).save(tmp_path / "useless")
    result = export(tmp_path / "useless", "--to", "sglang-plugin", "-o", tmp_path / "z")
    assert "could do nothing" in str(result.exception) and not (tmp_path / "z").exists()
