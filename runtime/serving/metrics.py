"""What a run did, from the counters and clocks of all ranks: one JSON object.

Shape letters: R ranks, L MoE layers.
"""

from typing import Any

import numpy as np

from semmoe.runtime.layer.counters import Counters, stacked


def traffic_metrics(counters: list[Counters], model_layers: tuple[int, ...]) -> dict[str, Any]:
    """LAR, REM and balance as executed (means over layers), rows and bytes in all and per layer and
    link.

    Rows are those of dispatch (as many come back); bytes count both ways. `links`[a][b]: rows from
    rank a to rank b.
    """
    all_ranks = stacked(counters)
    tokens_L = np.maximum(all_ranks["tokens_L"].sum(0), 1)
    rows_RLR, bytes_RLR = all_ranks["rows_LR"], all_ranks["bytes_LR"]
    served_RL, home_R = all_ranks["served_L"], all_ranks["tokens_L"][:, 0]
    lar_L = all_ranks["local_L"].sum(0) / np.maximum(all_ranks["activations_L"].sum(0), 1)
    return {
        "lar": float(lar_L.mean()),
        "rem": float((rows_RLR.sum((0, 2)) / tokens_L).mean()),
        "rows_sent": int(rows_RLR.sum()),
        "bytes_sent": int(bytes_RLR.sum()),
        "load_imbalance": float((served_RL.max(0) / np.maximum(served_RL.mean(0), 1e-12)).mean()),
        "token_imbalance": float(home_R.max() / max(home_R.mean(), 1e-12)),
        "layers": [
            {
                "model_layer": number,
                "rows_sent": int(rows_RLR[:, layer].sum()),
                "bytes_sent": int(bytes_RLR[:, layer].sum()),
                "links": rows_RLR[:, layer].tolist(),
            }
            for layer, number in enumerate(model_layers)
        ],
    }


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second; 0 where nothing ran."""
    return tokens / seconds if seconds > 0 else 0.0
