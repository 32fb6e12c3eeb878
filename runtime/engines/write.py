"""The small directory that a plug-in reads: a plan's scorer, placement and facts, without traces,
with test vectors for whoever writes the scorer in another language (docs/formats.md, "Plug-in
directory").

Shape letters: L MoE layers, E experts, R ranks, V ids of prompts.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.document import digest_of, line_per_key
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import check_directory_target, new_directory
from semmoe.runtime.engines.band import BAND, Band
from semmoe.runtime.engines.plan_files import (
    ENGINES,
    FACTS_FILE,
    FORMAT,
    LOAD,
    PLACEMENT,
    POWER,
    TABLES,
    TABLES_FILE,
    VECTORS_FILE,
    VERSION,
    PlanFacts,
    read_plan_facts,
)
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.solvers.plan import Plan

KINDS = {f"{engine}-plugin": engine for engine in ENGINES}  # of --to
VECTORS = "semmoe-plugin-vectors"
TOLERANCE = 1e-5  # of a score: sums may be taken in any order, in float32


def check_plugin_target(path: Path) -> None:
    """Raise InputError where another directory or file would be overwritten."""
    check_directory_target(path, what=f"the plug-in directory {path}")
    if path.exists() and any(path.iterdir()) and not (path / FACTS_FILE).is_file():
        raise InputError(f"{path} is there and semmoe export did not write it: choose another name")


def write_plugin_directory(plan: Plan, kind: str, output: Path, *, made_by: str = "") -> list[str]:
    """Write what the plug-in of an engine reads of a plan.

    Parameters:
        plan: with a request scorer, or a placement that a permutation expresses.
        kind: one of KINDS.
        output: the directory.
        made_by: the command.

    Returns lines for people: how to start the engine. Raises InputError where a plug-in could do
    nothing with the plan, and where the directory cannot be written.
    """
    from safetensors.numpy import save

    check_plugin_target(output)
    engine, scorer, permuted = KINDS[kind], plan.request_scorer, plan.outputs
    if scorer is None and not permuted["permuted_checkpoint"]:
        raise InputError(f"a plug-in could do nothing: the plan has no request scorer, and {permuted['why_not']}")
    arrays = {PLACEMENT: plan.placement.experts_LRS.astype(np.int32), LOAD: plan.load_LE.astype(np.int64)}
    arrays |= {name: getattr(scorer, name) for name in TABLES} if scorer is not None else {}
    tables = save({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())})
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "engine": engine,
        "made_by": made_by,
        "plan": plan.fingerprint,
        "model": plan.model.to_json(),
        "ranks": plan.placement.num_ranks,
        "slots": plan.placement.slots_per_rank,
        "replicas": plan.placement.num_replicas,
        "request_scorer": scorer is not None,
        "power": POWER,
        "permuted": {"possible": permuted["permuted_checkpoint"], "why_not": permuted["why_not"]},
        "tables_sha256": hashlib.sha256(tables).hexdigest(),
    }
    with new_directory(output, what=f"the plug-in directory {output}") as folder:
        (folder / TABLES_FILE).write_bytes(tables)
        (folder / FACTS_FILE).write_text(line_per_key({**facts, "digest": digest_of(facts)}), encoding="utf-8")
        read = read_plan_facts(folder)
        (folder / VECTORS_FILE).write_text(line_per_key(test_vectors(read)), encoding="utf-8")
    return launch_lines(read, engine, output)


def test_vectors(plan: PlanFacts) -> dict[str, Any]:
    """The content of vectors.json: prompts with their scores, and choices among loaded ranks."""
    vectors = []
    if plan.tables:
        scorer, band = PlanScorer.of(plan), Band(plan.num_ranks)
        draw = np.random.default_rng(0)
        for ids in _prompts(plan.tables["ids_V"], draw):
            scores_R = scorer.scores(ids)
            in_flight_R = draw.integers(0, 4 * len(ids), plan.num_ranks)
            choice = band.choose(scores_R, in_flight_R, tokens=len(ids))
            vectors.append(
                {
                    "ids": ids.tolist(),
                    "scores": scores_R.tolist(),
                    "expected_lar": [scorer.expected_lar(scores_R, rank) for rank in range(plan.num_ranks)],
                    "tokens_in_flight": in_flight_R.tolist(),
                    "rank": choice.rank,
                    "decision": choice.decision,
                }
            )
    return {"format": VECTORS, "version": VERSION, "tolerance": TOLERANCE, "band": BAND, "vectors": vectors}


def _prompts(ids_V: np.ndarray, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """Prompts that show each part of the formula, int64 [T] each: one id; ids that repeat; ids
    that the plan does not know among others; nothing known at all."""
    unknown = int(ids_V[-1]) + 1
    yield ids_V[:1].astype(np.int64)
    for length in (2, 7, 30, 120):
        few = draw.choice(ids_V, max(1, length // 2))
        yield draw.choice(few, length).astype(np.int64)
    mixed = draw.choice(ids_V, 16).astype(np.int64)
    mixed[::3] = unknown
    yield mixed
    yield np.full(3, unknown)


def launch_lines(plan: PlanFacts, engine: str, output: Path) -> list[str]:
    """How to start the engine with the plug-in, and what will be active."""
    import shlex

    start = f"SEMMOE_PLAN={shlex.quote(str(output.absolute()))}"
    ranks = f"{plan.num_ranks}, or a number that divides it"
    if engine == "sglang":
        return [
            f"pip install semmoe beside SGLang, then start it with: {start} python -m sglang.launch_server ... "
            f"--dp-size D --enable-dp-attention (D = {ranks}); experts are placed by semmoe reshard or --init-expert-location"
        ]
    lines = [
        f"pip install semmoe beside vLLM, then start it with: {start} vllm serve ... --data-parallel-size D "
        f"--enable-expert-parallel (D = {ranks})"
        + ("" if plan.why_not_permuted else "; --load-format semmoe places the experts while the weights are read")
    ]
    if plan.why_not_permuted:
        lines.append(f"--load-format semmoe cannot place these experts: {plan.why_not_permuted}")
    if not plan.tables:
        lines.append("the plan has no request scorer: the plug-in places experts, and chooses no rank")
    return lines
