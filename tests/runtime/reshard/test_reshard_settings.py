"""Settings that name experts by pattern follow them, or the reshard is refused with the key.

Right is told by the pattern itself: what it matched before it must match after, under the experts'
new names.
"""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import CONFIG, make_plan, write_checkpoint
from checkpoint_specs import D, F, assert_same_files, fused_model, per_expert_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.undo import undo_reshard

# new2old: layer 0 moves every expert, layer 1 another way; of 16, experts 3 and 5 get two digits
ORDERS_8 = np.asarray([[1, 0, 3, 2, 5, 4, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0]])
ORDERS_16 = np.asarray([np.roll(np.arange(16), 9), np.arange(16)[::-1]])
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def checkpoint(path: Path, num_experts: int, settings: dict, file: str = "config.json") -> Path:
    specs = {k: v for k, v in per_expert_model().items() if ".experts." not in k}
    for layer in (0, 1):
        base = f"model.layers.{layer}.mlp."
        specs |= {
            f"{base}gate.weight": ("BF16", (num_experts, D)),
            f"{base}gate.e_score_correction_bias": ("F32", (num_experts,)),
        }
        specs |= {f"{base}experts.{e}.{p}.weight": ("BF16", (F, D)) for e in range(num_experts) for p in PROJECTIONS}
    config = CONFIG | {"num_experts": num_experts}
    source = write_checkpoint(path, specs, config=config | settings if file == "config.json" else config)
    if file != "config.json":
        (source / file).write_text(json.dumps(settings) if file.endswith(".json") else str(settings["text"]))
    return source


def names_before_and_after(orders: np.ndarray) -> list[tuple[str, str]]:
    return [
        (f"model.layers.{layer}.mlp.experts.{old}.{p}", f"model.layers.{layer}.mlp.experts.{new}.{p}")
        for layer, order in enumerate(orders)
        for new, old in enumerate(order)
        for p in PROJECTIONS
    ]


def matched(pattern: str, name: str) -> bool:
    """As the readers do it: compressed-tensors and GPTQ match regular expressions, ModelOpt
    wildcards, others parts of names."""
    for prefix in ("re:", "-:", "+:"):
        if pattern.startswith(prefix):
            return bool(re.match(pattern.removeprefix(prefix), name))
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


EXACT = [
    "re:.*layers\\.0\\.mlp\\.experts\\.3\\..*",
    "re:model.layers.0.mlp.experts.(3)\\..*",
    "re:^model\\.layers\\.0\\.mlp\\.experts\\.(?:3|5)\\.(gate|up)_proj$",
    "re:.*layers\\.0\\.mlp\\.experts\\.(5|3|7)\\.down_proj",
    "re:.*layers\\.1\\.mlp\\.experts\\.[35]\\..*",
    "re:.*layers[.]1[.]mlp[.]experts[.][2-4][.].*",
    "re:model.layers.0.mlp.experts.3.up_proj",
    "re:(?:model.layers.0.mlp.experts.3.up_proj|model.layers.1.mlp.experts.5.down_proj)",
    "re:.*layers\\.(0)\\.mlp\\.experts\\.3\\.up_proj",
    "-:.*layers\\.0\\.mlp\\.experts\\.3\\..*",
    "+:^model\\.layers\\.1\\.mlp\\.experts\\.(0|1)\\.up_proj$",
    "model.layers.0.mlp.experts.3.*",
    "*layers.1.mlp.experts.5.up_proj",
    "model.layers.1.mlp.experts.5",
    "layers.0.mlp.experts.3.down_proj",
    "re:.*mlp\\.experts\\..*",
    "re:.*mlp.gate$",
    "re:.*experts\\.\\d+\\.down_proj",
    "re:.*layers\\.0\\..*",
    "model.layers.*.mlp.experts.*",
    "*self_attn*",
    "lm_head",
    "re:.*vision.*experts\\.3\\..*",
]


@pytest.mark.parametrize("orders", [ORDERS_8, ORDERS_16], ids=["8", "16"])
@pytest.mark.parametrize("pattern", EXACT)
def test_patterns_match_the_same_experts_after(pattern: str, orders: np.ndarray, tmp_path: Path) -> None:
    num_experts = orders.shape[1]
    settings = {"quantization_config": {"ignore": ["lm_head", pattern], "dynamic": {pattern: {"bits": 8}}}}
    source = checkpoint(tmp_path / "source", num_experts, settings)
    plan = make_plan(orders.reshape(2, 2, -1), num_experts=num_experts)
    reshard_checkpoint(source, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    new = config["ignore"][1]
    assert list(config["dynamic"]) == [new]
    for before, after in names_before_and_after(orders):
        assert matched(new, after) == matched(pattern, before), (new, after)
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


REFUSED = [
    "re:.*experts\\.3\\..*",  # in every layer: another number in each
    "re:.*layers\\.[01]\\.mlp\\.experts\\.3\\..*",
    "re:.*layers\\.\\d+\\.mlp\\.experts\\.(3|5)\\.up_proj",
    "re:.*layers\\.(0\\.mlp\\.experts\\.3|1\\.mlp\\.experts\\.5)\\..*",
    "re:.*\\.3\\.up_proj",
    "-:.*experts\\.3\\..*",
    "*experts.3.*",
    "experts.3.up_proj",
    "layers\\.0\\.mlp\\.experts\\.\\d*3\\.",  # searched for, with no prefix that says so
    "model.layers.?.mlp.experts.3.*",
]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "quantization_config.modules_to_not_convert"),
        ("hf_quant_config.json", "quantization.exclude_modules"),
        ("quantize_config.json", "extra.dynamic"),
    ],
)
@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_cannot_be_rewritten_are_refused(pattern: str, file: str, key: str, tmp_path: Path) -> None:
    outer, inner = key.split(".")
    settings = {outer: {inner: {pattern: {}} if inner == "dynamic" else ["lm_head", pattern]}}
    source = checkpoint(tmp_path / "source", 8, settings, file)
    plan = make_plan(ORDERS_8.reshape(2, 2, -1))
    with pytest.raises(InputError, match=f"{file}: {key} names experts by") as caught:
        reshard_checkpoint(source, plan, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    reshard_checkpoint(source, plan, tmp_path / "ranks", ReshardOptions(layout="ranks"))  # keeps the numbers
    assert (tmp_path / "ranks" / "shared" / file).read_bytes() == (source / file).read_bytes()


def test_a_pattern_that_matches_more_than_it_names(tmp_path: Path) -> None:
    """Of 64 experts "experts.3.*" is 3 and 30 to 39; of 16 it is 3 alone."""
    orders = np.asarray([np.roll(np.arange(64), 9)] * 2)
    settings = {"quantization_config": {"ignore": ["re:.*layers.0.mlp.experts.3.*"]}}
    source = checkpoint(tmp_path / "source", 64, settings)
    with pytest.raises(InputError, match=r"quantization_config\.ignore names experts by"):
        reshard_checkpoint(source, make_plan(orders.reshape(2, 2, -1), num_experts=64), tmp_path / "out")


def test_a_recipe(tmp_path: Path) -> None:
    recipe = (
        "default_stage:\n  modifiers:\n    GPTQModifier:\n"
        "      ignore: [lm_head, 're:.*layers\\.0\\.mlp\\.experts\\.3\\..*', model.layers.1.mlp.experts.0.up_proj]\n"
        '      other:\n      - re:.*layers\\.1\\.mlp\\.experts\\.(0|1)\\..*\n      - "re:.*mlp\\\\.gate$"\n'
        '      more: ["re:.*layers\\\\.0\\\\.mlp\\\\.experts\\\\.3\\\\..*"]\n'
    )
    source = checkpoint(tmp_path / "source", 8, {"text": recipe}, "recipe.yaml")
    plan = make_plan(ORDERS_8.reshape(2, 2, -1))
    reshard_checkpoint(source, plan, tmp_path / "out")
    expected = recipe.replace("experts\\.3", "experts\\.2").replace("experts\\\\.3", "experts\\\\.2")
    expected = expected.replace("experts.0.up", "experts.7.up").replace("(0|1)", "(7|6)")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == expected
    undo_reshard(tmp_path / "out", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")
    (source / "recipe.yaml").write_text(recipe.replace("layers\\.0\\.", ""))
    with pytest.raises(InputError, match="recipe.yaml: a list names experts by"):
        reshard_checkpoint(source, plan, tmp_path / "again")


def test_settings_of_stacked_experts(tmp_path: Path) -> None:
    """No tensor has an expert's number; the settings may all the same."""
    config = CONFIG | {"quantization_config": {"ignore": ["re:.*layers\\.0\\.mlp\\.experts\\.3\\..*"]}}
    source = write_checkpoint(tmp_path / "source", fused_model(), config=config)
    reshard_checkpoint(source, make_plan(ORDERS_8.reshape(2, 2, -1)), tmp_path / "out")
    new = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert new == ["re:.*layers\\.0\\.mlp\\.experts\\.2\\..*"]
