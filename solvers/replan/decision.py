"""Whether a re-placement is worth its moves: its gain on requests that it was not fitted on, with
an interval.

Fitted on all new requests, any re-placement gains; where nothing shifted it gains by noise alone.
So the requests are halved, each half is re-placed for within the asked budget, and scored on the
other. The re-placement moves where the lower bound of that gain exceeds what the moves cost. One
budget is tested, the asked one: the best of many would gain by chance.

Shape letters: L MoE layers, G groups of requests, X resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from semmoe.profiles.counts import RoutingProfile, co_activation_EE
from semmoe.profiles.errors import InputError
from semmoe.profiles.sample import bounded_requests, select_requests
from semmoe.profiles.trace import TraceBatch
from semmoe.solvers.deployment import Deployment
from semmoe.solvers.evaluate.metrics import metrics_XL, resamples_XG
from semmoe.solvers.evaluate.sums import deployment_sums
from semmoe.solvers.json_record import JsonRecord
from semmoe.solvers.replan.frontiers import Replaced
from semmoe.solvers.replan.tasks import request_homes_B
from semmoe.solvers.replan.timed import UNIT, TimeGain
from semmoe.solvers.replan.worth import Worth

LEAST_REQUESTS = 20  # fewer say too little: their interval is too narrow
LEAST_LAYERS = 8  # that decide, where a model has as many
NUM_RESAMPLES = 1_000
DECIDING_CELLS = 2**18  # layers by experts by ranks that decide: 16 layers of 256 at 64
DECIDING_IDS = 30_000_000  # expert ids of the requests that decide: 64,000 tokens of 58 layers x top-8


@dataclass(frozen=True)
class Decision(JsonRecord):
    """Whether to move, and on what grounds.

    Fields:
        gain, lo, hi: cost saved per token, mean over layers, and its 95 % interval, on requests
            that the re-placement was not fitted on; null where there were too few to halve.
        cost: what the moves cost in the same unit: price times moves, mean over layers.
        moves: experts that each half's re-placement moves, mean of both; of all layers, also where
            some decided.
        requests: that were halved.
        unit: of gain and cost.
        move: whether the lower bound exceeds the cost.
        forced: the re-placement was asked for whatever the bound.
        layers: layers that decided, where they were fewer than all.
    """

    gain: float | None
    lo: float | None
    hi: float | None
    cost: float
    moves: float
    requests: int
    unit: str
    move: bool
    forced: bool = False
    layers: int | None = None


def deciding_layers(num_layers: int, num_experts: int, num_ranks: int) -> np.ndarray:
    """Layers that decide, ascending int64: all, or as many of a large model as a search is quick
    for, evenly apart. Gain and price are means over layers."""
    most = max(DECIDING_CELLS // (num_experts * num_ranks), LEAST_LAYERS)
    return np.unique(np.linspace(0, num_layers - 1, min(most, num_layers)).astype(int))


def of_layers(profile: RoutingProfile, layers: np.ndarray) -> RoutingProfile:
    """The profile with some of its layers."""
    numbers = tuple(profile.info.model_layers[layer] for layer in layers)
    sample = replace(profile.sample, expert_ids_TLK=profile.sample.expert_ids_TLK[:, layers])
    return RoutingProfile(
        replace(profile.info, num_layers=len(layers), model_layers=numbers),
        profile.num_tokens,
        profile.load_LE[layers],
        profile.co_activation_LEE[layers],
        sample,
    )


def halves(profile: RoutingProfile, seed: int) -> tuple[RoutingProfile, RoutingProfile]:
    """Two profiles of a random half each of a bounded number of the sample's requests."""
    info = profile.info
    sample = bounded_requests(profile.sample, max_tokens=DECIDING_IDS // (info.num_layers * info.top_k), seed=seed)
    first_B = np.zeros(sample.num_requests, bool)
    first_B[np.random.default_rng([seed, 19]).permutation(sample.num_requests)[: sample.num_requests // 2]] = True
    return profile_of(profile, select_requests(sample, first_B)), profile_of(profile, select_requests(sample, ~first_B))


def profile_of(profile: RoutingProfile, batch: TraceBatch) -> RoutingProfile:
    """The profile of these requests alone."""
    pairs_LEE = np.stack(
        [co_activation_EE(batch.expert_ids_TLK[:, i], profile.info.num_experts) for i in range(profile.info.num_layers)]
    )
    load_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2).copy()
    return RoutingProfile(profile.info, batch.num_tokens, load_LE, pairs_LEE, batch)


def decide(
    profile: RoutingProfile,
    old: Deployment,
    worth: Worth,
    price: float,
    replaced_for: Callable[[RoutingProfile], Replaced],
    *,
    seed: int,
    timed: TimeGain | None = None,
) -> Decision:
    """The decision by two-fold cross-fit.

    Parameters:
        profile: of the new requests.
        old: the placement that is served, with the topology and dispatch that count its rows.
        worth: cost of rows and of load.
        price: gain of its layer that a moved expert must bring, in the worth's unit.
        replaced_for: the re-placement within the asked budget, fitted on a profile.
        seed: of the halves and the resamples.
        timed: predicts the gain, in place of the worth.

    Raises InputError for a profile of fewer than two requests.
    """
    num_requests = profile.sample.num_requests
    if num_requests < 2:
        raise InputError("a re-placement is judged on requests that it was not fitted on: two at least")
    sides = halves(profile, seed)
    gains, moves = [], 0
    for fitted, scored in (sides, sides[::-1]):
        new = replaced_for(fitted)
        moves += int(new.moved_L.sum())
        after = replace(old, placement=new.placement)
        if timed is not None:
            gains.append(timed.gains_XL(scored.sample, old, after).mean(axis=1))
        else:
            gains.append(gains_of(scored.sample, old, after, worth, seed).mean(axis=1))
    num_layers = profile.info.num_layers
    cost = price * moves / 2 / num_layers
    # Halves of unlike requests may give unlike numbers of resamples: as many as both have.
    gains_X = np.mean([found[: min(map(len, gains))] for found in gains], axis=0)
    lo, hi = (float(q) for q in np.quantile(gains_X[1:], [0.025, 0.975]))
    unit = worth.unit if timed is None else UNIT
    # No move gains nothing, so it is never worth one.
    return Decision(float(gains_X[0]), lo, hi, cost, moves / 2, num_requests, unit, moves > 0 and lo > cost)


def gains_of(batch: TraceBatch, old: Deployment, new: Deployment, worth: Worth, seed: int) -> np.ndarray:
    """Cost of the old placement less the new one's, per layer: on all requests, and on resamples of
    them, float64 [1 + NUM_RESAMPLES, L]."""
    costs = []
    for deployed in (old, new):
        homes_TL = _homes_TL(batch, deployed) if worth.activation_row else None
        sums = deployment_sums(deployed, batch, homes_TL=homes_TL)
        groups = len(sums.tokens_G)
        weights_XG = np.concatenate([np.ones((1, groups)), resamples_XG(sums.tokens_G, NUM_RESAMPLES, seed)])
        metrics = metrics_XL(sums.resampled(weights_XG), deployed.topology, deployed.dispatch)
        costs.append(worth.cost_XL(metrics, batch.expert_ids_TLK.shape[2]))
    return costs[0] - costs[1]


def _homes_TL(batch: TraceBatch, deployed: Deployment) -> np.ndarray:
    """Where tokens live under a good schedule of requests, int64 [T, L]. At random homes, rows per
    activation are the same whatever the placement."""
    home_B = request_homes_B(batch, np.arange(batch.num_requests), deployed.placement)
    return np.repeat(home_B[batch.request_of_T][:, None], deployed.placement.num_layers, axis=1)
