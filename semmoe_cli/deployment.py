"""How to bring a plan into each engine: the exact commands, from the launch lines that `semmoe export` prints.

Heavy modules are imported inside.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from semmoe_cli.page import Commands

if TYPE_CHECKING:
    from solvers.plan import Plan

ENGINES = (
    ("SGLang", "sglang", "", "sglang.json"),
    ("TensorRT-LLM", "trtllm", "", "trtllm.yaml"),
    ("vLLM (a build with pull request 41141)", "vllm", "pr41141", "vllm.jsonl"),
    ("vLLM-Ascend", "vllm-ascend", "", "ascend.json"),
)


def deployment(plan: "Plan", plan_path: str) -> list[Commands]:
    """Commands for every engine that reads a map, and for those that only split experts in checkpoint order."""
    from solvers.export import launch_lines

    where = shlex.quote(plan_path)
    model = Path(plan.model.model).name or "CHECKPOINT"
    # A map for SGLang and TensorRT-LLM names every layer of the model, dense ones too.
    layers = "" if plan.model.num_model_layers else " --model CONFIG"
    found = []
    for name, kind, variant, file in ENGINES:
        option = f" --format {variant}" if variant else ""
        extra = layers if kind in ("sglang", "trtllm") else ""
        export = f"semmoe export {where} --to {kind}{option}{extra} -o {file}"
        notes = launch_lines(plan, kind, Path(file), format=variant)
        found.append(Commands(name, [export], [_sentence(line) for line in notes]))
    if not plan.placement.num_replicas:
        found.append(
            Commands(
                "Any other engine that splits experts in order (Transformers, Megatron, torchtitan, vLLM without a map)",
                [f"semmoe reshard {shlex.quote(model)} {where} -o {shlex.quote(model + '-placed')}"],
                [
                    f"Serve the new checkpoint with expert parallelism over {plan.topology.num_ranks} ranks: the same model, "
                    "experts and router relabelled. Its outputs are those of the original."
                ],
            )
        )
    return found


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:]
