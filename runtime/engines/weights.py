"""A checkpoint's tensors relabelled one by one while an engine reads them, by the rules of
`semmoe reshard --layout permuted`: what goes in under the checkpoint's names comes out as if the
relabelled checkpoint had been read.

Shape letters: E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import text_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import find_family
from semmoe.profiles.safetensors_file import Tensor
from semmoe.runtime.engines.plan_files import PlanFacts
from semmoe.runtime.reshard.keys import Role, classify_one
from semmoe.runtime.reshard.model import permutation_facts, routed_model
from semmoe.runtime.reshard.permuted import check_groups


class WeightRelabeller:
    """Relabels the tensors of one model. Raises InputError where the plan is for another model, a
    permutation cannot express it, or the family's experts cannot be moved."""

    def __init__(self, plan: PlanFacts, config: dict[str, Any], where: str) -> None:
        """`config`: config.json of the model; `where`: its name, for messages."""
        facts, self._where = permutation_facts(config), Path(where)
        if reason := find_family(facts["model_type"]).unshardable:
            raise InputError(f"{facts['model_type']}: experts cannot be relabelled while they load: {reason}")
        for name in ("num_experts", "num_model_layers"):
            mine, theirs = facts[name], plan.model[name]
            if theirs and mine != theirs:
                raise InputError(f"{where} has {name} {mine}, the plan is for {name} {theirs}")
        names = {
            str(n).removesuffix("_text") for n in (facts["model_type"], text_config(config).get("model_type")) if n
        }
        planned = plan.model["model_type"].removesuffix("_text")
        if names and planned and planned not in names:
            raise InputError(f"{where} is a {facts['model_type']} model, the plan is for {planned}")
        self.orders = dict(zip(plan.model["model_layers"], plan.orders_LE, strict=True))  # new2old_E by layer
        check_groups(config, self.orders)
        self._new_of_old = {layer: np.argsort(order_E) for layer, order_E in self.orders.items()}
        self._model = routed_model(config, facts["num_experts"])
        self.moved = 0  # tensors that were renamed or gathered

    def relabel(self, name: str, tensor: Any) -> tuple[str, Any]:
        """A tensor (PyTorch) by its name in the checkpoint, as the relabelled checkpoint has it.
        Raises InputError for a tensor of the experts that cannot be moved."""
        described = Tensor(name, "", tuple(tensor.shape), 0, 0)  # roles depend on name and shape
        key = classify_one(described, self._model, set(self.orders), self._where)
        order_E = self.orders.get(key.layer)
        if key.role is Role.KEEP or order_E is None:
            return name, tensor
        self.moved += 1
        if key.role is Role.EXPERT:
            return key.renamed(name, int(self._new_of_old[key.layer][key.expert])), tensor
        if key.role is Role.VALUES:
            return name, self._index(tensor, self._new_of_old[key.layer])[tensor.long()].to(tensor.dtype)
        if key.role is Role.COLUMNS:
            moved = tensor.clone()
            rows = slice(0, 1) if tensor.shape[0] == 2 else slice(None)
            moved[rows] = tensor[rows][:, self._index(tensor, order_E)]
            return name, moved
        blocks = tensor[: key.rows].reshape(len(order_E), -1, *tensor.shape[1:])
        moved = tensor.clone()
        moved[: key.rows] = blocks[self._index(tensor, order_E)].reshape(key.rows, *tensor.shape[1:])
        return name, moved

    @staticmethod
    def _index(tensor: Any, order_E: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(order_E.astype(np.int64)).to(tensor.device)
