"""What people of the field bring along: small inputs, rebuilt from their reports, each in the
working directory. One function for a case; tests/semmoe_cli/test_field_cases.py says what must
come of it.

Shape letters: T tokens, L layers, K top-k, E experts, R ranks.
"""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_samples import npy64, raw64, write_lines
from safetensors.torch import save, save_file

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
Tensors = dict[str, torch.Tensor]


def tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that depend on the name alone and hardly repeat."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype in FLOAT8:
        return torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 120, shape, generator=generator).to(dtype)


def add(tensors: Tensors, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    tensors[name] = tensor(name, *shape, dtype=dtype)


def write_json(path: str | Path, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=2) + "\n")


def write_index(folder: str, file_of_name: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": file_of_name}
    write_json(Path(folder, "model.safetensors.index.json"), index)


def write_checkpoint(folder: str, config: dict[str, Any], files: dict[str, Tensors]) -> None:
    """config.json and safetensors files; an index where there are several."""
    Path(folder).mkdir()
    write_json(Path(folder, "config.json"), config)
    for file, tensors in files.items():
        save_file(dict(tensors), Path(folder, file), metadata={"format": "pt"})
    if len(files) > 1:
        write_index(folder, {name: file for file, tensors in files.items() for name in tensors})


def grouped_ids(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, *, seed: int = 0, num_groups: int = 4
) -> np.ndarray:
    """int32 [T, L, K]: distinct experts, drawn mostly from one group of experts for a token."""
    random = np.random.default_rng(seed)
    orders = [np.random.default_rng(100 + layer).permutation(num_experts) for layer in range(num_layers)]
    group_LE = np.stack(orders) * num_groups // num_experts
    group_T = random.integers(num_groups, size=num_tokens)
    weight_TLE = np.where(group_LE == group_T[:, None, None], 3.0, 0.15)
    keys_TLE = random.exponential(size=weight_TLE.shape) / weight_TLE
    return np.argsort(keys_TLE, axis=2)[:, :, :top_k].astype(np.int32)


def token_ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 97, count).tolist()


def sglang_response(ids_TLK: np.ndarray, seed: int, **extra: Any) -> dict[str, Any]:
    """A response of SGLang: half of the tokens are the prompt."""
    tokens, half = token_ids(len(ids_TLK) + 1, seed), len(ids_TLK) // 2
    meta: dict[str, Any] = {"id": f"r{seed}", "prompt_tokens": half, "completion_tokens": len(tokens) - half}
    meta |= {"routed_experts": raw64(ids_TLK), "routed_experts_shape": list(ids_TLK.shape)}
    return {"text": "", "input_ids": tokens[:half], "output_ids": tokens[half:], "meta_info": meta, **extra}


def responses(
    count: int, num_tokens: int, num_layers: int, num_experts: int, top_k: int, *, seed: int = 0, num_groups: int = 4
) -> list[dict[str, Any]]:
    """SGLang responses of `num_tokens` rows."""
    found = []
    for number in range(1000 * seed, 1000 * seed + count):
        ids = grouped_ids(num_tokens, num_layers, num_experts, top_k, seed=number, num_groups=num_groups)
        found.append(sglang_response(ids, number))
    return found


def with_dense_layer(records: list[dict[str, Any]], model_layers: list[int], num_model_layers: int) -> list[dict]:
    """The same responses with rows of zeros for the layers that do not route."""
    for record in records:
        meta = record["meta_info"]
        ids_TLK = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(meta["routed_experts_shape"])
        wide_TLK = np.zeros((len(ids_TLK), num_model_layers, ids_TLK.shape[2]), np.int32)
        wide_TLK[:, model_layers] = ids_TLK
        meta |= {"routed_experts": raw64(wide_TLK), "routed_experts_shape": list(wide_TLK.shape)}
    return records


def relabelled(records: list[dict[str, Any]], new2old: dict[str, list[int]]) -> list[dict]:
    """The same responses as a server of a permuted reshard gives them."""
    old2new_LE = np.argsort([new2old[str(layer)] for layer in range(len(new2old))], axis=1)
    for record in records:
        meta = record["meta_info"]
        ids_TLK = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(meta["routed_experts_shape"])
        meta["routed_experts"] = raw64(old2new_LE[np.arange(len(old2new_LE))[:, None], ids_TLK])
    return records


QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 97,
}


def constant_layer() -> None:
    """A capture that is broken in layer 0: the same experts for every token."""
    records = []
    for seed in range(20):
        ids_TLK = grouped_ids(40, 4, 32, 4, seed=seed)
        ids_TLK[:, 0] = [0, 1, 2, 3]
        records.append(sglang_response(ids_TLK, seed))
    write_lines(Path("r.jsonl"), records)


def duplicate_slots() -> None:
    """Maps of EPLB: an expert twice on each rank; and one of [layers, ranks, experts] as .pth."""
    write_lines(Path("r.jsonl"), responses(24, 16, 2, 16, 4))
    slots = [expert for rank in range(4) for expert in [*range(4 * rank, 4 * rank + 4), 4 * rank]]
    torch.save(torch.tensor([slots, slots]), "twice.pt")
    local = torch.full((2, 4, 16), -1, dtype=torch.int32)
    for rank in range(4):
        local[:, rank, 4 * rank : 4 * rank + 4] = torch.arange(4, dtype=torch.int32)
    torch.save(local, "expert_map.pth")


def qwen_tensors() -> Tensors:
    tensors: Tensors = {}
    add(tensors, "model.embed_tokens.weight", 97, 32)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        add(tensors, mlp + "gate.weight", 8, 32)
        for expert in range(8):
            for name in ("gate_proj", "up_proj", "down_proj"):
                add(tensors, mlp + f"experts.{expert}.{name}.weight", 16, 32)
    return tensors


REPLACED = (
    "model.layers.0.mlp.experts.2.up_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.embed_tokens.weight",
)
STALE = "model.layers.0.mlp.experts.1.up_proj.weight"
ONE, TWO, OVERLAY = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model-overlay.safetensors"


def index_decides() -> None:
    """Tensors that lie in two files, of which the index selects one."""
    tensors = qwen_tensors()
    names = list(tensors)
    first = {name: tensors[name] for name in names[: len(names) // 2]}
    second = {name: tensors[name] for name in names[len(names) // 2 :]}
    index = {**dict.fromkeys(first, ONE), **dict.fromkeys(second, TWO)}
    overlay = {name: tensor("new " + name, *tensors[name].shape) for name in REPLACED}
    write_checkpoint("overlay", QWEN3_MOE, {ONE: first, TWO: second, OVERLAY: overlay})
    write_index("overlay", {**index, **dict.fromkeys(REPLACED, OVERLAY)})
    write_checkpoint("stale", QWEN3_MOE, {ONE: first, TWO: {**second, STALE: tensor("old " + STALE, 16, 32)}})
    write_index("stale", index)
    write_lines(Path("r.jsonl"), responses(30, 24, 2, 8, 2))


LATENT = ("routed_expert_down_proj", "routed_expert_norm", "routed_expert_up_proj")


def latent_projections() -> None:
    """Kimi K3: projections named after the routed experts that have no expert axis."""
    inner = {"model_type": "kimi_linear", "hidden_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    inner |= {"num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 16, "num_shared_experts": 2}
    inner |= {"num_expert_group": 1, "topk_group": 1, "moe_layer_freq": 1, "vocab_size": 97}
    tensors: Tensors = {}
    add(tensors, "language_model.model.embed_tokens.weight", 97, 32)
    for layer in (1, 2):
        moe = f"language_model.model.layers.{layer}.block_sparse_moe."
        add(tensors, moe + "gate.weight", 8, 32)
        add(tensors, moe + "gate.e_score_correction_bias", 8)
        for name, shape in zip(LATENT, ((16, 32), (16,), (32, 16)), strict=True):
            add(tensors, moe + name + ".weight", *shape)
        for expert in range(8):
            for name in ("w1", "w2", "w3"):
                add(tensors, moe + f"experts.{expert}.{name}.weight_packed", 16, 8, dtype=torch.uint8)
    config = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": inner}
    names = list(tensors)
    files = {f"model-0000{p + 1}-of-00002.safetensors": {n: tensors[n] for n in names[p::2]} for p in range(2)}
    write_checkpoint("m", config, files)
    write_lines(Path("r.jsonl"), with_dense_layer(responses(30, 24, 2, 8, 2), [1, 2], 3))


def loads_as_csv() -> np.ndarray:
    """Loads as CSV, a file for each of two ranks, and one line for each activation. The sum of both
    ranks, int64 [2, 16] of layers 3 and 4."""
    random, total_LE = np.random.default_rng(0), np.zeros((2, 16), np.int64)
    for rank in range(2):
        lines = ["layer_id,expert_id,count\n"]
        for layer in (3, 4):
            for expert in range(16):
                if (expert + rank) % 3:
                    count = int(random.integers(1, 900))
                    total_LE[layer - 3, expert] += count
                    lines.append(f"{layer},{expert},{count}\n")
        Path(f"expert_distribution_rank{rank}.csv").write_text("".join(lines))
    rows = [f"{layer},{random.integers(16)}\n" for _ in range(400) for layer in range(4)]
    Path("activations.csv").write_text("layer,expert\n" + "".join(rows))
    return total_LE


def leaving_names() -> None:
    """Checkpoints in the ranks layout whose semmoe-source.json names a file outside: by an absolute
    name, and with "..". All of it stays below the working directory."""
    here = Path.cwd()
    for folder, name in (("absolute", f"{here}/victim/a.safetensors"), ("parent", "../victim/a.safetensors")):
        inner = Path(folder, "shared/" + name)
        assert here in inner.resolve().parents and here in Path(folder, name).resolve().parents
        inner.parent.mkdir(parents=True, exist_ok=True)
        data = save({"x": torch.arange(16, dtype=torch.uint8)})
        inner.write_bytes(data)
        begin = 8 + int.from_bytes(data[:8], "little")
        entry = {"header_bytes": begin, "metadata": {}, "tensors": [["x", "U8", [16], 0, 16]]}
        source = {"format": "semmoe-reshard-source", "index": None, "files": {name: entry}}
        content = json.dumps(source).encode()
        Path(folder, "semmoe-source.json").write_bytes(content)
        facts: dict[str, Any] = {
            "format": "semmoe-reshard",
            "version": 1,
            "layout": "ranks",
            "plan": {"fingerprint": "0"},
        }
        facts |= {"num_experts": 2, "model_layers": [0], "placement": [[[0], [1]]]}
        facts |= {
            "headers_sha256": hashlib.sha256(content).hexdigest(),
            "files": {"shared/" + name: {"bytes": len(data)}},
        }
        write_json(Path(folder, "semmoe.json"), facts)


def one_bad_record() -> None:
    """Twenty good responses with one of an aborted or failed request among them."""

    def vllm(seed: int) -> dict[str, Any]:
        prompt, output = token_ids(12, seed), token_ids(12, 100 + seed)
        choice = {"index": 0, "text": "", "finish_reason": "stop", "prompt_token_ids": prompt, "token_ids": output}
        choice["routed_experts"] = npy64(grouped_ids(23, 3, 16, 4, seed=seed))
        return {"id": f"c{seed}", "choices": [choice], "usage": {"prompt_tokens": 12, "completion_tokens": 12}}

    choice = {"index": 0, "text": "", "finish_reason": "abort", "prompt_token_ids": [3, 4], "token_ids": []}
    aborted = {"id": "c99", "choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 0}}
    failed = {"error": {"message": "busy", "type": "ServerError", "code": 503}}
    meta = {"id": "c99", "finish_reason": {"type": "abort"}, "prompt_tokens": 5, "completion_tokens": 0}
    good = [vllm(seed) for seed in range(20)]
    for name, records, bad in (
        ("aborted", good, aborted),
        ("error", good, failed),
        ("sglang", responses(20, 23, 3, 16, 4), {"text": "", "output_ids": [], "meta_info": meta}),
    ):
        write_lines(Path(f"{name}.jsonl"), [*records[:10], bad, *records[10:]])
        write_lines(Path(f"{name}-only.jsonl"), [bad])


def counts_of_a_recorder() -> None:
    """A dump of loads: 43 layers, the first three of which are hash layers and never counted."""
    count_SLE = np.zeros((4, 43, 64), np.int64)
    count_SLE[:2, 3:] = np.random.default_rng(0).poisson(3, (2, 40, 64))
    torch.save({"rank": 0, "logical_count": torch.tensor(count_SLE)}, "expert_distribution_recorder_1.pt")
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 43, "n_routed_experts": 64, "num_experts_per_tok": 6}
    write_json("config.json", {**config, "num_hash_layers": 3, "vocab_size": 97})


PATTERNS = {"escaped": r"re:.*layers\.0\.mlp\.experts\.3\..*", "group": "re:model.layers.0.mlp.experts.(3).*"}


def quantisation_patterns() -> None:
    """One expert is left unquantised, and the settings name it by a regular expression."""
    tensors: Tensors = {}
    for name, whole in qwen_tensors().items():
        if ".experts." not in name or name.startswith("model.layers.0.mlp.experts.3."):
            tensors[name] = whole
        else:
            add(tensors, name + "_packed", 16, 4, dtype=torch.int32)
            add(tensors, name + "_scale", 16, 1)
    for folder, pattern in PATTERNS.items():
        settings = {"quant_method": "compressed-tensors", "ignore": ["lm_head", pattern]}
        write_checkpoint(folder, {**QWEN3_MOE, "quantization_config": settings}, {"model.safetensors": tensors})
    write_lines(Path("r.jsonl"), responses(30, 24, 2, 8, 2))


def undivided_ranks() -> None:
    """160 experts for 12 ranks, 256 for 72, and the map of a server with 288 slots."""
    for num_experts, top_k in ((160, 6), (256, 8)):
        records = responses(24, 16, 2, num_experts, top_k, num_groups=8)
        write_lines(Path(f"e{num_experts}.jsonl"), records)
        config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 0, "n_group": 1}
        config |= {"n_routed_experts": num_experts, "num_experts_per_tok": top_k, "topk_group": 1, "vocab_size": 97}
        write_json(f"e{num_experts}.json", config)
    write_json("map288.json", {"physical_to_logical_map": [[slot % 256 for slot in range(288)]] * 2})


def data_and_shape() -> None:
    """vLLM's layout with raw bytes and their shape and type beside them; and one that lies."""
    records = []
    for seed in range(10):
        ids_TLK = grouped_ids(23, 3, 16, 4, seed=seed)
        routed = {"data": raw64(ids_TLK), "shape": list(ids_TLK.shape), "dtype": "int32"}
        choice = {"index": 0, "token_ids": token_ids(12, 100 + seed), "prompt_token_ids": token_ids(12, seed)}
        records.append({"id": f"c{seed}", "choices": [{**choice, "routed_experts": routed}]})
    write_lines(Path("r.jsonl"), records)
    records[3]["choices"][0]["routed_experts"]["shape"] = [23, 3, 5]
    write_lines(Path("wrong.jsonl"), records)


def stacked_scales() -> None:
    """Step-3.7 in NVFP4: experts stacked per projection, with a number for each as global scale and
    as input scale."""
    inner = {"model_type": "step3p5", "hidden_size": 32, "num_hidden_layers": 3, "moe_layers_enum": "1,2"}
    inner |= {"moe_num_experts": 8, "moe_top_k": 2, "moe_intermediate_size": 16, "vocab_size": 97}
    config: dict[str, Any] = {"architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7"}
    config |= {"text_config": inner, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    tensors: Tensors = {}
    add(tensors, "model.embed_tokens.weight", 97, 32)
    for layer in (1, 2):
        block = f"model.layers.{layer}."
        add(tensors, block + "moe.gate.weight", 8, 32)
        add(tensors, block + "moe.router_bias", 8)
        for name, rows, columns in (("gate_proj", 16, 32), ("up_proj", 16, 32), ("down_proj", 32, 16)):
            projection = f"{block}moe.{name}."
            add(tensors, projection + "weight", 8, rows, columns // 2, dtype=torch.uint8)
            add(tensors, projection + "weight_scale", 8, rows, columns // 16, dtype=torch.float8_e4m3fn)
            add(tensors, projection + "weight_scale_2", 8)
            add(tensors, projection + "input_scale", 8)
            add(tensors, f"{block}share_expert.{name}.weight", 16, 32)
    write_checkpoint("m", config, {"model.safetensors": tensors})
    write_lines(Path("r.jsonl"), with_dense_layer(responses(30, 24, 2, 8, 2), [1, 2], 3))


def top_k_per_layer() -> None:
    """A pruned hybrid whose block_configs give each MoE layer its own top-k; and one whose layers
    differ in the number of experts."""

    def config(*blocks: tuple[int, int]) -> dict[str, Any]:
        moe = [{"block_type": "moe", "n_routed_experts": e, "num_experts_per_tok": k} for e, k in blocks]
        facts = {"architectures": ["NemotronHPuzzleForCausalLM"], "model_type": "nemotron_h_puzzle"}
        mamba = {"block_type": "mamba"}
        facts |= {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 97}
        return {**facts, "block_configs": [mamba, moe[0], mamba, moe[1]]}

    tensors: Tensors = {}
    add(tensors, "backbone.embeddings.weight", 97, 32)
    for layer in (1, 3):
        mixer = f"backbone.layers.{layer}.mixer."
        add(tensors, mixer + "gate.weight", 8, 32)
        for expert in range(8):
            add(tensors, mixer + f"experts.{expert}.up_proj.weight", 16, 32)
    write_checkpoint("m", config((8, 3), (8, 2)), {"model.safetensors": tensors})
    write_json("experts-differ.json", config((8, 2), (4, 2)))
    records = []
    for seed in range(20):
        ids_TLK = np.zeros((24, 4, 3), np.int32)
        ids_TLK[:, 1] = grouped_ids(24, 1, 8, 3, seed=seed)[:, 0]
        ids_TLK[:, 3] = -1
        ids_TLK[:, 3, :2] = grouped_ids(24, 1, 8, 2, seed=50 + seed)[:, 0]
        records.append(sglang_response(ids_TLK, seed))
    write_lines(Path("r.jsonl"), records)


def wide_ids(seed: int) -> np.ndarray:
    """Routing of 256 experts, top-8."""
    return grouped_ids(60, 1, 256, 8, seed=seed, num_groups=8)
