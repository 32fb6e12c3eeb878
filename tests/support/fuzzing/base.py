"""The whole inputs that are damaged: a tiny model, its traces, plans, reshards, maps, and one file
of every other kind, as far as possible made by the commands themselves.

`write_base` fills the working directory; names there are the names in the command lines of the
corpus.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_samples import (
    NUM_EXPERTS,
    NUM_LAYERS,
    config,
    megatron_lines,
    npy64,
    routing,
    sample_files,
    sglang_record,
    write_lines,
)

Run = Callable[..., None]  # a command line, word by word, that must succeed

EXPORTS = {
    "sglang.json": "sglang",
    "trtllm.yaml": "trtllm",
    "vllm41.json": "vllm --format pr41141",
    "vllm49.json": "vllm --format pr49572",
    "vllm34.json": "vllm --format pr34811",
    "ascend.json": "vllm-ascend",
    "eplb.safetensors": "eplb",
    "eplb.npz": "eplb",
    "eplb.pt": "eplb",
}


def write_base(run: Run) -> None:
    """Everything, in the working directory."""
    write_model(Path("m"))
    draw = random.Random(0)
    write_prompts(Path("a.jsonl"), "a", 24, draw)
    write_prompts(Path("b.jsonl"), "b", 16, draw)
    write_lines(Path("few.jsonl"), [{"text": "w3 w4 w5"}, {"text": "w6 w7 w8 w9"}])
    write_plans(run)
    write_maps(run)
    write_engine_files()
    run("trace --from eplb load.json -o tc")
    write_settings()


def write_model(folder: Path) -> None:
    """A tiny Qwen3-MoE of 3 layers, 8 experts and 112 words, in five files with an index."""
    from tiny_models import VOCAB_SIZE, tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_model("qwen3_moe").save_pretrained(folder, max_shard_size="60KB")
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_prompts(path: Path, name: str, count: int, draw: random.Random) -> None:
    def words() -> str:
        return " ".join(f"w{draw.randrange(2, 60)}" for _ in range(draw.randrange(6, 14)))

    write_lines(path, [{"id": f"{name}{i}", "text": words(), "domain": f"d{i % 3}"} for i in range(count)])


def write_plans(run: Run) -> None:
    """Two parts of a trace, plans on it, and both reshards of one of them."""
    run("trace m --data a.jsonl -o t")
    run("trace m --data b.jsonl -o t --resume")
    scored = "--effort fast --no-refit"
    run(f"place t --ranks 2 --method spectral {scored} -o p")
    run(f"place t --ranks 2 --method load --seed 5 {scored} -o q")
    run(f"place t --ranks 1 --method contiguous {scored} -o one")
    run(f"place t --ranks 2 --method contiguous {scored} -o c")
    Path("cost.json").write_text("[[0, 3], [3, 0]]")
    run(f"place t --ranks 2 --nodes 2 --topology cost.json --method load {scored} -o n")
    run("reshard m p -o placed")
    run("reshard m p --layout ranks -o split")


def write_maps(run: Run) -> None:
    for name, kind in EXPORTS.items():
        run(f"export {'c' if 'pr34811' in kind else 'p'} --to {kind} -o {name}")


def write_engine_files() -> None:
    """One file for every kind and mode of the importers; responses as files of one record."""
    sample_files(Path())
    ids = routing(40)
    write_lines(Path("sglang.jsonl"), [sglang_record(ids)])
    write_lines(Path("bare.jsonl"), [sglang_record(ids, shape=False)])
    usage = {"prompt_tokens": 30, "completion_tokens": 11, "total_tokens": 41}
    write_lines(
        Path("vllm.jsonl"), [{"id": "c", "choices": [{"index": 0, "routed_experts": npy64(ids)}], "usage": usage}]
    )
    offline: dict[str, Any] = {"request_id": "r", "prompt_token_ids": list(range(30))}
    offline["outputs"] = [{"index": 0, "token_ids": list(range(11)), "routed_experts": npy64(ids)}]
    write_lines(Path("offline.jsonl"), [offline])
    Path("router.jsonl").write_text(json.dumps(megatron_lines(ids[:, 1:2], layers=[1])[0]) + "\n")
    Path("config.json").write_text(json.dumps(config()))
    load = np.random.default_rng(4).integers(1, 50, (NUM_LAYERS, NUM_EXPERTS))
    Path("matrix.json").write_text(json.dumps(load.tolist()))


def write_settings() -> None:
    """Bandwidths in their three forms, and the two forms of a topology."""
    link = {"gb_per_s": 100.0, "latency_us": 5.0}
    Path("link.json").write_text(json.dumps(link))
    Path("classes.json").write_text(json.dumps({"intra": link, "inter": {"gb_per_s": 10.0, "latency_us": 20.0}}))
    pairs = {"gb_per_s": [[1.0, 50.0], [50.0, 1.0]], "latency_us": [[0.0, 9.0], [9.0, 0.0]]}
    Path("pairs.json").write_text(json.dumps(pairs))
    Path("costs.json").write_text(json.dumps({"cost": [[0, 3], [3, 0]]}))
    Path("smi.txt").write_text("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n")
