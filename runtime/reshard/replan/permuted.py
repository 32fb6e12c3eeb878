"""Layout "permuted" for another plan: experts that move are renumbered once more.

Shape letters: E experts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import Shard
from semmoe.runtime.reshard.card import add_section
from semmoe.runtime.reshard.copy import FilePlan
from semmoe.runtime.reshard.keys import Role
from semmoe.runtime.reshard.model import routed_model
from semmoe.runtime.reshard.output_directory import output_directory
from semmoe.runtime.reshard.permuted import Relabelling, check_groups, fill_permuted, permutation_of
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult
from semmoe.runtime.reshard.relabel import Orders
from semmoe.runtime.reshard.replan.keep import can_link, kept_file
from semmoe.runtime.reshard.settings import ExpertNames, names_settings, relabelled_settings
from semmoe.runtime.reshard.sidecar import SIDECAR, hash_bytes, plan_facts, write_sidecar
from semmoe.runtime.reshard.source import open_checkpoint
from semmoe.solvers.plan import Plan


def replan_permuted(
    placed: Path, facts: dict[str, Any], new: Plan, out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Write `out`. Raises InputError where a permutation cannot express the new plan."""
    source = open_checkpoint(placed)
    if strangers := sorted({shard.name for shard in source.shards} ^ facts["files"].keys()):
        raise InputError(f"{placed / SIDECAR} and the files of {placed} differ in {strangers[0]}")
    model = routed_model(read_config(placed), facts["num_experts"])
    # 1. The new order of the original's experts, and of those of the reshard.
    old_orders = {int(layer): np.array(order) for layer, order in facts["new2old"].items()}
    new_orders = permutation_of(new)
    if old_orders.keys() != new_orders.keys():
        raise InputError(f"{placed / SIDECAR} has the layers {sorted(old_orders)}, the plan {sorted(new_orders)}")
    check_groups(read_config(placed), new_orders)
    orders = {layer: np.argsort(old_orders[layer])[order] for layer, order in new_orders.items()}
    relabelling = Relabelling.of(source, model, orders)
    # 2. Settings go by way of the original's.
    texts, one_way = settings_after(relabelling, old_orders, new_orders, facts.get("settings", {}))
    relabelling = replace(relabelling, stored=texts)
    with output_directory(out, placed, marker=SIDECAR, force=options.force) as folder:
        link = can_link(source.shards[0].path, folder)
        kept = {shard.name for shard in source.shards if link and is_kept(relabelling, shard)}
        files = [
            kept_file(shard.name, shard, link=True) if shard.name in kept else file
            for shard, file in zip(source.shards, relabelling.files(), strict=True)
        ]
        sums = fill_permuted(relabelling, files, folder, compare=options.compares, progress=progress)
        told = {
            "layout": "permuted",
            "plan": plan_facts(new),
            "made_by": options.made_by,
            "num_experts": facts["num_experts"],
            "new2old": {str(layer): order.tolist() for layer, order in new_orders.items()},
            **({"settings": one_way} if one_way else {}),
            "files": {file.name: entry_of(facts["files"][file.name], file, sums) for file in files},
        }
        write_sidecar(folder, told)
        add_section(folder, told)
    return relabelling.result(out, files, options.verify)


def is_kept(relabelling: Relabelling, shard: Shard) -> bool:
    """Whether nothing moves in a file."""
    for tensor in shard.tensors:
        key, order_E = relabelling.keys[tensor.name], relabelling.orders.get(relabelling.keys[tensor.name].layer)
        if key.role is Role.KEEP or order_E is None:
            continue
        places = [key.expert] if key.role is Role.EXPERT else np.arange(len(order_E))
        if (order_E[places] != places).any():
            return False
    return True


def settings_after(
    relabelling: Relabelling, old: Orders, new: Orders, stored: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Files of settings that name experts as they are to be, by name, and the original's where the
    way back would not give them."""
    back = {layer: np.argsort(order) for layer, order in old.items()}
    original = replace(relabelling, orders=back, stored=stored)
    there = ExpertNames.of(relabelling.keys, new)
    and_back = ExpertNames.of(relabelling.keys, {layer: np.argsort(order) for layer, order in new.items()})
    texts, one_way = {}, {}
    for name in filter(names_settings, relabelling.source.others):
        text = original.settings.get(name, original.read_settings(name))
        texts[name] = relabelled_settings(text, str(relabelling.source.path / name), there)
        try:
            same = relabelled_settings(texts[name], name, and_back) == text
        except InputError:
            same = False
        if not same:
            one_way[name] = text
    return texts, one_way


def entry_of(before: dict[str, Any], file: FilePlan, sums: dict[str, list[list[int]]]) -> dict[str, Any]:
    """What the sidecar says of a file: of the original as before, of what was written anew."""
    if file.link:
        return before
    of_source = {key: value for key, value in before.items() if key.startswith("source_")}
    written = {"header_sha256": hash_bytes(file.header), "checksums": sums.get(file.name, [])}
    return {"bytes": file.size, **of_source, **written}
