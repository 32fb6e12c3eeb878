"""Small files in the formats of serving engines, made from known routing, for the tests of the
importers."""

import base64
import io
import json
from pathlib import Path

import numpy as np

NUM_LAYERS, DENSE, NUM_EXPERTS, TOP_K = 5, 0, 16, 3


def routing(num_tokens, *, seed=0, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, dense=(DENSE,)):
    """Distinct ids int32 [T, L, K] of all layers, zeros in the dense ones; large enough ones
    name every expert."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)[:, :, :top_k].astype(np.int32)
    ids[:, list(dense)] = 0
    return ids


def raw64(ids):
    return base64.b64encode(np.ascontiguousarray(ids, "<i4").tobytes()).decode()


def npy64(ids, dtype=np.uint8):
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sglang_record(ids, *, prompt=3, name="r0", shape=True, start=0, **extra):
    """A /generate response: the sequence is one token longer than its rows."""
    total = start + len(ids) + 1
    meta = {"id": name, "routed_experts": raw64(ids), "prompt_tokens": prompt, "completion_tokens": total - prompt}
    meta |= {"routed_experts_start_len": start} if start else {}
    meta |= {"routed_experts_shape": list(ids.shape)} if shape else {}
    tokens = list(range(100, 100 + total))
    return {"prompt_token_ids": tokens[:prompt], "output_ids": tokens[prompt:], "meta_info": meta} | extra


def config(**extra):
    facts = {"model_type": "deepseek_v2", "n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    return {**facts, "num_hidden_layers": NUM_LAYERS, "first_k_dense_replace": 1, "vocab_size": 500, **extra}


def slot_map(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, replicas=4, seed=1):
    """physical_to_logical_map int64 [L, S]: every expert once, some twice, in random order."""
    rng = np.random.default_rng(seed)
    row = np.concatenate([np.arange(num_experts), np.arange(replicas)])
    return np.stack([rng.permutation(row) for _ in range(num_layers)])


def to_slots(ids, map_LS, *, dense=(DENSE,), width=8):
    """Recorder's topk_ids_of_layer int32 [L, T, width] of logical ids [T, L, K]: slots, padded
    with -1; 0 where dense."""
    num_tokens, num_layers, top_k = ids.shape
    slots = np.full((num_layers, num_tokens, width), -1, np.int32)
    slot_of_LE = np.stack([[np.flatnonzero(row == e)[0] for e in range(row.max() + 1)] for row in map_LS])
    for layer in range(num_layers):
        if layer in dense:
            slots[layer] = 0
        else:
            slots[layer, :, :top_k] = slot_of_LE[layer][ids[:, layer]]
    return slots


def token_pass(ids, map_LS, *, number=1, rank=0, extend=None, padding=0, dense=(DENSE,)):
    """One per_token record; `padding` rows of -1 after the tokens."""
    import torch

    slots = to_slots(ids, map_LS, dense=dense)
    slots = np.concatenate([slots, np.full((len(slots), padding, 8), -1, np.int32)], axis=1)
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(50, 50 + len(ids))),
        "positions": list(range(len(ids))),
        "extend_seq_lens": extend,
        "forward_mode": 1 if extend else 2,
        "topk_ids_of_layer": torch.from_numpy(slots),
        "misc_objects": [],
    }


def save_recording(path: Path, records, map_LS) -> Path:
    import torch

    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(map_LS)}, path)
    return path


def count_pass(load_LS, *, number, rank):
    import torch

    counts = torch.from_numpy(load_LS)
    return {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts}


def megatron_lines(ids, *, step=0, rank=0, layers=None, block="decoder", **extra):
    """Lines of one step: one for each layer that routes."""
    layers = range(ids.shape[1]) if layers is None else layers
    return [
        {"step": step, "stage": "pre_dispatch", "block": block, "layer": layer, "rank": rank}
        | {"num_tokens": len(ids), "topk": ids.shape[2], "top_indices": ids[:, i].tolist()}
        | extra
        for i, layer in enumerate(layers)
    ]


def write_statistics(folder: Path, load, layers, *, num_ranks=2) -> Path:
    """TensorRT-LLM's directory: load [iterations, L, E] shared out over ranks."""
    from safetensors.numpy import save_file

    folder.mkdir()
    meta = {"num_experts": load.shape[2], "num_experts_per_token": TOP_K}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(num_ranks):
        share = load // num_ranks + (load % num_ranks if rank == 0 else 0)
        keys = {f"{100 + i}_{layer}": share[i, at] for i in range(len(load)) for at, layer in enumerate(layers)}
        save_file(keys, folder / f"rank{rank}.safetensors")
    return folder


def sample_files(folder: Path) -> dict[str, list[Path]]:
    """A valid input of every kind and mode, by a name that starts with the kind."""
    import torch

    ids, map_LS = routing(40), slot_map()
    load = np.random.default_rng(2).integers(0, 50, (3, NUM_LAYERS, NUM_EXPERTS))
    load[:, DENSE] = 0
    choice = {"index": 0, "sglext": {"routed_experts": raw64(ids), "routed_experts_shape": list(ids.shape)}}
    slots = np.random.default_rng(3).integers(0, 9, map_LS.shape)
    slots[DENSE] = 0
    torch.save({"rank": 0, "logical_count": torch.from_numpy(load)}, folder / "stat.pt")
    np.save(folder / "load.npy", load[0])
    torch.save(torch.from_numpy(load), folder / "load.pt")
    (folder / "load.json").write_text(json.dumps({"logical_count": load.tolist()}))
    return {
        "sglang": [write_lines(folder / "s.jsonl", [sglang_record(ids), sglang_record(ids[:9], name="r1")])],
        "sglang openai": [write_lines(folder / "o.jsonl", [{"id": "c", "choices": [choice]}])],
        "vllm": [
            write_lines(folder / "v.jsonl", [{"id": "c", "choices": [{"index": 0, "routed_experts": npy64(ids)}]}])
        ],
        "sglang-recorder token": [
            save_recording(folder / "token.pt", [token_pass(ids, map_LS, extend=[30, 10])], map_LS)
        ],
        "sglang-recorder pass": [save_recording(folder / "pass.pt", [count_pass(slots, number=1, rank=0)], map_LS)],
        "sglang-recorder stat": [folder / "stat.pt"],
        "trtllm": [write_statistics(folder / "stats", load[:, 1:], range(1, NUM_LAYERS))],
        "megatron": [write_lines(folder / "router_trace_rank0.jsonl", megatron_lines(ids[:, 1:], layers=range(1, 5)))],
        "eplb npy": [folder / "load.npy"],
        "eplb pt": [folder / "load.pt"],
        "eplb json": [folder / "load.json"],
    }
