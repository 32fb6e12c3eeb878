"""Communication time of each row of a report: dispatch and combine of one expert layer for a batch,
from LINK and the network.

Where all links are alike, LINK of the report says what the busiest rank moves. Where they differ by
class or pair, rows are counted between every two ranks again, under the same placements and homes.
Experts, packing and overlap are left out, so it is what the wire needs.

Shape letters: L MoE layers, R ranks, N nodes.
"""

from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.evaluate.pictures import Scored, scored_batch
from semmoe.solvers.evaluate.reached import rank_rows_LRR
from semmoe.solvers.evaluate.score_plan import baselines
from semmoe.solvers.place.replicas import serving_LRE
from semmoe.solvers.plan import Plan
from semmoe.solvers.schedule.simulate import Setting, simulate
from semmoe.solvers.time.layer_time import Network, layer_seconds
from semmoe.solvers.time.links import Links, communication_seconds_L, through_nodes

RowsBetweenRanks = dict[tuple[str, str], np.ndarray]  # (placement, schedule) -> rows per token, float64 [L, R, R]


def report_times(
    report: dict[str, Any],
    links: Links,
    *,
    row_bytes: float,
    result_bytes: float,
    rows: RowsBetweenRanks | None,
) -> dict[str, Any]:
    """The "times" of a report: milliseconds per layer of every row. `rows` is needed where links
    differ.

    `row_bytes` go out with a row, `result_bytes` come back. A batch has the report's `batch_tokens`
    tokens over all ranks.
    """
    tokens, ranks = report.get("setting", {}).get("batch_tokens", Setting().batch_tokens), report["ranks"]
    found = []
    for number, row in enumerate(report["rows"]):
        key = row["placement"], row["schedule"]
        if rows is None:
            network = Network(float(links.bytes_per_s_RR[0, -1]), float(links.latency_s_RR[0, -1]))
            seconds = [
                layer_seconds(
                    layer["rows"][number]["link"],
                    1.0,
                    tokens=tokens,
                    num_ranks=ranks,
                    top_k=0,
                    row_bytes=row_bytes,
                    result_bytes=result_bytes,
                    network=network,
                )
                for layer in report["layers"]
            ]
        elif key in rows:
            seconds = communication_seconds_L(
                rows[key] * tokens, links, row_bytes=row_bytes, result_bytes=result_bytes
            ).tolist()
        else:
            continue
        layers_ms = [1000 * value for value in seconds]
        found.append(
            {
                "placement": key[0],
                "schedule": key[1],
                "link": row["link"],
                "ms_per_layer": float(np.mean(layers_ms)),
                "ms_layers": layers_ms,
            }
        )
    return {"network": links.text, "batch_tokens": tokens, "row_bytes": row_bytes + result_bytes, "rows": found}


def rows_between_ranks(plan: Plan, trace: RoutingTrace, scored: Scored, report: dict[str, Any]) -> RowsBetweenRanks:
    """Rows of the report's placements and schedules, oracles left out. Raises InputError over 64
    ranks (rank_masks_T)."""
    topology, dispatch = plan.topology, plan.dispatch
    if topology.num_ranks > 64:
        raise InputError(
            f"--topology-bandwidth with links that differ: at most 64 ranks, the plan has {topology.num_ranks}"
        )
    setting = Setting(**report["setting"]) if "setting" in report else Setting()
    batch = scored_batch(trace, scored.score_B, seed=setting.seed)
    placements = {"plan": scored.placement, **baselines(scored.load_LE, topology, plan.model.n_group)}
    found = {}
    for row in report["rows"]:
        name, schedule, homes = row["placement"], row["schedule"], None
        if "oracle" in schedule or (schedule != "random" and scored.schedule is None):
            continue
        if schedule != "random" and scored.schedule is not None:
            sizes = {"batch_tokens": setting.batch_tokens, "window": setting.window, "seed": setting.seed}
            homes_TL = simulate(schedule, batch, placements[name], scored.schedule, **sizes).homes_TL
            homes = lambda _, homes_TL=homes_TL: homes_TL  # noqa: E731
        serving = serving_LRE(placements[name].hosts_LER, scored.load_LE, topology)
        rows_LRR = rank_rows_LRR([batch], trace.info, serving, dispatch=dispatch, homes=homes)
        if dispatch == "per-node":
            # Nodes in the place of ranks: one row per token and node.
            by_node = topology.node_of_R[serving]
            rows_LRN = rank_rows_LRR([batch], trace.info, by_node, dispatch=dispatch, homes=homes)
            rows_LRR = through_nodes(rows_LRR, rows_LRN[:, :, : topology.num_nodes], topology)
        if dispatch == "gather":
            rows_LRR = np.full(rows_LRR.shape, 1 / topology.num_ranks)
        found[name, schedule] = rows_LRR
    return found
