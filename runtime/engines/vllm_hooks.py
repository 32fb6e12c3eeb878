"""The plug-in inside vLLM (0.30 to 0.33): the DP rank of each request by the plan, ids of experts
back in the model's numbering, and routing recorded.

Methods of vLLM are wrapped, never replaced: what they do beside stays theirs. Placement at load is
in vllm_loader.py.

Shape letters: T rows, L layers of the answer, K top-k.
"""

import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.band import Band
from semmoe.runtime.engines.chooser import RankChooser, Settings, check_model, is_strict, request_tokens
from semmoe.runtime.engines.counters import Counters
from semmoe.runtime.engines.plan_files import PlanFacts, read_plan_facts
from semmoe.runtime.engines.recorder import Recorder, finished_of, returns_routed_experts
from semmoe.runtime.engines.scorer import PlanScorer
from semmoe.runtime.engines.variables import LOAD_FORMAT, REPLAN

LOG = logging.getLogger("vllm.plugins.semmoe")  # a child of vLLM's own, so its handlers write it
CHOOSER = "_semmoe_chooser"  # attribute of a client
HANDLED = "_semmoe_handled"  # attribute of a sequence: its ids are mapped and recorded


class Plugin:
    """What is active in this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counters = Counters(LOG)
        self.recorder: Recorder | None = None
        self.placed = False  # experts carry new labels: ids are mapped back
        self.era = 0  # grows when the plan is changed: ids of an answer of two eras are in two numberings

    def start(self, client: Any) -> None:
        """Look at a client that is complete, and say what is active. Raises InputError where the
        plan does not fit and SEMMOE_STRICT is set."""
        settings, config = self.settings, client.vllm_config
        active, inactive = [], []
        try:
            self.placed = settings.plan is not None and is_placed(config)
            (active if self.placed else inactive).append(
                "placement at load" + ("" if self.placed else f" ({_why_not_placed(config)})")
            )
            if settings.plan is not None:
                check_model(settings.plan, _config_of(config))
                if why := self._choose_ranks(client):
                    inactive.append(f"DP rank by prompt ({why})")
                else:
                    active.append(f"DP rank by prompt, band {settings.band:g}")
            else:
                inactive.append("DP rank by prompt (no SEMMOE_PLAN)")
            if settings.record:
                self.recorder = Recorder.open(settings, _config_of(config), client, self.counters)
                active.append(f"recording into {settings.record}")
        except InputError as error:
            if settings.strict:
                raise
            self.placed = False
            LOG.warning("semmoe: inactive, vLLM serves as without it: %s", error)
            return
        name = f"plan {settings.plan.path} ({settings.plan.fingerprint})" if settings.plan else "no plan"
        LOG.info(
            "semmoe: %s; active: %s; not: %s", name, ", ".join(active) or "nothing", ", ".join(inactive) or "nothing"
        )

    def _choose_ranks(self, client: Any) -> str:
        """Give a client its chooser; why it gets none, in words. Raises InputError where the plan
        does not fit."""
        parallel, plan = client.vllm_config.parallel_config, self.settings.plan
        assert plan is not None
        if not hasattr(client, "get_core_engine_for_request"):
            return "one engine" if parallel.data_parallel_size == 1 else "an external load balancer chooses"
        setattr(client, CHOOSER, self.chooser(client))
        return ""

    def chooser(self, client: Any) -> RankChooser:
        """Of a client: hybrid balancing gives each node's client the ranks of its node."""
        assert self.settings.plan is not None
        here = len(client.core_engines)
        total = max(client.vllm_config.parallel_config.data_parallel_size, here)
        managed = list(getattr(client, "engine_ranks_managed", range(here)))
        scorer = PlanScorer.of(self.settings.plan, ranks=total)
        if len(managed) != here or max(managed) >= total:
            raise InputError(f"{here} engines with ranks {managed}, of {total} in all")
        return RankChooser(scorer, Band(here, self.settings.band), self.counters, managed, LOG)

    def set_rank(self, client: Any, request: Any) -> None:
        """Choose the rank of a request that has none; never raises."""
        chooser: RankChooser | None = getattr(client, CHOOSER, None)
        if chooser is None:
            return
        try:
            under_way = client.reqs_in_flight
            if request.request_id in under_way:  # a chunk of a stream stays where its first went
                return
            if len(under_way) < len(chooser.requests):
                for name in [name for name in chooser.requests if name not in under_way]:
                    chooser.forget(name)
            if len(client.core_engines) != len(chooser.ranks):  # an elastic server has grown or shrunk
                chooser = self.chooser(client)
                setattr(client, CHOOSER, chooser)
            if request.data_parallel_rank is not None:
                self.counters.count("pinned")
                decision = "pinned"
            else:
                ids = None if request.pooling_params is not None else request.prompt_token_ids
                choice = chooser.choose(ids, _tokens(request), others_G=_others(client, chooser))
                decision = choice.decision
                if 0 <= choice.rank < len(client.core_engines):
                    request.data_parallel_rank = choice.rank
            if self.recorder is not None:
                self.recorder.expect(_public_name(request), decision)
        except Exception:
            chooser.fail()

    def note_rank(self, client: Any, request: Any, engine: Any) -> None:
        """Count a request where it went, whoever chose; never raises."""
        chooser: RankChooser | None = getattr(client, CHOOSER, None)
        try:
            place = client.core_engines.index(engine)
            if self.recorder is not None:
                rank = chooser.ranks[place] if chooser is not None and place < len(chooser.ranks) else place
                self.recorder.sent(_public_name(request), rank)
            if chooser is not None and place < len(chooser.ranks):
                chooser.add(request.request_id, place, _tokens(request))
        except Exception:
            if chooser is not None:
                chooser.fail()

    def replanned(self, plan: PlanFacts, client: Any) -> None:
        """The workers serve by another plan: ranks and ids are told by it from now on."""
        self.settings = replace(self.settings, plan=plan)
        before: RankChooser | None = getattr(client, CHOOSER, None)
        if before is None:
            return
        try:
            chooser = self.chooser(client)
            chooser.requests, chooser.tokens_G = before.requests, before.tokens_G
        except InputError as error:
            chooser = None
            LOG.warning("semmoe: vLLM chooses the DP rank of each request from now on: %s", error)
        setattr(client, CHOOSER, chooser)

    def finish(self, output: Any, streamed: Mapping[int, list[int]], era: int | None = None) -> None:
        """Map the ids of a finished answer back, and record it; never raises. `streamed`: ids of
        each sequence as they came; `era`: when it began. An answer that was under way while the
        plan changed has no ids."""
        try:
            for each in output.outputs:
                ids_TLK = getattr(each, "routed_experts", None)
                if ids_TLK is None or getattr(each, HANDLED, False):
                    continue
                setattr(each, HANDLED, True)
                if self.placed and era is not None and era != self.era:
                    each.routed_experts = None
                    continue
                if self.placed and self.settings.plan is not None:
                    each.routed_experts = ids_TLK = old_ids(np.asarray(ids_TLK), self.settings.plan)
                if self.recorder is not None:
                    self.recorder.put(finished_of(output, each, ids_TLK, streamed.get(each.index, [])))
        except Exception:
            LOG.exception(
                "semmoe: routed experts of request %s could not be handled", getattr(output, "request_id", "?")
            )


def is_placed(config: Any) -> bool:
    """Whether a server of this VllmConfig loads its weights by our loader."""
    return config.load_config.load_format == LOAD_FORMAT


def _why_not_placed(config: Any) -> str:
    return f"--load-format is {config.load_config.load_format}"


def old_ids(ids_TLK: np.ndarray, plan: Any) -> np.ndarray:
    """Ids of a relabelled model as the model's own; of MoE layers, or of all layers with zeros in
    the others, which stay."""
    layers = list(range(ids_TLK.shape[1]))
    if ids_TLK.shape[1] == plan.model["num_layers"]:
        orders = plan.orders_LE
    elif ids_TLK.shape[1] > max(plan.model["model_layers"]):
        orders = np.tile(np.arange(plan.model["num_experts"]), (len(layers), 1))
        orders[list(plan.model["model_layers"])] = plan.orders_LE
    else:
        raise InputError(f"{ids_TLK.shape[1]} layers of routed experts, the plan has {plan.model['num_layers']}")
    return orders[np.arange(len(layers))[:, None], ids_TLK].astype(ids_TLK.dtype)


def _config_of(config: Any) -> dict[str, Any]:
    return config.model_config.hf_config.to_dict()


def _tokens(request: Any) -> float:
    sampling, ids = getattr(request, "sampling_params", None), request.prompt_token_ids
    return request_tokens(0 if ids is None else len(ids), getattr(sampling, "max_tokens", None))


def _public_name(request: Any) -> str:
    """The request id that answers carry; the engine's own is made of it."""
    return getattr(request, "external_req_id", None) or request.request_id


def _others(client: Any, chooser: RankChooser) -> np.ndarray | float:
    """Tokens in flight that other API servers have sent, as far as the counts of requests tell: a
    request of theirs is taken for one of ours."""
    if getattr(client, "client_count", 1) <= 1 or not chooser.requests:
        return 0.0
    mean = chooser.tokens_G.sum() / len(chooser.requests)
    own_G = np.bincount([place for place, _ in chooser.requests.values()], minlength=len(chooser.ranks))
    seen_G = np.array([counts[0] + counts[1] for counts in client.lb_engines], float)
    return np.maximum(seen_G - own_G, 0) * mean


def install(environment: Mapping[str, str] = os.environ) -> Plugin | None:
    """Wrap what of vLLM chooses and answers; None where settings cannot be used. Raises InputError
    only with SEMMOE_STRICT=1."""
    from vllm.v1.engine import core_client  # pyright: ignore

    try:
        plugin = Plugin(Settings.read(environment))
    except InputError as error:
        if is_strict(environment):
            raise
        LOG.warning("semmoe: inactive, vLLM serves as without it: %s", error)
        return None
    _wrap(core_client.MPClient, "__init__", functools.partial(_started, plugin))
    balancer = getattr(core_client, "DPLBAsyncMPClient", None)
    if hasattr(balancer, "get_core_engine_for_request"):
        _wrap(balancer, "get_core_engine_for_request", functools.partial(_balanced, plugin))
    _wrap_answers(plugin)
    return plugin


def _wrap_answers(plugin: Plugin) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore

    _wrap(AsyncLLM, "generate", functools.partial(_generated, plugin))
    _wrap(LLMEngine, "step", functools.partial(_stepped, plugin))
    _wrap(AsyncLLM, "collective_rpc", functools.partial(_called, plugin))
    _wrap(LLMEngine, "collective_rpc", functools.partial(_called_here, plugin))


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, self, ...)` in place of a method, once."""
    original = getattr(owner, name)
    if getattr(original, "by_semmoe", False):  # plug-ins may be loaded twice, and processes fork
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapper.by_semmoe = True  # pyright: ignore
    setattr(owner, name, wrapper)


def _started(plugin: Plugin, original: Any, client: Any, *args: Any, **kwargs: Any) -> None:
    original(client, *args, **kwargs)
    try:
        plugin.start(client)
    except InputError:
        raise
    except Exception:
        LOG.exception("semmoe: inactive, vLLM serves as without it")


def _balanced(plugin: Plugin, original: Any, client: Any, request: Any) -> Any:
    plugin.set_rank(client, request)
    engine = original(client, request)
    plugin.note_rank(client, request, engine)
    return engine


async def _generated(plugin: Plugin, original: Any, llm: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    answers, streamed, era = original(llm, *args, **kwargs), {}, plugin.era
    try:
        async for output in answers:
            if plugin.recorder is not None:
                for each in output.outputs:
                    streamed.setdefault(each.index, []).extend(each.token_ids)
            if any(getattr(each, "routed_experts", None) is not None for each in output.outputs):
                plugin.finish(output, streamed, era)
            yield output
    finally:  # a client that left closes this generator: vLLM's must hear of it
        await answers.aclose()


async def _called(plugin: Plugin, original: Any, llm: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    if method != REPLAN or not plugin.placed:
        return await original(llm, method, *args, **kwargs)
    if getattr(llm.engine_core, "client_count", 1) > 1:
        return _refused("several API servers: the others would map ids by the old plan; --api-server-count 1")
    new, reason = _plan_asked(*args, **kwargs)
    if new is None:
        return _refused(reason)
    plugin.era += 1
    answers = await original(llm, method, *args, **kwargs)
    if not all(each["applied"] for each in answers):
        plugin.era -= 1
        return answers
    plugin.replanned(new, llm.engine_core)
    plugin.era += 1
    if returns_routed_experts(llm.vllm_config):
        # Experts of tokens in the cache are kept under the labels of the old plan.
        await llm.reset_prefix_cache(reset_running_requests=True)
    return answers


def _called_here(plugin: Plugin, original: Any, engine: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    if method != REPLAN or not plugin.placed:
        return original(engine, method, *args, **kwargs)
    returns = returns_routed_experts(engine.vllm_config)
    if returns and engine.has_unfinished_requests():
        return _refused("requests are under way, whose routed experts would be in two numberings")
    new, reason = _plan_asked(*args, **kwargs)
    if new is None:
        return _refused(reason)
    answers = original(engine, method, *args, **kwargs)
    if all(each["applied"] for each in answers):
        plugin.replanned(new, engine.engine_core)
        if returns:
            engine.reset_prefix_cache()
    return answers


def _plan_asked(timeout: Any = None, args: Any = (), kwargs: Any = None) -> tuple[PlanFacts | None, str]:
    """The plan that a call of collective_rpc names, or why there is none."""
    try:
        return read_plan_facts(args[0] if args else (kwargs or {}).get("plan", "")), ""
    except InputError as error:
        return None, str(error)


def _refused(reason: str) -> list[dict[str, Any]]:
    return [{"applied": False, "reason": reason}]


def _stepped(plugin: Plugin, original: Any, engine: Any) -> Any:
    outputs = original(engine)
    for output in outputs:
        if getattr(output, "finished", False) and hasattr(output, "outputs"):
            plugin.finish(output, {})
    return outputs
