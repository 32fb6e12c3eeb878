"""Transformers' own parallelism around the model that a benchmark serves: what semmoe.runtime.serving.engine.serve needs of a PlacedModel.

Three of them. `all_to_all` and `all_reduce` put Transformers' EPImplementation of that name in place of ours on a model that we loaded
(with `all_reduce` our cut of the heads, and an all-reduce after each attention). `load_tensor_parallel` is Transformers alone:
`from_pretrained(distributed_config=DistributedConfig(tp_size=R, ep_size=R))`, for which heads must divide over the ranks; `pad_heads`
writes a checkpoint of the same function whose heads do.

Shape letters: T tokens, K top-k, R ranks.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class NoShuffle:
    """Where all ranks serve the same requests without slices: what serve() asks of a ShuffledModel."""

    def begin(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def forget(self, requests: list[int]) -> None:
        pass


@dataclass(eq=False)
class Baseline(NoShuffle):
    """A model, its expert layers as functions, and what the engine asks of a PlacedModel beside them."""

    model: Any
    calls: list[Any]
    state: Any
    group: Any
    hidden_size: int
    top_k: int

    def join_empty(self) -> None:
        import torch

        for call in self.calls:
            ids_TK = torch.empty((0, self.top_k), dtype=torch.int64)
            call(torch.empty((0, self.hidden_size), dtype=self.model.dtype), ids_TK, ids_TK.to(self.model.dtype))


def timed(forward: Callable[..., Any], watch: Any, phase: str) -> Callable[..., Any]:
    """`forward`, whose time goes to `phase`."""

    def call(*arguments: Any, **named: Any) -> Any:
        watch.mark("attention")
        output = forward(*arguments, **named)
        watch.mark(phase)
        return output

    return call


def with_transformers(placed: Any, plan: Any, implementation: str) -> Baseline:
    """The experts modules of a placed model under Transformers' own implementation. The placement must be contiguous."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

    from semmoe.runtime.transformers.attention_heads import keep_heads
    from semmoe.runtime.transformers.placed_model import placed_layers

    watch, calls, group = placed.state.stopwatch, [], placed.group
    shares_batch = implementation == "all_reduce"
    axes = torch.arange(group.size).reshape(group.size, 1)  # all ranks; every rank alone
    mesh = DeviceMesh(group.device.type, axes, mesh_dim_names=("ranks", "alone"))
    for layer, run_experts in zip(placed_layers(placed.model, plan, "baseline"), placed.run_experts, strict=True):
        layer.module.forward = run_experts
        layer.module._is_expert_parallel = True  # pyright: ignore
        style, shared = EpDispatchExpertsParallel(), mesh["ranks" if shares_batch else "alone"]
        style.install_forward(layer.module, mesh["ranks"], tp_mesh=shared, ep_implementation=implementation)
        # The whole layer: exchange, experts and waiting.
        layer.module.forward = timed(layer.module.forward, watch, "dispatch")
        calls.append(layer.module.forward)
    for layer in placed.model.model.layers if shares_batch else []:
        keep_heads(layer.self_attn, group.rank, group.size, "a layer")

        def summed(module: Any, arguments: Any, output: Any) -> Any:
            watch.mark("attention")
            output = output.contiguous()
            dist.all_reduce(output, group=group.handle)
            watch.mark("gather")
            return output

        layer.self_attn.o_proj.register_forward_hook(summed)
    first = placed.layers[0]
    return Baseline(placed.model, calls, placed.state, placed.group, first.hidden_size, first.top_k)


def load_tensor_parallel(folder: Path, group: Any, plan: Any, dtype: str) -> Baseline:
    """A checkpoint as Transformers itself spreads it: heads, embedding and head of the vocabulary over ranks, all-reduce EP."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from semmoe.runtime.layer.tables import RankState

    config = DistributedConfig(tp_size=group.size, ep_size=group.size)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=getattr(torch, dtype))
    model.eval()
    state = RankState.fresh(plan.placement.num_layers, group)
    for layer in model.model.layers:
        layer.self_attn.o_proj.forward = timed(layer.self_attn.o_proj.forward, state.stopwatch, "gather")
        layer.mlp.experts.forward = timed(layer.mlp.experts.forward, state.stopwatch, "dispatch")
    return Baseline(model, [], state, group, model.config.hidden_size, plan.model.top_k)


def pad_heads(checkpoint: Path, out: Path, num_ranks: int) -> None:
    """A checkpoint of the same function whose key-value heads divide over `num_ranks`: the heads added have weight 0."""
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    config = json.loads((checkpoint / "config.json").read_text())
    heads, keys, size = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    more_keys = -keys % num_ranks
    more_heads = more_keys * (heads // keys)
    tensors = {k: t for file in sorted(checkpoint.glob("*.safetensors")) for k, t in load_file(file).items()}
    for name, tensor in tensors.items():
        added = size * (more_heads if "q_proj" in name or "o_proj" in name else more_keys)
        if "q_proj.weight" in name or "k_proj.weight" in name or "v_proj.weight" in name:
            tensors[name] = pad(tensor, (0, 0, 0, added))
        elif "o_proj.weight" in name:
            tensors[name] = pad(tensor, (0, added)).contiguous()
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_attention_heads": heads + more_heads, "num_key_value_heads": keys + more_keys}
    (out / "config.json").write_text(json.dumps(config))
    for file in checkpoint.glob("*token*.json"):
        shutil.copy(file, out)
