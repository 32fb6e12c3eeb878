"""Layout "permuted": a normal Hugging Face checkpoint whose experts are relabelled, router and all.

An engine that gives rank r the r-th run of E/R experts (all of them do, unless told otherwise)
realises the placement. Relabelling changes nothing that the model computes, but for routers with
groups: these choose among consecutive experts, so only permutations that map groups onto groups are
accepted.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank, G groups of experts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import read_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, read_index, read_shard
from semmoe.runtime.reshard.audit import unaccounted
from semmoe.runtime.reshard.card import add_section
from semmoe.runtime.reshard.complete import classify_checkpoint
from semmoe.runtime.reshard.copy import FilePlan, check_parts, total_bytes, write_files
from semmoe.runtime.reshard.keys import Key, Role
from semmoe.runtime.reshard.model import RoutedModel, check_plan, permutation_facts, top_k_notes
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult, size_facts
from semmoe.runtime.reshard.relabel import Orders, expected_parts, relabel_shard, relabelled_index
from semmoe.runtime.reshard.settings import ExpertNames, names_settings, relabelled_settings
from semmoe.runtime.reshard.sidecar import SIDECAR, file_entries, plan_facts, write_sidecar
from semmoe.runtime.reshard.source import Checkpoint, copy_others
from semmoe.solvers.placement import EMPTY, part_sizes
from semmoe.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class Relabelling:
    """A checkpoint and the permutation of the experts of its layers."""

    source: Checkpoint
    model: RoutedModel
    orders: Orders
    keys: Mapping[str, Key]
    stored: Mapping[str, str] = field(default_factory=dict)  # files of settings to write as they are given

    @classmethod
    def of(cls, source: Checkpoint, model: RoutedModel, orders: Orders) -> "Relabelling":
        """Raises InputError where the checkpoint is not whole."""
        return cls(source, model, orders, classify_checkpoint(source, model, set(orders)))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Files of settings that name experts, as they are to be: config.json,
        hf_quant_config.json, recipe.yaml, ...

        As Latin-1: what is changed is ASCII, and every other byte stays.
        """
        experts, changed = ExpertNames.of(self.keys, self.orders), {}
        for name in filter(names_settings, self.source.others):
            text = self.read_settings(name)
            where = str(self.source.path / name)
            new = self.stored[name] if name in self.stored else relabelled_settings(text, where, experts)
            if new != text:
                changed[name] = new
        return changed

    def read_settings(self, name: str) -> str:
        return (self.source.path / name).read_bytes().decode("latin-1")

    def one_way_settings(self) -> dict[str, str]:
        """Files of settings that the inverse permutation would not give back to the letter: "[35]"
        became "(?:3|12)"."""
        back = ExpertNames.of(self.keys, {layer: np.argsort(order) for layer, order in self.orders.items()})
        kept = {}
        for name, new in self.settings.items():
            old = self.read_settings(name)
            try:
                same = relabelled_settings(new, name, back) == old
            except InputError:
                same = False
            if not same:
                kept[name] = old
        return kept

    def files(self, *, link: bool = False, header_bytes: Mapping[str, int] = {}) -> list[FilePlan]:
        """The safetensors files to write. `header_bytes`: lengths of headers by file; default
        those of the source."""
        return [
            relabel_shard(shard, self.keys, self.orders, link=link, header_bytes=header_bytes.get(shard.name, 0))
            for shard in self.source.shards
        ]

    def result(
        self, out: Path, files: Sequence[FilePlan], verify: str, *, notes: Sequence[str] = (), **facts: Any
    ) -> ReshardResult:
        """What writing the files did."""
        moved = sum(int((order != np.arange(len(order))).sum()) for order in self.orders.values())
        return ReshardResult(
            out=str(out),
            layout="permuted",
            num_layers=len(self.orders),
            experts_moved=moved,
            **size_facts(files),
            verified=verify,
            left_out=self.source.left_out,
            notes=(*self.source.unselected_notes(), *notes),
            **facts,
        )


def write_permuted(
    source: Checkpoint, plan: Plan, out: Path, options: ReshardOptions, progress: Stages | None
) -> ReshardResult:
    """Write `source` as `out` with its experts in the order of the plan's slots.

    Raises InputError where the plan is for another model, a permutation cannot express it, or a
    file is damaged.
    """
    model, orders = check_plan(source, plan), permutation_of(plan)
    check_groups(read_config(source.path), orders)
    relabelling = Relabelling.of(source, model, orders)
    files, one_way = relabelling.files(link=options.link), relabelling.one_way_settings()
    with output_directory(out, source.path, marker=SIDECAR, force=options.force) as folder:
        sums = fill_permuted(relabelling, files, folder, compare=options.compares, progress=progress)
        difference = None
        if options.verify == "logits":
            from semmoe.runtime.reshard.logits import compare_logits

            difference = compare_logits(source.path, folder)
        facts = {
            "layout": "permuted",
            "plan": plan_facts(plan),
            "made_by": options.made_by,
            "num_experts": model.num_experts,
            "new2old": {str(layer): order.tolist() for layer, order in orders.items()},
            **({"settings": one_way} if one_way else {}),
            "files": file_entries(source, files, sums),
        }
        write_sidecar(folder, facts)
        add_section(folder, facts)
    kept = {name for name, key in relabelling.keys.items() if key.role is Role.KEEP}
    notes = (*top_k_notes(source, plan), *(unaccounted(source, kept, model.num_experts) if options.compares else ()))
    return relabelling.result(out, files, options.verify, notes=notes, logits_difference=difference)


def fill_permuted(
    relabelling: Relabelling, files: Sequence[FilePlan], folder: Path, *, compare: bool, progress: Stages | None
) -> dict[str, list[list[int]]]:
    """Write the relabelled checkpoint into `folder`; checksums by file name where
    it is compared."""
    source = relabelling.source
    check_space(folder, total_bytes(files) + source.other_bytes)
    copy_others(source, folder, skip=(SIDECAR,))
    for name, text in relabelling.settings.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    write_index(relabelling, folder)
    sums = write_files(files, folder, verify=compare, progress=progress)
    if compare:
        check_written(relabelling, files, folder)
    return sums


def permutation_of(plan: Plan) -> dict[int, np.ndarray]:
    """new2old_E int64 [E] of each model layer. Raises InputError where the placement has copies,
    or ranks hold other numbers of experts than a linear split gives them."""
    placement = plan.placement
    if placement.num_copies:
        words = placement.copies_in_words.replace("per rank", "on each rank")
        how = "plan without replicas" if placement.num_replicas else "place with --spare empty"
        raise InputError(
            f"the plan has {words}, which a permuted checkpoint cannot express: {how}, or use --layout ranks"
        )
    sizes_R = part_sizes(placement.num_experts, placement.num_ranks)
    if ((placement.experts_LRS != EMPTY).sum(axis=2) != sizes_R).any():
        raise InputError(
            f"the plan gives ranks other numbers of experts than a linear split of {placement.num_experts} over "
            f"{placement.num_ranks}, which a permuted checkpoint cannot express: use --layout ranks"
        )
    return dict(zip(plan.model.model_layers, placement.order_LE.astype(np.int64), strict=True))


def check_groups(config: dict[str, Any], orders: Orders) -> None:
    """Raise InputError where the router chooses among groups of experts and a permutation breaks
    them."""
    facts = permutation_facts(config)
    num_groups, chosen = facts["n_group"], facts["topk_group"]
    if num_groups <= 1 or chosen >= num_groups:
        return
    for layer, order_E in orders.items():
        group_GE = (order_E // (len(order_E) // num_groups)).reshape(num_groups, -1)
        if (group_GE != group_GE[:, :1]).any():
            raise InputError(
                f"layer {layer}: the router picks {chosen} of {num_groups} groups of experts, and the plan splits a group, "
                "which a permuted checkpoint cannot express: place with --expressible permutation, or export the plan"
            )


def check_written(relabelling: Relabelling, files: Sequence[FilePlan], root: Path) -> None:
    """Raise InputError unless the headers and the index on the disk ask for just the bytes that
    were copied."""
    source = relabelling.source
    shards = {shard.name: shard for shard in source.shards}
    index = read_index(root / INDEX_NAME)["weight_map"] if source.index else {}
    for file in files:
        written = read_shard(root / file.name)
        if not file.link:
            check_parts(
                written.path,
                expected_parts(written, shards[file.name], relabelling.model, relabelling.orders),
                file.parts,
            )
        for tensor in written.tensors:
            if index.get(tensor.name) == file.name:
                del index[tensor.name]
    if index:
        name, file_name = next(iter(index.items()))
        raise InputError(f"{root / INDEX_NAME} names {name}, which {file_name} does not hold: nothing was kept")


def write_index(relabelling: Relabelling, target: Path) -> None:
    source = relabelling.source
    if source.index:
        index = {
            **source.index,
            "weight_map": relabelled_index(source.index["weight_map"], relabelling.keys, relabelling.orders),
        }
        end = "\n" if (source.path / INDEX_NAME).read_bytes().endswith(b"\n") else ""
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2, ensure_ascii=False) + end, encoding="utf-8")
