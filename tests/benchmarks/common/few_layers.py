"""A trace with some of its layers, for benchmarks whose time grows with their number."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from semmoe.profiles.trace import RoutingTrace
from semmoe.profiles.trace_writer import TraceWriter


def few_layers(trace: str, path: Path, num_layers: int) -> RoutingTrace:
    """The trace at `path` with `num_layers` layers of the given one, spread evenly."""
    whole = RoutingTrace.open(trace)
    layers = np.unique(np.linspace(0, whole.info.num_layers - 1, num_layers).astype(int))
    numbers = tuple(whole.info.model_layers[layer] for layer in layers)
    with TraceWriter(path, replace(whole.info, num_layers=len(layers), model_layers=numbers)) as out:
        for batch in whole.batches():
            for b in range(batch.num_requests):
                out.add(
                    batch.request_ids[b],
                    batch.expert_ids_TLK[batch.starts_B1[b] : batch.starts_B1[b + 1], layers],
                    domain=batch.domains[b],
                    token_ids=batch.sequence(b) if len(batch.sequence(b)) else None,
                    num_prompt_tokens=int(batch.num_prompt_tokens_B[b]),
                    first_position=int(batch.first_position_B[b]),
                )
    return RoutingTrace.open(path)
