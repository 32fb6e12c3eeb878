"""How long ranks take from a checkpoint on disk to the list of the tensors that they read, and how many headers are parsed for it.

Makes a synthetic checkpoint of 46,080 expert tensors (60 layers of 256 experts, three matrices each) in 160 files: real headers and
index, files that are holes otherwise. `now`: one process parses and classifies for all ranks, each rank gets its part through a pipe and
opens its files. `before`: what every rank did by itself until then, index and headers twice (once to check the plan, once to read), the
roles of all keys, and every file through safetensors, which parses its header again. Prints one JSON object; seconds are wall-clock, all
ranks at work.

    python tests/benchmarks/start.py --ranks 8
"""

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

LAYERS, EXPERTS, HIDDEN, WIDTH = 60, 256, 4096, 1536
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def tensor_shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a large Qwen3-MoE, layer by layer."""
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (151_936, HIDDEN))]
    for layer in range(LAYERS):
        base = f"model.layers.{layer}."
        found += [(f"{base}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)) for name in "qkvo"]
        found += [(f"{base}{name}.weight", (HIDDEN,)) for name in ("input_layernorm", "post_attention_layernorm")]
        found.append((f"{base}mlp.gate.weight", (EXPERTS, HIDDEN)))
        for expert in range(EXPERTS):
            name = f"{base}mlp.experts.{expert}"
            found += [(f"{name}.{part}_proj.weight", (WIDTH, HIDDEN)) for part in ("gate", "up")]
            found.append((f"{name}.down_proj.weight", (HIDDEN, WIDTH)))
    return found


def write_checkpoint(folder: Path, num_files: int) -> int:
    """Headers, index and configuration, all data holes; the number of tensors of experts."""
    from semmoe.profiles.safetensors_file import INDEX_NAME, Tensor, make_header

    shapes, weight_map = tensor_shapes(), {}
    for number in range(num_files):
        name, tensors, place = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors", [], 0
        for key, shape in shapes[number * len(shapes) // num_files : (number + 1) * len(shapes) // num_files]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            tensors.append(Tensor(key, "BF16", shape, place, place + size))
            weight_map[key], place = name, place + size
        header = make_header(tuple(tensors), {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + place)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(".experts." in key for key in weight_map)


def read_alone(folder: Path, plan_path: Path, rank: int) -> dict[str, Any]:
    """What a rank did for itself."""
    from safetensors import safe_open

    from semmoe.profiles.config import read_config
    from semmoe.runtime.reshard.complete import classify_checkpoint
    from semmoe.runtime.reshard.model import check_plan, routed_model
    from semmoe.runtime.reshard.source import open_checkpoint
    from semmoe.solvers.plan import Plan

    begun = time.perf_counter()
    plan = Plan.load(plan_path)
    check_plan(open_checkpoint(folder), plan)
    checkpoint = open_checkpoint(folder)
    layers = plan.model.model_layers
    keys = classify_checkpoint(checkpoint, routed_model(read_config(folder), EXPERTS), set(layers))
    mine = [set(experts_RS[rank].tolist()) for experts_RS in plan.placement.experts_LRS]
    tensors = {}
    for shard in checkpoint.shards:
        reader = safe_open(str(shard.path), framework="pt")
        for tensor in shard.tensors:
            key = keys[tensor.name]
            if key.expert < 0 or key.expert in mine[key.layer]:
                tensors[tensor.name] = reader.get_slice(tensor.name)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "header_parses": 3 * len(checkpoint.shards), "tensors": len(tensors)}


def take_part(folder: Path, part: bytes) -> dict[str, Any]:
    """What a rank does with what it is told."""
    from semmoe.runtime.transformers.rank_weights import rank_tensors

    begun = time.perf_counter()
    with rank_tensors(folder, pickle.loads(part)) as tensors:
        return {"seconds": time.perf_counter() - begun, "header_parses": 0, "tensors": len(tensors)}


def warm_up(_: int) -> int:
    """Imports, which both ways need."""
    import semmoe.runtime.transformers.rank_weights

    time.sleep(0.2)  # so that every process of the pool gets one
    return len(semmoe.runtime.transformers.rank_weights.DTYPES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--files", type=int, default=160)
    parser.add_argument("--directory", type=Path, help="where the checkpoint is made, for as long as it is needed")
    options = parser.parse_args()
    from random_plans import random_plan

    from semmoe.runtime.transformers.rank_parts import rank_checkpoints

    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        num_experts = write_checkpoint(folder, options.files)
        plan = random_plan(folder, ranks=options.ranks)
        plan.save(Path(name) / "plan")
        with ProcessPoolExecutor(options.ranks, get_context("spawn")) as pool:
            list(pool.map(warm_up, range(4 * options.ranks)))
            # Baseline: every rank by itself, at the same time.
            begun = time.perf_counter()
            alone = [pool.submit(read_alone, folder, Path(name) / "plan", rank) for rank in range(options.ranks)]
            before = [future.result() for future in alone]
            before_s = time.perf_counter() - begun
            # One reads for all.
            begun = time.perf_counter()
            parts = [pickle.dumps(part) for part in rank_checkpoints(folder, plan)]
            parent_s = time.perf_counter() - begun
            now = [future.result() for future in [pool.submit(take_part, folder, part) for part in parts]]
            now_s = time.perf_counter() - begun
    assert [rank["tensors"] for rank in now] == [rank["tensors"] for rank in before]
    result = {
        "benchmark": "start",
        "ranks": options.ranks,
        "files": options.files,
        "expert_tensors": num_experts,
        "tensors_of_a_rank": now[0]["tensors"],
        "before": {
            "seconds": before_s,
            "seconds_of_a_rank": max(rank["seconds"] for rank in before),
            "header_parses": sum(rank["header_parses"] for rank in before),
        },
        "now": {
            "seconds": now_s,
            "seconds_of_the_parent": parent_s,
            "seconds_of_a_rank": max(rank["seconds"] for rank in now),
            "header_parses": options.files,
            "bytes_told_to_a_rank": max(map(len, parts)),
        },
        "times_faster": before_s / now_s,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
