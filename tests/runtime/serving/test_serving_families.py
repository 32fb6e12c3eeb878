"""The placed model against Transformers alone: real gloo ranks, tiny random models, random
placements, with and without replicas."""

from pathlib import Path

import pytest
from cases import rank_cases
from tiny_models import FAMILIES as HERE
from tiny_models import tiny_model

from semmoe.runtime.ranks.launch import launch

# Plain, shared experts, renamed layout, no norm of weights, groups of experts, correction bias,
# biases and interleaved weights.
FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"]
# Sliding windows (gpt_oss), and a cache that cannot be joined (linear attention in qwen3_next).
GENERATING = ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"]
# Experts as rows of one matrix, all experts run on all tokens, identity experts, layers that a
# token skips.
UNUSUAL = [family for family in ("dbrx", "llama4", "longcat_flash", "zaya") if family in HERE]
REASONS = {
    "jetmoe": "model type 'jetmoe' cannot be split over ranks",
    "ernie4_5_vl_moe": "layer 1 has two expert modules",
    "openai_privacy_filter": "does not generate text token by token",
}
REFUSED = {family: reason for family, reason in REASONS.items() if family in HERE}
# Attention-TP: a norm after attention, a gate beside the heads, and rounding that turns a router's
# choice (0.5 of the largest logit).
OTHER_SHAPES = {
    ("kolibri1", "float32"): "kolibri1 gives other logits with its heads shared out",
    ("kolibri1", "bfloat16"): "kolibri1 gives other logits with its heads shared out",
    ("afmoe", "float32"): "afmoe does not run with its heads shared out",
    ("glm4_moe_lite", "bfloat16"): "",
}
OTHER_SHAPES = {case: reason for case, reason in OTHER_SHAPES.items() if case[0] in HERE}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for family in {*FAMILIES, *GENERATING, *UNUSUAL, *REFUSED, *(family for family, _ in OTHER_SHAPES)}:
        tiny_model(family).save_pretrained(root / family)
    return root


# One rank; more requests than ranks, no replicas, unusual families too; fewer requests than ranks,
# and replicas.
CASES = [(1, 0, [5, 30], []), (2, 0, [1, 500, 7, 33, 20], UNUSUAL), (4, 1, [70, 1, 500], [])]


@pytest.mark.parametrize(("size", "replicas", "lengths", "unusual"), CASES)
def test_ranks_compute_what_one_process_computes(
    checkpoints: Path, size: int, replicas: int, lengths: list[int], unusual: list[str]
) -> None:
    families, generating, refused = FAMILIES + unusual, GENERATING + unusual, [*REFUSED] if unusual else []
    shapes = [*OTHER_SHAPES] if unusual else []
    arguments = (str(checkpoints), families, generating, FAMILIES, refused, shapes, size, replicas, lengths)
    found = launch(rank_cases.run_cases, arguments, size)
    assert {name: d for name, d in found["exchange"].items() if not d <= 1e-4} == {}
    assert {family: len(differences) for family, differences in found["logits"].items()} == dict.fromkeys(families, 3)
    assert {family: d for family, d in found["logits"].items() if not max(d) <= 1e-4} == {}
    for family, result in found["tokens"].items():
        assert result["mismatches"] == [None] * len(lengths), family
        assert result["ranks"] == [i % size for i in range(len(lengths))]
        for reason, count in zip(result["reasons"], result["counts"], strict=True):
            assert reason == "length" and count == 6 or reason == "stop" and count <= 6
        # Rank 0 dispatched its own prompts and all generated tokens but the last of each; no
        # padding.
        own = [i for i in range(len(lengths)) if i % size == 0]
        assert result["tokens"] == sum(lengths[i] + result["counts"][i] - 1 for i in own), family
    assert found["tp"] == dict.fromkeys(FAMILIES, [None] * len(lengths))
    for family in refused:
        assert REFUSED[family] in found["refused"][family] and "\n" not in found["refused"][family]
    for case in shapes:
        message = found["other"][case]
        assert OTHER_SHAPES[case] in message and bool(OTHER_SHAPES[case]) == bool(message) and "\n" not in message, case
