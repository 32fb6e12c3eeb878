#!/usr/bin/env python3
"""A plan changed while vLLM runs, by semmoe's worker extension: greedy tokens equal before and
after, weights to the bit those of a fresh start by the new plan, ids of experts in its labels.

    vllm-venv/bin/python replan_live.py FOLDER FAMILY...

FOLDER holds FAMILY/source, p, p2 and p3 (tiny_families.py makes them). Prints one JSON object per
family. One engine at a time, without subprocesses.
"""

import json
import sys
import time
from pathlib import Path

from load_formats import BFLOAT16, NEAR_TIES, ask, clean_up, differing, start

REFUSED = ("gpt_oss", "deepseek_v2", "deepseek_v3")  # vLLM itself cannot read them again, on a CPU
EXTENSION = "semmoe.runtime.engines.vllm_worker.ReplanWorker"


def placed(folder: str, plan: str, dtype: str, returns: bool):
    """A server's vLLM, placed at load, that takes another plan."""
    loading = {"model_loader_extra_config": {"plan": f"{folder}/{plan}"}, "worker_extension_cls": EXTENSION}
    return start(f"{folder}/source", dtype, returns, load_format="semmoe", **loading)


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
    llm = placed(folder, "p", dtype, returns)
    tokens, ids = ask(llm)
    before = llm.apply_model(weights)[0]
    refused = [llm.collective_rpc("semmoe_replan", args=(path,))[0] for path in (f"{folder}/p3", "/nowhere", folder)]
    untouched = llm.apply_model(weights)[0]
    still = ask(llm)[0]
    (done,) = llm.collective_rpc("semmoe_replan", args=(f"{folder}/p2",))
    llm.reset_prefix_cache()
    after_tokens, after_ids = ask(llm)
    after = llm.apply_model(weights)[0]
    del llm
    clean_up()
    if family in REFUSED:
        wrong = [] if not done["applied"] and same(before, after) and after_tokens == tokens else ["refused"]
        return {"family": family, "refusals": [done["reason"]], "wrong": wrong}
    fresh_llm = placed(folder, "p2", dtype, False)
    fresh = fresh_llm.apply_model(weights)[0]
    del fresh_llm
    clean_up()
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
