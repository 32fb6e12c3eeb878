"""How fast and how large `reshard` is, against `cp -r` of the same checkpoint on the same disk.

Makes a synthetic checkpoint as the hub stores it (48 layers of 64 experts, 8 GB of random bytes
unless told otherwise), runs `cp -r` and the reshards in turn, each after a sync, and prints one
JSON object with the best time of each, the ratios, and the peak memory of the resharding process
(its imports included).

    python tests/benchmarks/reshard.py --gb 8 --repeats 3 --directory /tmp
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

from checkpoint_factory import make_plan, random_orders  # noqa: E402

from semmoe.profiles.safetensors_file import INDEX_NAME, Tensor, make_header  # noqa: E402

HIDDEN = 1024


def tensor_names(layers: int, experts: int, width: int, *, fused: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes (BF16) of a Qwen3-MoE-like model; fused as Qwen3-VL-MoE stores it."""
    names: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (32_000, HIDDEN))]
    for layer in range(layers):
        base = f"model.layers.{layer}."
        names += [(f"{base}self_attn.{p}_proj.weight", (HIDDEN, HIDDEN)) for p in "qkvo"]
        names.append((f"{base}mlp.gate.weight", (experts, HIDDEN)))
        if fused:
            names.append((f"{base}mlp.experts.gate_up_proj", (experts, HIDDEN, 2 * width)))
            names.append((f"{base}mlp.experts.down_proj", (experts, width, HIDDEN)))
            continue
        for expert in range(experts):
            names.append((f"{base}mlp.experts.{expert}.down_proj.weight", (HIDDEN, width)))
            names.append((f"{base}mlp.experts.{expert}.gate_proj.weight", (width, HIDDEN)))
            names.append((f"{base}mlp.experts.{expert}.up_proj.weight", (width, HIDDEN)))
    return names


def write_model(path: Path, *, num_bytes: float, layers: int, experts: int, shard_bytes: float, fused: bool) -> int:
    """Write the checkpoint; the number of bytes of its safetensors files."""
    width = max(8, int(num_bytes / (layers * experts * 3 * HIDDEN * 2)) // 8 * 8)
    files: list[list[Tensor]] = [[]]
    for name, shape in tensor_names(layers, experts, width, fused=fused):
        size = 2 * int(np.prod(shape))
        begin = files[-1][-1].end if files[-1] else 0
        if begin + size > shard_bytes and files[-1]:
            files.append([])
            begin = 0
        files[-1].append(Tensor(name, "BF16", shape, begin, begin + size))
    path.mkdir()
    block, weight_map, total = os.urandom(32 << 20), {}, 0
    for number, tensors in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor.name: file for tensor in tensors}
        with (path / file).open("wb") as stream:
            stream.write(make_header(tuple(tensors), {"format": "pt"}))
            left = tensors[-1].end
            while left:
                start = left * 7919 % 65536  # every stretch of the file differs
                left -= stream.write(block[start : start + min(left, len(block) - start)])
            total += stream.tell()
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 8}
    (path / "config.json").write_text(json.dumps(config))
    return total


def timed(words: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB of a command, after everything that waits for the disk is
    written."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[:3]} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


RESHARD = (
    "import sys; from pathlib import Path; from semmoe.solvers.plan import Plan; "
    "from semmoe.runtime.reshard.records import ReshardOptions; "
    "from semmoe.runtime.reshard.reshard import reshard_checkpoint; "
    "reshard_checkpoint(Path(sys.argv[1]), Plan.load(sys.argv[2]), Path(sys.argv[3]), ReshardOptions(verify=sys.argv[4]))"
)


def measure(folder: Path, options: argparse.Namespace, *, fused: bool) -> dict[str, float]:
    """Best times of `cp -r`, of reshard with and without comparing, and the ratios to `cp -r`."""
    source, out = folder / "source", folder / "out"
    written = write_model(
        source,
        num_bytes=options.gb * 1e9,
        layers=options.layers,
        experts=options.experts,
        shard_bytes=options.shard_gb * 1e9,
        fused=fused,
    )
    layers = range(options.layers)
    orders = random_orders(options.layers, options.experts).reshape(options.layers, 8, -1)
    facts = {"num_experts": options.experts, "top_k": 8, "num_model_layers": options.layers}
    make_plan(orders, layers=tuple(layers), **facts).save(folder / "plan")
    words = [sys.executable, "-c", RESHARD, str(source), str(folder / "plan"), str(out)]
    runs = {"cp": ["cp", "-r", str(source), str(out)], "bytes": [*words, "bytes"], "none": [*words, "none"]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peak = 0.0
    for _ in range(options.repeats):
        for name, command in runs.items():
            spent, memory = timed(command)
            seconds[name].append(spent)
            peak = peak if name == "cp" else max(peak, memory)
            shutil.rmtree(out)
    shutil.rmtree(source)
    shutil.rmtree(folder / "plan")
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "gb": round(written / 1e9, 2),
        "cp_seconds": round(best["cp"], 2),
        "reshard_seconds": round(best["bytes"], 2),
        "reshard_unverified_seconds": round(best["none"], 2),
        "ratio": round(best["bytes"] / best["cp"], 3),
        "ratio_unverified": round(best["none"] / best["cp"], 3),
        "peak_mb": round(peak, 1),
        "all_seconds": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp"))
    options = parser.parse_args()
    folder = options.directory / f"semmoe-reshard-{os.getpid()}"
    folder.mkdir()
    try:
        result = {
            "benchmark": "reshard",
            "per_expert": measure(folder, options, fused=False),
            "fused": measure(folder, options, fused=True),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
