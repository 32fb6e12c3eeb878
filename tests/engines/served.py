#!/usr/bin/env python3
"""What tests/engines/all does before and after a server runs: served.py split TEXTS FOLDER; served.py
table MODEL FOLDER, which prints one row per claim and fails where one does not hold."""

import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from semmoe.profiles.trace import RoutingTrace, TraceBatch

CLOSE = 1e-4  # router logits, in float32: sums in another order change the fifth digit after many layers
MOST_TIES = 1e-4  # of the token-layers


def split(texts: str, folder: Path) -> None:
    """fit.jsonl and rest.jsonl: texts two by two, those of the rest in a random order."""
    with (gzip.open if texts.endswith(".gz") else open)(texts, "rt") as file:
        rows = file.readlines()
    rest = [row for i, row in enumerate(rows) if i // 2 % 2]
    random.Random(0).shuffle(rest)
    (folder / "fit.jsonl").write_text("".join(row for i, row in enumerate(rows) if not i // 2 % 2))
    (folder / "rest.jsonl").write_text("".join(rest))


def differing(model: str, batch: TraceBatch) -> tuple[int, int, list[float]]:
    """Token-layers of a trace; those where the model in Transformers chooses other experts for the
    same ids; and of these, where nothing before them in the request differs, how far the last
    chosen router logit is over the first left out. Sums in another order turn near ties around, and
    what another expert adds reaches the layers and tokens after it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    top_k = batch.expert_ids_TLK.shape[2]
    rows, wrong, margins = 0, 0, []
    for b in range(batch.num_requests):
        mine_TLK = batch.expert_ids_TLK[batch.starts_B1[b] : batch.starts_B1[b + 1]]
        ids = torch.tensor(batch.sequence(b)[: len(mine_TLK)].tolist())[None]
        with torch.inference_mode():
            logits_TLE = torch.stack(loaded(ids, output_router_logits=True).router_logits, dim=1)
        ordered = logits_TLE.sort(dim=-1, descending=True)
        found_TLK = ordered.indices[..., :top_k].numpy()
        differs_TL = (np.sort(found_TLK, -1) != np.sort(mine_TLK, -1)).any(-1)
        margin_TL = (ordered.values[..., top_k - 1] - ordered.values[..., top_k]).numpy()
        rows, wrong = rows + differs_TL.size, wrong + int(differs_TL.sum())
        # Layer by layer: what differs in lower layers of this token or of tokens before it.
        before_TL = np.logical_or.accumulate(differs_TL, axis=0)
        caused_TL = np.zeros_like(differs_TL)
        caused_TL[:, 1:] = np.logical_or.accumulate(before_TL, axis=1)[:, :-1]
        margins += margin_TL[differs_TL & ~caused_TL].tolist()
    return rows, wrong, margins


def report(plan: Path, trace: Path) -> dict[str, dict]:
    """Rows of `semmoe report` for the plan, by schedule."""
    words = [sys.executable, "-m", "semmoe", "report", str(plan), str(trace), "--window", "32", "--json"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {row["schedule"]: row for row in json.loads(printed)["rows"] if row["placement"] == "plan"}


def counted(folder: Path, metric: str, label: str) -> Counter[str]:
    """What a counter has gained between the two looks at /metrics, by one of its labels."""
    pattern = re.compile(rf'^{metric}{{.*?{label}="(\w+)".*}} (\S+)', re.MULTILINE)
    found: Counter[str] = Counter()
    for when, sign in (("before", -1), ("after", 1)):
        for name, value in pattern.findall((folder / f"metrics.{when}").read_text()):
            found[name] += sign * round(float(value))
    return found


def read_texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def told(claims: list[tuple[str, object, bool]]) -> bool:
    """Print the rows; whether all claims hold."""
    for name, value, holds in claims:
        print(f"| {name} | {value} | {'' if holds else 'does not hold'} |")
    return all(holds for *_, holds in claims)


def table(model: str, folder: Path) -> bool:
    turn, plugin, recorded = (RoutingTrace.open(folder / name) for name in ("turn", "plugin", "recorded"))
    by_plugin = recorded.load()
    served = by_plugin.rank_of_B
    assert served is not None
    # The server recorded all that it served, and last what the plug-in sent.
    keep_B = np.arange(by_plugin.num_requests) >= by_plugin.num_requests - plugin.num_requests
    tokens_R = np.bincount(served[keep_B], np.diff(by_plugin.starts_B1)[keep_B], 2)
    in_turn, as_served = report(folder / "p", folder / "turn"), report(folder / "p", folder / "recorded")
    lar = local_share(folder / "p", by_plugin, keep_B)
    rows, wrong, margins = differing(model, plugin.load())
    decisions = counted(folder, "semmoe_requests_total", "decision")
    ran = counted(folder, "vllm:request_success_total", "engine")
    recorded_R = np.bincount(served[keep_B], minlength=2).tolist()
    claims: list[tuple[str, object, bool]] = [
        ("requests collected, none left out", f"{plugin.num_requests}", plugin.num_requests == turn.num_requests),
        ("token-layers with other experts than Transformers", f"{wrong} of {rows}", wrong <= MOST_TIES * rows),
        (
            "the first of them in each request: router logits apart",
            f"{len(margins)}, at most {max(margins, default=0.0):.1e}",
            max(margins, default=0.0) <= CLOSE,
        ),
        ("served LAR in turn", f"{in_turn['as-served']['lar']:.3f}", True),
        ("served LAR by the plug-in", f"{lar:.3f}", lar >= 0.64),
        ("tokens max/mean", f"{tokens_R.max() / tokens_R.mean():.3f}", tokens_R.max() / tokens_R.mean() <= 1.10),
        (
            "predicted (dp-scorer, windows of 32)",
            f"{as_served['dp-scorer']['lar']:.3f}",
            abs(as_served["dp-scorer"]["lar"] - lar) <= 0.03,
        ),
        (
            "requests by rank, recorded and by vLLM's counters",
            f"{recorded_R}, {[ran['0'], ran['1']]}",
            recorded_R == [ran["0"], ran["1"]],
        ),
        ("decisions", json.dumps(decisions), decisions["affine"] + decisions["spilled"] == plugin.num_requests),
    ]
    return told(claims)


def local_share(plan: Path, batch: TraceBatch, keep_B: np.ndarray) -> float:
    """Share of the activations of some requests whose expert is on the rank that served them."""
    from semmoe.solvers.plan import Plan

    hosts_LER = Plan.load(plan).placement.hosts_LER
    request_T, layers = batch.request_of_T, np.arange(len(hosts_LER))[None, :, None]
    assert batch.rank_of_B is not None
    rank_T = batch.rank_of_B[request_T]
    local_TLK = hosts_LER[layers, batch.expert_ids_TLK, rank_T[:, None, None]]
    return float(local_TLK[keep_B[request_T]].mean())


if __name__ == "__main__":
    if sys.argv[1:2] == ["split"]:
        split(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["table"]:
        sys.exit(0 if table(sys.argv[2], Path(sys.argv[3])) else 1)
    else:
        sys.exit(__doc__)
