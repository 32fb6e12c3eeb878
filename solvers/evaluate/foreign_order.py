"""Whether a trace of which nobody said who numbered its experts is in the order of a plan: a server
that runs a permuted reshard reports the numbers of the reshard.

Read as the model's, such ids are another routing, and a plan is scored on nonsense. Two things tell
that: loads, where some experts are busier than others, and how many ranks a token reaches, where
the plan has brought together what is chosen together. Both must not speak against it, and one must
speak clearly for it.

Shape letters: T tokens, L MoE layers, K top-k, E experts, R ranks.
"""

from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import TraceBatch, TraceInfo
from semmoe.solvers.evaluate.reached import reached_T
from semmoe.solvers.place.baselines import place_contiguous
from semmoe.solvers.plan import Plan

MOST_TOKENS = 20_000  # that are looked at
LEAST_SAVING = 0.03  # share of the ranks reached that a plan must save for its saving to tell anything
LEAST_SKEW = 0.005  # nats per activation by which the plan's loads differ from equal ones, for the same
CLEARLY = 0.5  # of what the plan's own traffic showed


class Fit(NamedTuple):
    """How well a trace fits an order of the experts, as shares of how well the plan's own traffic
    fits the model's: 1 where it is as good, 0 where it is no better than nothing. None where the
    plan tells nothing."""

    loads: float | None
    saving: float | None


def refuse_foreign_order(plan: Plan, batch: TraceBatch, info: TraceInfo, where: str) -> None:
    """Raise InputError, with the options to use, where the ids of a trace fit the order of experts
    of a permuted reshard of this plan far better than the model's.

    Traces that say in which numbering they are pass, as do plans that no permutation expresses.
    """
    ids_TLK = batch.expert_ids_TLK[:: max(1, batch.num_tokens // MOST_TOKENS)]
    counts = [np.bincount(ids_TLK[:, layer].ravel(), minlength=info.num_experts) for layer in range(info.num_layers)]
    refuse_foreign_loads(plan, np.stack([c[: info.num_experts] for c in counts]), info, where, ids_TLK)


def refuse_foreign_loads(
    plan: Plan, load_LE: np.ndarray, info: TraceInfo, where: str, ids_TLK: np.ndarray | None = None
) -> None:
    """`refuse_foreign_order` by loads, activations of each expert, integers; and by the ids
    themselves where there are any."""
    order_LE = _order_of(plan)
    if info.numbering is not None or order_LE is None:
        return
    loads = _loads_fit(plan.load_LE, load_LE, order_LE)
    saved = _saving_fit(plan, ids_TLK, order_LE) if ids_TLK is not None and len(ids_TLK) else (None, None)
    model, placed = Fit(loads[0], saved[0]), Fit(loads[1], saved[1])
    if is_foreign(model, placed):
        raise InputError(
            f"{where}: its expert ids fit the order of a checkpoint resharded by this plan far better than the model's, and "
            "nothing says which checkpoint served them: import again with --model CHECKPOINT, the resharded one (ids are "
            "mapped back) or the model itself (ids are taken as they are)"
        )


def is_foreign(model: Fit, placed: Fit) -> bool:
    """Whether the plan's order fits far better than the model's: one measure says so clearly, the
    other not the contrary."""
    pairs = [(own, other) for own, other in zip(model, placed, strict=True) if own is not None and other is not None]
    clear = any(other >= CLEARLY and own <= 0 for own, other in pairs)
    return clear and all(other >= own - 0.1 for own, other in pairs)


def _order_of(plan: Plan) -> np.ndarray | None:
    """The old number of every new one, int64 [L, E]; None where the plan is no permutation, or one
    that moves nothing."""
    placement = plan.placement
    if placement.num_ranks * placement.slots_per_rank != placement.num_experts:
        return None
    order_LE = placement.experts_LRS.reshape(placement.num_layers, -1).astype(np.int64)
    return None if (order_LE == np.arange(placement.num_experts)).all() else order_LE


def _loads_fit(plan_LE: np.ndarray, load_LE: np.ndarray, order_LE: np.ndarray) -> tuple[float | None, float | None]:
    """Fit of loads in the model's order and in the plan's: by how many nats an activation of the
    trace is less surprising to the plan's loads than to equal ones, mean over layers."""
    smooth_LE = plan_LE + 1.0
    log_LE = np.log(smooth_LE / smooth_LE.mean(axis=1, keepdims=True))
    own = float((smooth_LE / smooth_LE.sum(axis=1, keepdims=True) * log_LE).sum(axis=1).mean())
    counted_L = load_LE.any(axis=1)
    if own < LEAST_SKEW or not counted_L.any():
        return None, None
    share_LE = load_LE[counted_L] / load_LE[counted_L].sum(axis=1, keepdims=True)
    placed_LE = np.take_along_axis(log_LE, order_LE, axis=1)
    model, plan = (float((share_LE * table[counted_L]).sum(axis=1).mean()) / own for table in (log_LE, placed_LE))
    return model, plan


def _saving_fit(plan: Plan, ids_TLK: np.ndarray, order_LE: np.ndarray) -> tuple[float | None, float | None]:
    """Fit of the tokens in both orders: how much fewer ranks they reach by the plan than by
    contiguous experts, against what the plan's own held-out scores say."""
    rows = {row.key: row.rem for row in plan.scores.rows} if plan.scores else {}
    if ("plan", "random") not in rows or ("contiguous", "random") not in rows:
        return None, None
    num_layers, num_experts = order_LE.shape
    num_ranks = plan.topology.num_ranks
    before, after = rows["contiguous", "random"], rows["plan", "random"]
    promised = (before - after) / max(1 - 1 / num_ranks, 1e-9)  # a token's own rank is no remote one
    reached = before / max(1 - 1 / num_ranks, 1e-9)
    if promised < LEAST_SAVING * reached:
        return None, None
    contiguous_E = place_contiguous(1, num_experts, num_ranks)[0]
    sums = np.zeros(3)
    for layer in range(num_layers):
        order_E1 = np.append(order_LE[layer], num_experts)
        planned_E = np.empty(num_experts, np.int64)
        planned_E[order_LE[layer]] = contiguous_E
        ids_TK = ids_TLK[:, layer]
        readings = ((ids_TK, contiguous_E), (ids_TK, planned_E), (order_E1[ids_TK], contiguous_E))
        sums += [reached_T(ids, rank_of_E, num_ranks).mean() for ids, rank_of_E in readings]
    # Ids in the plan's order on contiguous ranks are the model's own on the plan's ranks.
    as_contiguous, as_planned, back_contiguous = sums / num_layers
    return (as_contiguous - as_planned) / promised, (back_contiguous - as_contiguous) / promised
