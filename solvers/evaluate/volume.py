"""Rows and bytes that a token sends at a layer under each dispatch kind, from a report's row.

What each kind counts: docs/concepts.md; a row is one hidden state, sent at dispatch and returned at
combine.
"""

from typing import Any

from semmoe.solvers.evaluate.metrics import DISPATCH_KINDS


def rows_per_token(row: dict[str, Any], *, top_k: int, num_ranks: int) -> dict[str, float]:
    """Remote rows per token and layer of a report's row, by dispatch kind. "gather": every other
    rank gets every token."""
    rows = {
        "per-rank": row["rem"],
        "per-expert": top_k * (1 - row["lar"]),
        "per-node": row["node"],
        "gather": num_ranks - 1.0,
    }
    assert rows.keys() == DISPATCH_KINDS.keys()
    return rows


def row_bytes(hidden_size: int, *, dispatch_bytes: float = 2.0, combine_bytes: float = 2.0) -> float:
    """Bytes of one row there and back; 2 and 2 = bfloat16 both ways, 1 and 2 = float8 dispatch
    (scales left out)."""
    return hidden_size * (dispatch_bytes + combine_bytes)


def dispatch_costs(
    report: dict[str, Any],
    *,
    schedule: str,
    top_k: int,
    hidden_size: int,
    dispatch_bytes: float,
) -> dict[str, Any]:
    """Bytes that a token sends and gets back over all layers, by dispatch kind, before and after;
    the "costs" of a report.

    `schedule`: the one to show beside random homes.
    """
    ranks, num_layers = report["ranks"], len(report["layers"])
    rows = {(r["placement"], r["schedule"]): r for r in report["rows"]}
    shown = {"contiguous": rows["contiguous", "random"], "plan": rows["plan", "random"]}
    if schedule != "random":
        shown[f"plan, {schedule}"] = rows["plan", schedule]
    per_row = row_bytes(hidden_size, dispatch_bytes=dispatch_bytes) * num_layers
    return {
        "hidden_size": hidden_size,
        "dispatch_bytes": dispatch_bytes,
        "rows": [
            {
                "dispatch": kind,
                "bytes": {
                    name: rows_per_token(row, top_k=top_k, num_ranks=ranks)[kind] * per_row
                    for name, row in shown.items()
                },
            }
            for kind in DISPATCH_KINDS
            if kind != "per-node" or report["nodes"] > 1
        ],
    }
