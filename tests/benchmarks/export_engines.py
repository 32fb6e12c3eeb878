"""Our files in the engines' own readers: SGLang, vLLM-Ascend and EPLB, taken out of their wheels. Prints one JSON
object.

The wheels are downloaded without their dependencies into a temporary directory (or taken from --wheels DIR) and only
the modules that read a map are unpacked; nothing is installed. What those modules ask of a running server (its options,
its model class) is answered from here; what they do with the file is their own code. An engine whose reader cannot be
had is skipped with the reason.

python tests/benchmarks/export_engines.py [--wheels DIR]
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from semmoe.solvers.maps.eplb import eplb_tables
from semmoe.solvers.maps.read import import_placement
from semmoe.solvers.maps.write import export_map, render
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts, Plan

# (MoE layers, leading dense layers, experts, ranks, replica slots per rank, nodes)
SHAPES = [(3, 1, 16, 4, 0, 1), (3, 1, 16, 4, 2, 2), (58, 3, 256, 8, 4, 2), (24, 0, 128, 16, 0, 2)]
NOT_HERE = {
    "vllm": "no release reads a map from a file; the three formats are those of open pull requests",
    "tensorrt-llm": "published for machines with CUDA; not tried here",
}


def random_plan(layers: int, dense: int, experts: int, ranks: int, replicas: int, nodes: int, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    own_LRS = np.stack([rng.permutation(experts).reshape(ranks, -1) for _ in range(layers)])
    extra_LRS = np.stack(
        [[rng.permutation(np.setdiff1d(np.arange(experts), own))[:replicas] for own in own_RS] for own_RS in own_LRS]
    ).reshape(layers, ranks, replicas)
    model = ModelFacts("m", "deepseek_v3", layers, experts, 8, tuple(range(dense, dense + layers)), dense + layers)
    return Plan(
        placement=Placement(np.concatenate([own_LRS, extra_LRS], axis=2).astype(np.int32), experts),
        topology=Topology(ranks, nodes),
        model=model,
        method="random",
        seed=seed,
        dispatch="per-rank",
        load_LE=np.ones((layers, experts), np.int64),
        fitted_keys=np.zeros(0, np.uint64),
    )


def wheel(name: str, directory: Path) -> Path:
    """The wheel of a project, downloaded where it is not there yet."""
    pattern = f"{name.replace('-', '_')}-*.whl"
    if not list(directory.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", name]
        done = subprocess.run([*command, "-d", str(directory)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip download {name}: {done.stderr.strip().splitlines()[-1]}")
    return sorted(directory.glob(pattern))[-1]


def load(archive: Path, member: str, directory: Path) -> ModuleType:
    """One module of a wheel, run from its own file."""
    with zipfile.ZipFile(archive) as files:
        file = Path(files.extract(member, directory))
    spec = importlib.util.spec_from_file_location(member.removesuffix(".py").replace("/", "_"), file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def provide(name: str, **values: Any) -> None:
    """A module of the running server under its name, and its packages."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def check_sglang(wheels: Path, scratch: Path) -> dict[str, Any]:
    """SGLang's compute_initial_expert_location_metadata on every rank, with and without an all-to-all backend."""
    server = SimpleNamespace(moe=SimpleNamespace(ep_join_mode=None, eplb_algorithm="auto"))
    parallel = SimpleNamespace(elastic_ep_initial_size=None)
    model_class = SimpleNamespace(get_model_config_for_expert_location=lambda config: config)
    provide(
        "sglang.srt.runtime_context",
        get_exec=lambda: server,
        get_parallel=lambda: parallel,
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_resources=lambda: SimpleNamespace(expert_location_metadata=None),
    )
    provide("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    provide("sglang.srt.model_loader", get_model_architecture=lambda config: (model_class, None))
    archive = wheel("sglang", wheels)
    module = load(archive, "sglang/srt/eplb/expert_location.py", scratch)
    local_served, ranks_checked = 0, 0
    for seed, shape in enumerate(SHAPES):
        plan = random_plan(*shape, seed)
        placement, model = plan.placement, plan.model
        file = scratch / "map.json"
        file.write_bytes(render("sglang", export_map(plan, "sglang"), ".json"))
        num_slots = placement.physical_to_logical_LP.shape[1]
        server.moe.init_expert_location = str(file)
        server.moe.ep_num_redundant_experts = num_slots - model.num_experts
        parallel.ep_size, parallel.nnodes = placement.num_ranks, plan.topology.num_nodes
        facts = module.ModelConfigForExpertLocation(model.num_model_layers, model.num_experts)
        config = SimpleNamespace(hf_config=facts)
        moe = list(model.model_layers)
        for backend, algorithm in (("none", "dynamic"), ("deepep", "static")):
            server.moe.moe_a2a_backend, server.moe.ep_dispatch_algorithm = backend, algorithm
            for rank in range(placement.num_ranks) if model.num_layers < 50 else (0, placement.num_ranks - 1):
                found = module.compute_initial_expert_location_metadata(config, rank)
                assert found.physical_to_logical_map.shape == (model.num_model_layers, num_slots)
                assert (found.physical_to_logical_map[moe].numpy() == placement.physical_to_logical_LP).all()
                assert (found.logical_to_all_physical_map_num_valid > 0).all()
                if backend == "none":
                    tables = eplb_tables(placement)
                    copies = tables["log2phy"].shape[2]
                    every = found.logical_to_all_physical_map[moe].numpy()
                    # Dense rows may hold more copies than any placed row: the rest is padding.
                    assert (every[:, :, :copies] == tables["log2phy"]).all() and (every[:, :, copies:] == -1).all()
                else:
                    # The replica that this rank will use: its own slot wherever it hosts the expert.
                    slots_LE = found.logical_to_rank_dispatch_physical_map[moe].numpy()
                    hosted_LE = placement.hosts_LER[:, :, rank]
                    assert ((slots_LE // placement.slots_per_rank == rank) == hosted_LE).all()
                    local_served += int(hosted_LE.sum())
                ranks_checked += 1
    return {
        "wheel": archive.name,
        "maps": len(SHAPES),
        "ranks_checked": ranks_checked,
        "experts_served_by_their_own_rank": local_served,
    }


def check_ascend(wheels: Path, scratch: Path) -> dict[str, Any]:
    """vLLM-Ascend's expert_file_to_tensor on every layer."""
    provide("vllm.logger", logger=SimpleNamespace(warning=lambda *_: None))
    provide("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    archive = wheel("vllm-ascend", wheels)
    module = load(archive, "vllm_ascend/eplb/core/eplb_utils.py", scratch)
    for seed, shape in enumerate(SHAPES):
        plan = random_plan(*shape, seed)
        file = scratch / "map.json"
        file.write_bytes(render("vllm-ascend", export_map(plan, "vllm-ascend"), ".json"))
        for layer, experts_RS in enumerate(plan.placement.experts_LRS):
            found_RS, count = module.expert_file_to_tensor(str(file), layer)
            assert (found_RS.numpy() == experts_RS).all() and count == experts_RS.size
    return {"wheel": archive.name, "maps": len(SHAPES)}


def check_eplb(wheels: Path, scratch: Path) -> dict[str, Any]:
    """What EPLB's rebalance_experts (the copy in SGLang) returns, saved as it is, read back, and its tables
    compared with ours.
    """
    archive = wheel("sglang", wheels)
    provide("sglang.srt.utils", get_bool_env_var=lambda *_: False)
    module = load(archive, "sglang/srt/eplb/eplb_algorithms/deepseek.py", scratch)
    same, with_replicas, twice_on_a_rank = 0, 0, 0
    flat = [(3, 0, 16, 4, 1, 1)] * 20  # one replica a rank: some of these have none twice on a rank
    for seed, (layers, _, experts, ranks, replicas, nodes) in enumerate([*SHAPES, *flat]):
        load_LE = torch.from_numpy(np.random.default_rng(seed).integers(1, 1000, (layers, experts)))
        slots = experts + ranks * replicas
        returned = module.rebalance_experts(
            weight=load_LE,
            num_replicas=slots,
            num_groups=nodes,
            num_nodes=nodes,
            num_gpus=ranks,
            enable_hierarchical=True,
        )
        torch.save(tuple(returned), scratch / "eplb.pt")
        rows_LRS = returned[0].numpy().reshape(layers, ranks, -1)
        if any(len(set(row.tolist())) < len(row) for rows in rows_LRS for row in rows):
            twice_on_a_rank += 1
            continue
        model = ModelFacts("m", "", layers, experts, 8, tuple(range(layers)), layers)
        placement = import_placement("eplb", scratch / "eplb.pt", model, Topology(ranks, nodes))
        tables = eplb_tables(placement)
        assert (tables["phy2log"] == returned[0].numpy()).all() and (tables["logcnt"] == returned[2].numpy()).all()
        copies = tables["log2phy"].shape[2]
        # EPLB lists copies in the order it made them, ours go up.
        theirs = np.sort(np.where(returned[1].numpy() < 0, slots, returned[1].numpy()), axis=2)[:, :, :copies]
        assert (np.where(theirs == slots, -1, theirs) == tables["log2phy"]).all()
        same += 1
        with_replicas += copies > 1
    return {
        "wheel": archive.name,
        "maps_read_and_equal": same,
        "of_these_with_replicas": with_replicas,
        "maps_with_an_expert_twice_on_a_rank": twice_on_a_rank,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="directory of wheels that are there already")
    given = parser.parse_args().wheels
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for engine, check in (("sglang", check_sglang), ("vllm-ascend", check_ascend), ("eplb", check_eplb)):
            try:
                results[engine] = {"accepted": True, **check(given or scratch, scratch)}
            except (RuntimeError, ImportError, KeyError) as error:
                results[engine] = {"skipped": f"{type(error).__name__}: {error}"[:200]}
    results.update({engine: {"skipped": reason} for engine, reason in NOT_HERE.items()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
