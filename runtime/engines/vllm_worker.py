"""`vllm serve --worker-extension-cls semmoe.runtime.engines.vllm_worker.ReplanWorker`: a server
that `--load-format semmoe` placed is given another plan while it runs, by `collective_rpc`.

vLLM's own methods do it, `update_config` and `reload_weights`: each worker reads the checkpoint
again, under the labels of the new plan, into the tensors that it has. What was computed before
stays valid, since the model is the same function under any labels.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import PlanFacts, read_plan_facts
from semmoe.runtime.engines.variables import HELD, LOAD_FORMAT
from semmoe.runtime.engines.weights import WeightRelabeller
from semmoe.solvers.placement import part_sizes
from semmoe.solvers.replan.delta import DELTA_FILE, read_delta

# Families whose experts vLLM's own model code writes past the loaders that reload_weights hears of.
NOT_READ_AGAIN = ("gpt_oss", "gpt_oss_mxfp4")
LOG = logging.getLogger("vllm.plugins.semmoe")


class ReplanWorker:
    """vLLM makes this a base of its worker. It refuses names that a worker has already, so all that
    is public begins with semmoe_."""

    def semmoe_replan(self, plan: str, paused: str = "") -> dict[str, Any]:
        """Serve by another plan from the next step on. Where any worker cannot, none does.

        Parameters:
            plan: a plan directory, or one of `export --to vllm-plugin`. With a delta it must start
                from the plan that is served.
            paused: "yes" where the caller has paused the server; several data-parallel ranks are
                changed only then, since they could be in different steps.

        Returns:
            {"rank", "applied", "reason" (why not), "plan" (fingerprint that is served now), "moved"
            (experts under another label, all layers together), "seconds"}
        """
        begin, worker = time.monotonic(), self
        held: PlanFacts | None = getattr(worker.get_model(), HELD, None)  # pyright: ignore
        new, reason = None, ""
        try:
            new = _checked(worker, plan, held, paused)
        except InputError as error:
            reason = str(error)
        reason = _first_reason(reason)
        moved = 0
        if not reason and held is not None and new is not None:
            moved = int((new.orders_LE != held.orders_LE).sum())
            if moved:
                _reload(worker, new, held)
            LOG.info("semmoe: plan %s after %s: %d experts moved", new.fingerprint, held.fingerprint, moved)
        elif reason:
            LOG.warning("semmoe: the plan is not changed: %s", reason)
        now = getattr(worker.get_model(), HELD, None)  # pyright: ignore
        return {
            "rank": worker.rank,  # pyright: ignore
            "applied": not reason,
            "reason": reason,
            "plan": now.fingerprint if now is not None else "",
            "moved": moved,
            "seconds": round(time.monotonic() - begin, 3),
        }


def _checked(worker: Any, path: str, held: PlanFacts | None, paused: str) -> PlanFacts:
    """The plan to serve by. Raises InputError where this worker cannot take it."""
    parallel, model_config = worker.vllm_config.parallel_config, worker.vllm_config.model_config
    if held is None:
        raise InputError(f"the server was not placed by --load-format {LOAD_FORMAT}")
    if getattr(parallel, "enable_eplb", False):
        raise InputError("--enable-eplb moves the experts by itself")
    if parallel.data_parallel_size > 1 and paused != "yes":
        raise InputError(
            f"{parallel.data_parallel_size} data-parallel ranks may be in different steps: POST /pause?mode=keep, "
            'then say "paused": "yes", then POST /resume'
        )
    family = model_config.hf_config.model_type
    if family in NOT_READ_AGAIN:
        raise InputError(f"vLLM does not read the experts of {family} again while it runs: start it with the new plan")
    if worker.device.type == "cpu" and model_config.use_mla:
        raise InputError("vLLM does not read latent attention (MLA) again on a CPU: start it with the new plan")
    new = next_plan(path, held)
    WeightRelabeller(new, model_config.hf_config.to_dict(), model_config.model)
    return new


def next_plan(path: str | Path, held: PlanFacts) -> PlanFacts:
    """The plan of a directory, to be served after `held`. Raises InputError where a checkpoint
    cannot be relabelled by it, it has other ranks, or its delta leads from or to another plan."""
    new = read_plan_facts(path)
    if new.orders_LE.shape != held.orders_LE.shape or new.num_ranks != held.num_ranks:
        raise InputError(f"{path} places {_sizes(new)}, the server holds {_sizes(held)}")
    beside = (Path(path) / DELTA_FILE, Path(f"{str(path).rstrip('/')}.{DELTA_FILE}"))
    for file in filter(Path.is_file, beside):
        delta = read_delta(file)
        if delta.old != held.fingerprint:
            raise InputError(f"the delta of {path} starts from plan {delta.old}, the server holds {held.fingerprint}")
        if delta.new != new.fingerprint or not np.array_equal(delta.led(held.experts_LRS), new.experts_LRS):
            raise InputError(f"the delta of {path} leads to plan {delta.new}, the plan there is {new.fingerprint}")
    return new


def _sizes(plan: PlanFacts) -> str:
    layers, experts = plan.orders_LE.shape
    return f"{layers} layers of {experts} experts on {plan.num_ranks} ranks"


def _first_reason(reason: str) -> str:
    """Why any worker of the server cannot; "" where all can. Every worker must call it."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_world_group  # pyright: ignore

    group = get_world_group()
    reasons = [""] * group.world_size
    dist.all_gather_object(reasons, reason, group=group.cpu_group)
    return next(filter(None, reasons), "")


def _reload(worker: Any, new: PlanFacts, held: PlanFacts) -> None:
    """Read the weights again by the new plan. Raises what the checkpoint's reading raises, or
    RuntimeError where vLLM left experts as they were, after the old plan's weights are back."""
    extra = dict(worker.model_runner.load_config.model_loader_extra_config or {})
    own_L = (_own(worker, new.orders_LE) != _own(worker, held.orders_LE)).any(axis=1)
    moved = {layer for layer, is_moved in zip(new.model["model_layers"], own_L, strict=True) if is_moved}
    before = _samples(worker, moved)
    try:
        _read_again(worker, extra | {"plan": os.path.abspath(new.path)})
        after = _samples(worker, moved)
        if left := [layer for layer in before if np.array_equal(before[layer], after[layer])]:
            raise RuntimeError(f"semmoe: vLLM left the experts of layer {left[0]} as they were")
    except Exception:
        LOG.exception("semmoe: the weights could not be read by plan %s; back to %s", new.fingerprint, held.fingerprint)
        _read_again(worker, extra)
        raise


def _read_again(worker: Any, extra: dict[str, Any]) -> None:
    worker.update_config({"load_config": {"model_loader_extra_config": extra}})
    worker.reload_weights()
    _pack(worker)


def _own(worker: Any, orders_LE: np.ndarray) -> np.ndarray:
    """The places of a worker, [L, its experts]: all of them without expert parallelism."""
    from vllm.distributed.parallel_state import get_ep_group  # pyright: ignore

    if not worker.vllm_config.parallel_config.enable_expert_parallel:
        return orders_LE
    group = get_ep_group()
    ends = np.cumsum(part_sizes(orders_LE.shape[1], group.world_size))
    return np.split(orders_LE, ends[:-1], axis=1)[group.rank_in_group]


def _samples(worker: Any, layers: set[int]) -> dict[int, np.ndarray]:
    """What some layers' experts hold, by layer: sums over a few of the numbers of each tensor."""
    sums: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    for name, tensor in worker.get_model().named_parameters():
        layer = int(next(iter(re.findall(r"\.(\d+)\.", name)), -1))
        if ".experts." in name and layer in layers:
            sums[layer].append(tensor.detach().flatten(1)[:, ::997].double().sum(dim=1).cpu().numpy())
    return {layer: np.concatenate(of) for layer, of in sums.items() if of}


def _pack(worker: Any) -> None:
    """vLLM's kernels for CPUs pack the experts when a layer is set up, not when it is read again
    (0.30, 0.32): without this a reload by the same plan changes the answers too."""
    if worker.device.type == "cpu" and worker.vllm_config.model_config.quantization is None:
        for layer in worker.get_model().modules():
            kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(layer)
