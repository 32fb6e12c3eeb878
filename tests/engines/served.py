#!/usr/bin/env python3
"""What tests/engines/all asks before and after a server: served.py split TEXTS FOLDER, and
served.py table MODEL FOLDER, which prints one row per claim and fails where one does not hold."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from semmoe.profiles.trace import RoutingTrace, TraceBatch


def split(texts: str, folder: Path) -> None:
    """fit.jsonl and rest.jsonl: texts two by two, those of the rest in a random order."""
    with (gzip.open if texts.endswith(".gz") else open)(texts, "rt") as file:
        rows = file.readlines()
    rest = [row for i, row in enumerate(rows) if i // 2 % 2]
    random.Random(0).shuffle(rest)
    (folder / "fit.jsonl").write_text("".join(row for i, row in enumerate(rows) if not i // 2 % 2))
    (folder / "rest.jsonl").write_text("".join(rest))


def differing(model: str, batch: TraceBatch) -> tuple[int, int]:
    """Token-layers of a trace, and those where the model in Transformers chooses other experts
    for the same ids."""
    import torch
    from transformers import AutoModelForCausalLM

    from semmoe.profiles.capture.batches import TokenRequest
    from semmoe.profiles.capture.hooks import record_prefill, start_recording

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    recording = start_recording(loaded, model, weights=False)
    rows = wrong = 0
    for b in range(batch.num_requests):
        mine_TLK = batch.expert_ids_TLK[batch.starts_B1[b] : batch.starts_B1[b + 1]]
        request = TokenRequest(batch.request_ids[b], "", batch.sequence(b)[: len(mine_TLK)])
        (found,) = record_prefill(loaded, recording, [request], check=lambda: None)
        differs = (np.sort(found.expert_ids_TLK, -1) != np.sort(mine_TLK, -1)).any(-1)
        rows, wrong = rows + differs.size, wrong + int(differs.sum())
    return rows, wrong


def report(plan: Path, trace: Path) -> dict[str, dict]:
    """Rows of `semmoe report` for the plan, by schedule."""
    words = [sys.executable, "-m", "semmoe", "report", str(plan), str(trace), "--window", "32", "--json"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {row["schedule"]: row for row in json.loads(printed)["rows"] if row["placement"] == "plan"}


def counted(folder: Path) -> dict[str, float]:
    """Requests by decision between the two looks at /metrics."""
    pattern = re.compile(r'^semmoe_requests_total\{decision="(\w+)"\} (\S+)', re.MULTILINE)
    before, after = (dict(pattern.findall((folder / f"metrics.{when}").read_text())) for when in ("before", "after"))
    return {name: float(after[name]) - float(before[name]) for name in after}


def table(model: str, folder: Path) -> bool:
    turn, plugin, recorded = (RoutingTrace.open(folder / name) for name in ("turn", "plugin", "recorded"))
    by_plugin = recorded.load()
    served = by_plugin.rank_of_B
    assert served is not None
    keep_B = np.arange(by_plugin.num_requests) >= turn.num_requests  # the server recorded both runs, in this order
    tokens_R = np.bincount(served[keep_B], np.diff(by_plugin.starts_B1)[keep_B], 2)
    in_turn, as_served = report(folder / "p", folder / "turn"), report(folder / "p", folder / "recorded")
    lar = local_share(folder / "p", by_plugin, keep_B)
    rows, wrong = differing(model, plugin.load())
    decisions = counted(folder)
    claims = [
        ("requests collected, none left out", f"{plugin.num_requests}", plugin.num_requests == turn.num_requests),
        ("token-layers with other experts than Transformers", f"{wrong} of {rows}", wrong == 0),
        ("served LAR in turn", f"{in_turn['as-served']['lar']:.3f}", True),
        ("served LAR by the plug-in", f"{lar:.3f}", lar >= 0.64),
        ("tokens max/mean", f"{tokens_R.max() / tokens_R.mean():.3f}", tokens_R.max() / tokens_R.mean() <= 1.10),
        (
            "predicted (dp-scorer, windows of 32)",
            f"{as_served['dp-scorer']['lar']:.3f}",
            abs(as_served["dp-scorer"]["lar"] - lar) <= 0.03,
        ),
        ("decisions", json.dumps(decisions), decisions["affine"] + decisions["spilled"] == plugin.num_requests),
    ]
    for name, value, holds in claims:
        print(f"| {name} | {value} | {'' if holds else 'does not hold'} |")
    return all(holds for *_, holds in claims)


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
