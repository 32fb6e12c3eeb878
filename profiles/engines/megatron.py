"""Router traces of Megatron-Core (`--moe-routing-trace-path DIR`, transformer/moe/router_trace.py).

One file a rank, router_trace_rank{r}.jsonl, one line for each step and MoE layer, with the ids of
all tokens of the step. Dense layers have no lines. A step (a micro-batch of it in training) becomes
one request: Megatron names neither requests nor tokens, and interleaves the sequences of a batch.
Lines of multi-token-prediction layers are left out: those layers serve drafts and are not placed.
So is a step that lacks layers of the first one: its lines are cut.
Ranks of a pipeline hold different layers of the same tokens and cannot be joined.

Shape letters: T tokens of a step, L MoE layers of the rank, K top-k.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import MOST
from semmoe.profiles.engines.records import EngineRequest, LeftOut, integer, integer_array, json_objects
from semmoe.profiles.errors import InputError

CUT_STEPS = "steps that lack layers"
MTP_LINES = "lines of multi-token-prediction layers"


def trace_files(files: list[Path]) -> list[Path]:
    """The files themselves, with a directory standing for the rank files in it."""
    found = []
    for file in files:
        ranks = sorted(file.glob("router_trace_rank*.jsonl*")) if file.is_dir() else [file]
        if not ranks:
            raise InputError(f"{file} holds no router_trace_rank*.jsonl")
        found += ranks
    return found


def read_megatron(files: list[Path], facts: dict[str, Any] | None, dropped: LeftOut) -> Iterator[EngineRequest]:
    """One request for each step of each rank; a layer that comes again in a step opens the next
    micro-batch."""
    expected: set[int] = set()
    for file in trace_files(files):
        for request in _steps(file, dropped):
            layers = set(request.layer_ids or ())
            expected = expected or layers
            if layers < expected:
                lacking = ", ".join(map(str, sorted(expected - layers)))
                dropped.leave(
                    CUT_STEPS, InputError(f"{request.where}: a step that is cut off, it lacks layer {lacking}")
                )
            else:
                yield request


def _steps(file: Path, dropped: LeftOut) -> Iterator[EngineRequest]:
    """The steps of a file, whole or not."""
    layers: dict[int, np.ndarray] = {}
    key: tuple[int, int] | None = None
    batch, opened = 0, ""
    for where, line in json_objects(file, dropped):
        if line.get("block", "decoder") == "mtp":
            dropped[MTP_LINES] += 1
            continue
        layer, ids_TK = _line(where, line)
        here = (integer(where, line, "rank") or 0, integer(where, line, "step") or 0)
        if layers and (here != key or layer in layers):
            yield _step(opened, key, batch, layers)
            batch = batch + 1 if here == key else 0
            layers = {}
        if not layers:
            key, opened = here, where
        layers[layer] = ids_TK
        if len(ids_TK) != len(next(iter(layers.values()))):
            raise InputError(
                f"{where}: layer {layer} has {len(ids_TK)} tokens, the first layer of step {here[1]} "
                f"{len(next(iter(layers.values())))}"
            )
    if layers:
        yield _step(opened, key, batch, layers)


def _line(where: str, line: dict[str, Any]) -> tuple[int, np.ndarray]:
    layer, num_tokens, top_k = (integer(where, line, name) for name in ("layer", "num_tokens", "topk"))
    if layer is not None and layer > MOST:
        raise InputError(f"{where}: layer is {layer}, expected the number of a layer of the model")
    if layer is None or line.get("top_indices") is None or line.get("block", "decoder") != "decoder":
        raise InputError(f"{where}: no layer, no top_indices, or a block other than decoder and mtp")
    value = line["top_indices"]
    if not value and num_tokens == 0:
        return layer, np.empty((0, top_k or 1), np.int64)
    ids_TK = integer_array(where, "top_indices", value, 2)
    expected = (num_tokens if num_tokens is not None else len(ids_TK), top_k if top_k is not None else ids_TK.shape[1])
    if ids_TK.shape != expected:
        raise InputError(
            f"{where}: top_indices has shape {list(ids_TK.shape)}, num_tokens and topk say {list(expected)}"
        )
    return layer, ids_TK


def _step(where: str, key: tuple[int, int] | None, batch: int, layers: dict[int, np.ndarray]) -> EngineRequest:
    rank, step = key or (0, 0)
    order = sorted(layers)
    widths = {ids_TK.shape[1] for ids_TK in layers.values()}
    if len(widths) > 1:
        raise InputError(f"{where}: layers of one step route to {sorted(widths)} experts; a trace has one top-k")
    return EngineRequest(
        where=where,
        expert_ids_TLK=np.stack([layers[layer] for layer in order], axis=1),
        request_id=f"rank{rank}-step{step}" + (f"-batch{batch}" if batch else ""),
        layer_ids=tuple(order),
    )
