"""The plug-in inside SGLang (0.5.23): the DP rank of each request by the plan, as an AROUND hook on
what every balancing method of the DP controller calls first.

An exception in the controller stops the server, and so does a rank that is not active: everything
is caught here, and only a rank that is up is set.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.band import Band
from semmoe.runtime.engines.chooser import RankChooser, Settings, is_strict, request_tokens
from semmoe.runtime.engines.counters import Counters
from semmoe.runtime.engines.scorer import PlanScorer

LOG = logging.getLogger("semmoe")
TARGET = "sglang.srt.managers.data_parallel_controller.DataParallelController.maybe_external_dp_rank_routing"
MOST_UNDER_WAY = 4_096  # requests whose tokens are remembered


class Hook:
    """AROUND hook `(original, controller, request)`.

    The controller does not hear of the end of a request. Where it keeps a budget of tokens (the
    methods total_tokens and total_requests) that is the load; else what was sent lately, which
    fades as new requests come.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.plan is not None
        self.settings, self.counters = settings, Counters(LOG)
        self.chooser: RankChooser | None = None
        self._given_up = False
        self._count = 0

    def __call__(self, original: Any, controller: Any, request: Any) -> Any:
        try:
            if request.routed_dp_rank is not None:
                self.counters.count("pinned")
            elif not self._given_up:
                self._set_rank(controller, request)
        except Exception:
            if self.chooser is None:
                self._given_up = True
                LOG.exception("semmoe: inactive, SGLang serves as without it")
            else:
                self.chooser.fail()
        return original(controller, request)

    def _set_rank(self, controller: Any, request: Any) -> None:
        workers = controller.workers
        if self.chooser is None or len(self.chooser.ranks) != len(workers):
            self._start(len(workers))
        if self.chooser is None:
            return
        chooser, ids = self.chooser, request.input_ids
        allowed_G = _active(controller)
        sampling = getattr(request, "sampling_params", None)
        tokens = request_tokens(0 if ids is None else len(ids), getattr(sampling, "max_new_tokens", None))
        budget = getattr(controller, "dp_budget", None)
        totals = getattr(budget, "total_tokens", None)
        measured = totals is not None and len(totals) == len(workers) and any(totals)
        others_G = np.asarray(totals, float) - chooser.tokens_G if measured else 0.0
        choice = chooser.choose(ids, tokens, others_G=others_G, allowed_G=allowed_G)
        if choice.rank < 0 or not allowed_G[choice.rank]:
            return
        request.routed_dp_rank = choice.rank
        if budget is not None and measured:  # a rank that is set bypasses the budget's own count
            budget.total_tokens[choice.rank] += 0 if ids is None else len(ids)
            budget.total_requests[choice.rank] += 1
        else:
            self._count += 1
            chooser.add(str(self._count), choice.rank, tokens)
            chooser.forget(str(self._count - _under_way(len(workers))))

    def _start(self, num_ranks: int) -> None:
        """Fit the plan to the server, and say so once."""
        plan = self.settings.plan
        assert plan is not None
        try:
            scorer = PlanScorer.of(plan, ranks=num_ranks)
        except InputError as error:
            self._given_up = True
            LOG.warning("semmoe: inactive, SGLang serves as without it: %s", error)
            return
        self.chooser = RankChooser(scorer, Band(num_ranks, self.settings.band), self.counters, range(num_ranks), LOG)
        LOG.info(
            "semmoe: plan %s (%s); active: DP rank by prompt over %d ranks, band %g; the hook is live; "
            "not: placement at load (semmoe reshard, or --init-expert-location)",
            *(plan.path, plan.fingerprint, num_ranks, self.settings.band),
        )


def _under_way(num_ranks: int) -> int:
    """How many requests back the sent ones count as load where nothing measures it."""
    return min(32 * num_ranks, MOST_UNDER_WAY)


def _active(controller: Any) -> np.ndarray:
    """Which ranks may be set, bool [G]: named as active, alive, and not marked as down."""
    num_ranks = len(controller.workers)
    active_G = np.zeros(num_ranks, bool)
    for rank in getattr(controller, "_active_workers", range(num_ranks)):
        active_G[rank] = controller.workers[rank] is not None
    status = getattr(controller, "status", None)
    if status is not None and len(status) == num_ranks:
        active_G &= np.array([bool(up) for up in status])
    return active_G


def install(environment: Mapping[str, str] = os.environ) -> None:
    """Register the hook. Raises InputError only with SEMMOE_STRICT=1; SGLang logs what a plug-in
    raises and serves on, so strict then stops this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # pyright: ignore

    try:
        settings = Settings.read(environment)
        assert settings.plan is not None
        PlanScorer.of(settings.plan)
    except InputError as error:
        if is_strict(environment):
            raise SystemExit(f"semmoe: {error}") from None
        LOG.warning("semmoe: inactive, SGLang serves as without it: %s", error)
        return
    HookRegistry.register(TARGET, Hook(settings), HookType.AROUND)
