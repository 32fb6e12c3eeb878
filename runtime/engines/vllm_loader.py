"""`vllm serve --load-format semmoe`: the experts are placed while the weights are read, so that no
second checkpoint is needed.

The plan is SEMMOE_PLAN's, or `--model-loader-extra-config '{"plan": "p"}'` names it. All else is
vLLM's default loader. Imported by vLLM's processes alone (entry.py).
"""

import copy
import logging
import os
from collections.abc import Generator
from typing import Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # pyright: ignore

from semmoe.profiles.errors import InputError
from semmoe.runtime.engines.plan_files import read_plan_facts
from semmoe.runtime.engines.variables import HELD, PLAN
from semmoe.runtime.engines.weights import WeightRelabeller

LOG = logging.getLogger("vllm.plugins.semmoe")


class PlacedModelLoader(DefaultModelLoader):
    """Raises InputError, before a weight is read, where the plan cannot be realised so: a format
    that was asked for by name is never quietly another one."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        path = extra.pop("plan", None) or os.environ.get(PLAN)
        if not path:
            raise InputError(f'--load-format semmoe needs {PLAN}, or --model-loader-extra-config \'{{"plan": "p"}}\'')
        # vLLM's loader refuses keys and formats that it does not know.
        plain = copy.copy(load_config)
        plain.load_format, plain.model_loader_extra_config = "auto", extra
        super().__init__(plain)
        self.plan = read_plan_facts(path)
        if not os.environ.get(PLAN):
            LOG.warning("semmoe: routed experts in answers carry the plan's labels: only %s maps them back", PLAN)

    def _init_ep_weight_filter(self, model_config: Any) -> None:
        super()._init_ep_weight_filter(model_config)
        # It drops tensors by the numbers that experts have before they are relabelled.
        self.local_expert_ids = None

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Any], None, None]:
        """Weights under the plan's labels, when a model is loaded as when it is read again."""
        weights = super().get_all_weights(model_config, model)
        if is_draft(model_config):
            yield from weights
            return
        relabeller = WeightRelabeller(self.plan, model_config.hf_config.to_dict(), model_config.model)
        self._warn()
        for name, tensor in weights:
            yield relabeller.relabel(name, tensor)
        if not relabeller.moved:
            raise InputError(f"{model_config.model} holds no tensor of the experts that the plan places")
        setattr(model, HELD, self.plan)
        LOG.info("semmoe: plan %s placed at load: %d tensors relabelled", self.plan.fingerprint, relabeller.moved)

    def _warn(self) -> None:
        """Say what of the server's settings undoes the placement."""
        from vllm.config import get_current_vllm_config  # pyright: ignore

        parallel = get_current_vllm_config().parallel_config
        size = parallel.data_parallel_size * parallel.tensor_parallel_size
        if getattr(parallel, "enable_eplb", False):
            LOG.warning("semmoe: --enable-eplb will move the experts away from where the plan puts them")
        if getattr(parallel, "expert_placement_strategy", "linear") != "linear":
            LOG.warning("semmoe: --expert-placement-strategy must be linear for the plan's placement")
        if parallel.enable_expert_parallel and self.plan.num_ranks % size:
            LOG.warning("semmoe: the plan is for %d ranks, the server has %d", self.plan.num_ranks, size)


def is_draft(model_config: Any) -> bool:
    """Whether the model is a drafter for speculation: plans do not speak of it."""
    return getattr(model_config, "runner_type", None) == "draft" or getattr(model_config, "runner", None) == "draft"
