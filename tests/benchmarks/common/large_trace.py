"""Writes a trace of any size from a made-up model (routing_world.py), to time `semmoe place` from end to end.

    python tests/benchmarks/common/large_trace.py DIR --tokens 1000000
    python tests/benchmarks/common/large_trace.py DIR --tokens 1000000 --copies 20      # twenty million tokens

`--copies` repeats the requests under other names, for what depends on size alone: time and memory. Such a trace says nothing about
quality, as every held-out request has twins among the others.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from routing_world import draw_tokens, route_layer

from semmoe.profiles.mapped import mapped_empty
from semmoe.profiles.trace import TraceInfo
from semmoe.profiles.trace_writer import TraceWriter

REQUEST_TOKENS = 256
PROMPT_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--vocab", type=int, default=129_280)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    info = TraceInfo(
        "made-up",
        a.layers,
        a.experts,
        a.top_k,
        tuple(range(a.layers)),
        vocab_size=a.vocab,
        n_group=a.groups,
        topk_group=a.groups,
    )
    tokens = draw_tokens(a.tokens, a.vocab, tokens_per_request=REQUEST_TOKENS, seed=a.seed)
    ids_LTK = mapped_empty((a.layers, a.tokens, a.top_k), info.id_dtype)
    for layer in range(a.layers):
        ids_LTK[layer] = route_layer(tokens, a.vocab, a.experts, a.top_k, num_groups=a.groups, layer=layer, seed=a.seed)
    with TraceWriter(a.path, info) as writer:
        for copy in range(a.copies):
            for start in range(0, a.tokens, REQUEST_TOKENS):
                rows = slice(start, min(start + REQUEST_TOKENS, a.tokens))
                writer.add(
                    f"{copy}-{start}",
                    np.ascontiguousarray(ids_LTK[:, rows].transpose(1, 0, 2)),
                    domain=f"topic {tokens.topic_T[start] % 3}",
                    token_ids=tokens.token_ids_T[rows],
                    num_prompt_tokens=min(PROMPT_TOKENS, rows.stop - start),
                )


if __name__ == "__main__":
    main()
