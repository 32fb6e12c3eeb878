"""Tensors that have shapes and no values (PyTorch's fake tensors): whatever would make the host
wait for a GPU raises.

Reads (`.item()`, `.tolist()`, `.numpy()`, `bool()`), shapes that depend on values (nonzero, boolean
masks, bincount) and copies between host and device (`.cpu()`, `.to(device)`, `torch.tensor`,
`torch.from_numpy`) fail. Works without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

COPIES = ("cpu", "cuda", "tensor", "as_tensor", "lift_fresh.default")  # the last: torch.from_numpy


class NoCopies(TorchFunctionMode):
    """Copies between host and device raise; `.item()` gives the next of `values` while there are
    any."""

    def __init__(self, values: list[int]) -> None:
        super().__init__()
        self.values = list(values)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", str(function)), kwargs or {}
        if name == "item" and self.values:
            return self.values.pop(0)
        moves = name == "to" and any(isinstance(part, torch.device | str) for part in (*args[1:], *kwargs.values()))
        if name in COPIES or moves:
            raise RuntimeError(f"a copy between host and device: {name}")
        return function(*args, **kwargs)


@contextmanager
def shapes_only(values: list[int] | None = None) -> Iterator[list[int]]:
    """Inside, new tensors have no values. Single numbers may be read as long as `values` holds
    some; gives what is left of them."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode(), NoCopies(values or []) as mode:
        yield mode.values


def emptied(value: Any) -> Any:
    """The value with every tensor in it replaced by one without values; modules and records are
    changed in place."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    if isinstance(value, nn.Module):
        for module in value.modules():
            module._buffers.update({name: emptied(b) for name, b in module._buffers.items() if b is not None})
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(emptied(parameter), requires_grad=False)
    elif isinstance(value, tuple):
        return type(value)(*map(emptied, value)) if hasattr(value, "_fields") else tuple(map(emptied, value))
    elif isinstance(value, dict):
        return {key: emptied(part) for key, part in value.items()}
    elif is_dataclass(value) or type(value).__module__.startswith("semmoe."):
        for name in [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value)):
            object.__setattr__(value, name, emptied(getattr(value, name)))
    return value
