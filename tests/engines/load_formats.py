#!/usr/bin/env python3
"""`--load-format semmoe` in vLLM's own process: greedy tokens equal to the plain load, and routed
experts permuted as the plan says.

    vllm-venv/bin/python load_formats.py FOLDER FAMILY...

FOLDER holds FAMILY/source and FAMILY/p (tiny_families.py makes them). Prints one JSON object per
family. One engine at a time, without subprocesses.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
NEAR_TIES = 0.01  # of the token-layers, in bfloat16: a wrong table changes nearly all
BFLOAT16 = ("gpt_oss", "deepseek_v2", "deepseek_v3")
PROMPTS = [[(7 * i + 3 * n) % 100 + 3 for i in range(5 + 6 * n)] for n in range(6)]


def start(model: str, dtype: str, returns: bool, **loading):
    """vLLM in this process, for the lengths of PROMPTS."""
    import torch
    from vllm import LLM  # pyright: ignore

    torch.manual_seed(0)
    return LLM(
        model,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        enable_return_routed_experts=returns,
        **loading,
    )


def ask(llm) -> tuple[list, list]:
    """Greedy tokens and routed experts [T, L, K] of each prompt."""
    from vllm import SamplingParams  # pyright: ignore

    asked = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], asked, use_tqdm=False)
    return [list(a.outputs[0].token_ids) for a in answers], [a.outputs[0].routed_experts for a in answers]


def clean_up() -> None:
    """Free what a vLLM that nothing refers to any more held."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore

    gc.collect()
    cleanup_dist_env_and_memory()


def run(model: str, returns: bool, dtype: str, **loading) -> tuple[list, list]:
    """What a vLLM of its own answers."""
    llm = start(model, dtype, returns, **loading)
    answers = ask(llm)
    del llm
    clean_up()
    return answers


def differing(before: list, after: list, before_plan, after_plan) -> tuple[int, int]:
    """Token-layers of routed experts, and those that choose others in the model's own labels, to
    which each plan's table leads back; None for ids that carry them."""
    import numpy as np

    rows = wrong = 0
    layers = after_plan.model["model_layers"]

    def own(ids_TLK, plan):
        ids_TLK = ids_TLK if ids_TLK.shape[1] == len(layers) else ids_TLK[:, layers]
        return np.sort(ids_TLK if plan is None else plan.orders_LE[np.arange(len(layers))[:, None], ids_TLK], -1)

    for a_TLK, b_TLK in zip(before, after, strict=True):
        if a_TLK is not None and b_TLK is not None:
            differs_TL = (own(a_TLK, before_plan) != own(b_TLK, after_plan)).any(-1)
            rows, wrong = rows + differs_TL.size, wrong + int(differs_TL.sum())
    return rows, wrong


def check(folder: str, family: str) -> dict:
    from semmoe.runtime.engines.plan_files import read_plan_facts

    source, plan = f"{folder}/{family}/source", read_plan_facts(f"{folder}/{family}/p")
    begin = time.monotonic()
    config = json.loads(Path(source, "config.json").read_text())
    returns = RETURNS and not config.get("sliding_window")  # vLLM captures in full attention only
    # In bfloat16 experts that are added up in another order change near ties; some kernels take no other on a CPU.
    dtype = "bfloat16" if family in BFLOAT16 else "float32"
    try:
        plain_tokens, plain_ids = run(source, returns, dtype)
    except Exception as error:  # without us: this engine, on this machine
        return {"family": family, "left_out": f"{type(error).__name__}: {error}"[:300]}
    placed_tokens, placed_ids = run(
        source, returns, dtype, load_format="semmoe", model_loader_extra_config={"plan": plan.path}
    )
    equal = sum(a == b for a, b in zip(plain_tokens, placed_tokens, strict=True))
    rows, wrong = differing(plain_ids, placed_ids, None, plan)
    moved = sum(int((order_E != range(len(order_E))).sum()) for order_E in plan.orders_LE)
    found = {"family": family, "prompts": len(PROMPTS), "equal": equal, "token_layers": rows, "differ": wrong}
    return found | {"experts_moved": moved, "seconds": round(time.monotonic() - begin, 1)}


if __name__ == "__main__":
    from importlib.metadata import version

    RETURNS = version("vllm").startswith("0.30.")  # from 0.31 on not on a CPU
    failed = []
    for name in sys.argv[2:]:
        try:
            result = check(sys.argv[1], name)
            good = "left_out" in result or (
                result["equal"] == len(PROMPTS)
                and result["differ"] <= (NEAR_TIES * result["token_layers"] if name in BFLOAT16 else 0)
                and result["experts_moved"]
            )
        except Exception as error:
            result, good = {"family": name, "error": f"{type(error).__name__}: {error}"[:300]}, False
        failed += [] if good else [name]
        print("RESULT", json.dumps(result), flush=True)
    sys.exit(f"not equal: {failed}" if failed else 0)
