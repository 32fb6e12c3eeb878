"""Communication time of each row of a report: dispatch and combine of one expert layer for a batch,
from LINK and the network.

Where all links are alike, LINK of the report says what the busiest rank moves. Where they differ by
class or pair, rows are counted between every two ranks again, under the same placements and homes.
Experts, packing and overlap are left out, so it is what the wire needs.

Shape letters: L MoE layers, R ranks, N nodes.
"""

from dataclasses import dataclass

import numpy as np

from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.pictures import Scored, simulated_homes_TL
from semmoe.solvers.evaluate.reached import rank_rows_LRR
from semmoe.solvers.evaluate.report import Key, Report, RowTime, Times
from semmoe.solvers.evaluate.score_plan import scored_batch
from semmoe.solvers.time.layer_time import LayerWork, Network, layer_seconds
from semmoe.solvers.time.links import Links, communication_seconds_L, through_nodes


@dataclass(frozen=True)
class RowSize:
    """Bytes of a row: what goes out on dispatch, what comes back, and where the numbers are
    from."""

    hidden_size: int
    out: float
    back: float
    assumption: str


def report_times(report: Report, links: Links, size: RowSize, rows: dict[Key, np.ndarray] | None) -> Times:
    """Milliseconds per layer of every row of a report, for a batch of its `batch_tokens` tokens
    over all ranks.

    `rows`: rows between ranks (`rows_between_ranks`), needed where links differ; rows of a report
    that it lacks are left out.
    """
    tokens = report.setting.batch_tokens
    found = []
    for number, row in enumerate(report.rows):
        if rows is None:
            work = LayerWork(tokens, report.ranks, size.out, size.back)
            network = Network(float(links.bytes_per_s_RR[0, -1]), float(links.latency_s_RR[0, -1]))
            seconds = [layer_seconds(layer.rows[number].link, 1.0, work, network) for layer in report.layers]
        elif row.key in rows:
            sent_LRR = rows[row.key] * tokens
            seconds = communication_seconds_L(sent_LRR, links, row_bytes=size.out, result_bytes=size.back).tolist()
        else:
            continue
        layers_ms = [1000 * value for value in seconds]
        found.append(RowTime(*row.key, row.link, float(np.mean(layers_ms)), layers_ms))
    return Times(links.text, tokens, size.out + size.back, found, size.hidden_size, size.assumption)


def rows_between_ranks(
    trace: RoutingTrace, scored: Scored, report: Report, beside: dict[str, Deployment]
) -> dict[Key, np.ndarray]:
    """Rows per token from rank to rank, float64 [L, R, R], of the report's placements and
    schedules, oracles left out. `beside`: what is deployed in the rows that are not the plan's
    (`deployments_beside`)."""
    deployment = scored.deployment
    topology, dispatch = deployment.topology, deployment.dispatch
    batch = scored_batch([trace], [scored.score_B], seed=report.setting.seed)
    deployments = {"plan": deployment, **beside}
    found = {}
    for row in report.rows:
        deployed = deployments.get(row.placement)
        if deployed is None or row.is_oracle or (row.schedule != "random" and deployed.schedule is None):
            continue
        homes_TL = simulated_homes_TL(deployed, row.schedule, batch, report.setting)
        serving = deployed.serving_LRE
        moving = deployed.moving
        rows_LRR = rank_rows_LRR(batch, serving, dispatch=dispatch, homes_TL=homes_TL, moving=moving)
        if dispatch == "per-node":
            # Nodes in the place of ranks: one row per token and node.
            rows_LRN = rank_rows_LRR(batch, topology.node_of_R[serving], dispatch=dispatch, homes_TL=homes_TL)
            rows_LRR = through_nodes(rows_LRR, rows_LRN[:, :, : topology.num_nodes], topology)
        if dispatch == "gather":
            rows_LRR = np.full(rows_LRR.shape, 1 / topology.num_ranks)
        found[row.key] = rows_LRR
    return found
