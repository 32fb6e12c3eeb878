#!/usr/bin/env python3
"""A plan changed while vLLM runs, by semmoe's worker extension: greedy tokens equal before and
after, weights to the bit those of a fresh start by the new plan, ids of experts in its labels.

    vllm-venv/bin/python replan_live.py FOLDER FAMILY...

FOLDER holds FAMILY/source, p, p2 and p3 (tiny_families.py makes them). Prints one JSON object per
family. One engine at a time, without subprocesses.
"""

import gc
import json
import sys
import time
from pathlib import Path

from load_formats import BFLOAT16, NEAR_TIES, PROMPTS, differing

REFUSED = ("gpt_oss", "deepseek_v2", "deepseek_v3")  # vLLM itself cannot read them again, on a CPU
EXTENSION = "semmoe.runtime.engines.vllm_worker.ReplanWorker"


def start(folder: str, plan: str, dtype: str, returns: bool):
    import torch
    from vllm import LLM  # pyright: ignore

    torch.manual_seed(0)
    return LLM(
        f"{folder}/source",
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        enable_return_routed_experts=returns,
        load_format="semmoe",
        model_loader_extra_config={"plan": f"{folder}/{plan}"},
        worker_extension_cls=EXTENSION,
    )


def stop(llm) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore

    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def ask(llm) -> tuple[list, list]:
    """Greedy tokens and routed experts of each prompt."""
    from vllm import SamplingParams  # pyright: ignore

    asked = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], asked, use_tqdm=False)
    return [list(a.outputs[0].token_ids) for a in answers], [a.outputs[0].routed_experts for a in answers]


def weights(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def check(folder: str, family: str, returns: bool) -> dict:
    """What was found, with `wrong`: names of claims that do not hold."""
    from semmoe.runtime.engines.plan_files import read_plan_facts

    begin = time.monotonic()
    dtype = "bfloat16" if family in BFLOAT16 else "float32"
    plans = {name: read_plan_facts(f"{folder}/{name}") for name in ("p", "p2")}
    llm = start(folder, "p", dtype, returns)
    tokens, ids = ask(llm)
    before = llm.apply_model(weights)[0]
    refused = [llm.collective_rpc("semmoe_replan", args=(path,))[0] for path in (f"{folder}/p3", "/nowhere", folder)]
    untouched = llm.apply_model(weights)[0]
    still = ask(llm)[0]
    (done,) = llm.collective_rpc("semmoe_replan", args=(f"{folder}/p2",))
    llm.reset_prefix_cache()
    after_tokens, after_ids = ask(llm)
    after = llm.apply_model(weights)[0]
    stop(llm)
    if family in REFUSED:
        wrong = [] if not done["applied"] and same(before, after) and after_tokens == tokens else ["refused"]
        return {"family": family, "refusals": [done["reason"]], "wrong": wrong}
    del llm
    fresh_llm = start(folder, "p2", dtype, False)
    fresh = fresh_llm.apply_model(weights)[0]
    stop(fresh_llm)
    del fresh_llm
    rows, differ = differing(ids, after_ids, plans["p"], plans["p2"])

    claims = {
        "refused": all(not each["applied"] and each["reason"] for each in refused),
        "told what is held": all(each["plan"] == plans["p"].fingerprint for each in refused),
        "untouched": same(before, untouched) and still == tokens,
        "applied": done["applied"] and done["moved"] and done["plan"] == plans["p2"].fingerprint,
        "weights of a fresh start": same(after, fresh) and not same(after, before),
        "tokens": after_tokens == tokens,
        "ids": differ <= (NEAR_TIES * rows if family in BFLOAT16 else 0),
    }
    return {
        "family": family,
        "moved": done["moved"],
        "seconds_of_change": done["seconds"],
        "token_layers": rows,
        "differ": differ,
        "refusals": [each["reason"] for each in refused],
        "wrong": [name for name, holds in claims.items() if not holds],
        "seconds": round(time.monotonic() - begin, 1),
    }


if __name__ == "__main__":
    from importlib.metadata import version

    failed = []
    for name in sys.argv[2:]:
        home = f"{sys.argv[1]}/{name}"
        # From 0.31 on not on a CPU; vLLM captures in full attention only.
        sliding = json.loads(Path(home, "source/config.json").read_text()).get("sliding_window")
        try:
            result = check(home, name, version("vllm").startswith("0.30.") and not sliding)
        except Exception as error:
            result = {"family": name, "wrong": [f"{type(error).__name__}: {error}"[:300]]}
        failed += [name] if result["wrong"] else []
        print("RESULT", json.dumps(result), flush=True)
    sys.exit(f"not as claimed: {failed}" if failed else 0)
