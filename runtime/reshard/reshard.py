"""Reshard: a checkpoint and a plan in, a checkpoint out that realises the plan.

Layout "permuted" is a normal Hugging Face checkpoint whose experts are relabelled, router and all,
so that an engine that gives rank r the r-th run of E/R experts (all of them do, unless told
otherwise) realises the placement. Relabelling changes nothing that the model computes, but for
routers with groups: these choose among consecutive experts, so only permutations that map groups
onto groups are accepted there. Layout "ranks" is in reshard_ranks.py.

The work is done on keys and bytes (relabel.py, checkpoint_copy.py); tensors are never loaded. OUT
is written as `.OUT.partial` beside its name, compared with the source byte by byte, and renamed: it
appears whole or not at all, and what a killed run left is removed by the next. semmoe.json in OUT
says what was done, and `undo_reshard` takes it back.

Shape letters: L MoE layers, E experts, R ranks, S slots per rank.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import moe_facts, read_config, text_config
from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.profiles.safetensors_file import INDEX_NAME, read_index, read_shard
from semmoe.runtime.reshard.copy import FilePlan, Written, check_parts, write_files
from semmoe.runtime.reshard.keys import Key
from semmoe.runtime.reshard.output_directory import check_space, output_directory
from semmoe.runtime.reshard.relabel import (
    Orders,
    RoutedModel,
    classify_checkpoint,
    expected_parts,
    relabel_shard,
    relabelled_config,
    relabelled_index,
    total_bytes,
)
from semmoe.runtime.reshard.sidecar import (
    LAYOUTS,
    SIDECAR,
    THREADS,
    check_unchanged,
    file_entries,
    header_notes,
    plan_facts,
    read_sidecar,
    write_sidecar,
)
from semmoe.runtime.reshard.source import Checkpoint, open_checkpoint
from semmoe.solvers.plan import Plan

VERIFY = ("none", "bytes", "logits")
NOT_RELABELLABLE = {
    "doge": "its product-key router scores a grid, not single experts",
    "switch_transformers": "its router drops tokens by position in the batch",
    "nllb-moe": "its router drops tokens by position in the batch",
    "nllb_moe": "its router drops tokens by position in the batch",
}
# Routers that read topk_method, whose default "greedy" ignores the groups; no other router does.
READ_TOPK_METHOD = ("deepseek_v2", "deepseek_ocr2", "unlimited_ocr")


@dataclass(frozen=True)
class ReshardResult:
    """What a reshard did."""

    out: str
    layout: str
    num_layers: int
    experts_moved: int  # (layer, expert) pairs with another number than before (ranks: on another rank than by number)
    files: int
    bytes_written: int
    bytes_linked: int
    verified: str
    logits_difference: float | None  # largest absolute difference, where logits were compared
    left_out: tuple[str, ...]  # files of the checkpoint that were not carried over
    notes: tuple[str, ...] = ()


def reshard_checkpoint(
    checkpoint: Path,
    plan: Plan,
    out: Path,
    *,
    layout: str = "permuted",
    link: bool = False,
    verify: str = "bytes",
    force: bool = False,
    made_by: str = "",
    progress: Stages | None = None,
) -> ReshardResult:
    """Write `checkpoint` as `out` so that the placement of `plan` holds in it.

    `link`: hard-link safetensors files that do not change instead of copying. `verify`: "bytes"
    reads everything again and compares, "logits" also runs both models, "none" trusts the disk.
    `force`: replace an `out` that is a reshard. Raises InputError where the placement, the model or
    the files do not allow it; then `out` is not there.
    """
    if layout not in LAYOUTS or verify not in VERIFY:
        raise InputError(f"layout {layout!r} and verify {verify!r}: expected one of {LAYOUTS} and of {VERIFY}")
    if layout == "ranks":
        from semmoe.runtime.reshard.ranks import write_ranks

        if verify == "logits":
            raise InputError("--verify logits needs a checkpoint that Transformers can load: use --layout permuted")
        return write_ranks(
            checkpoint, plan, out, link=link, verify=verify, force=force, made_by=made_by, progress=progress
        )
    source = open_checkpoint(checkpoint)
    model, orders = check_plan(source, plan), permutation_of(plan)
    check_groups(read_config(checkpoint), orders)
    provenance = {"plan": plan_facts(plan), "made_by": made_by, "num_experts": model.num_experts}
    return write_permuted(
        source, model, orders, out, provenance=provenance, link=link, verify=verify, force=force, progress=progress
    )


def undo_reshard(
    checkpoint: Path, out: Path, *, verify: str = "bytes", force: bool = False, progress: Stages | None = None
) -> ReshardResult:
    """Write as `out` the checkpoint that `checkpoint`, a reshard of either layout, was made from:
    the same bytes.

    With `verify`, the checksums of semmoe.json are tested first: a reshard that was changed since
    is refused.
    """
    facts = read_sidecar(checkpoint)
    if facts["layout"] == "ranks":
        from semmoe.runtime.reshard.ranks import undo_ranks

        return undo_ranks(checkpoint, facts, out, verify=verify, force=force, progress=progress)
    source = open_checkpoint(checkpoint)
    model = routed_model(read_config(checkpoint), facts["num_experts"])
    orders = {int(layer): np.argsort(order) for layer, order in facts["new2old"].items()}
    if verify != "none":
        check_unchanged(checkpoint, facts, progress)
    return write_permuted(
        source,
        model,
        orders,
        out,
        provenance=None,
        link=False,
        verify=verify,
        force=force,
        progress=progress,
        undo=facts,
    )


# ---- what the plan asks for, and whether a permutation can give it


def permutation_of(plan: Plan) -> dict[int, np.ndarray]:
    """new2old_E int64 [E] of each model layer. Raises InputError where the placement has
    replicas."""
    placement = plan.placement
    if placement.num_replicas:
        raise InputError(
            f"the plan has {placement.num_replicas} replica slots on each rank, which a permuted checkpoint cannot express: "
            "plan without replicas, or use --layout ranks"
        )
    order_LE = placement.experts_LRS.reshape(placement.num_layers, -1).astype(np.int64)
    return dict(zip(plan.model.model_layers, order_LE, strict=True))


def check_plan(source: Checkpoint, plan: Plan) -> RoutedModel:
    """Raise InputError where the checkpoint is not a model that the plan can be applied to."""
    if (source.path / SIDECAR).exists():
        raise InputError(
            f"{source.path} is a reshard already: run `semmoe reshard --undo` on it, or start from the original"
        )
    config = read_config(source.path)
    facts, wanted = moe_facts(config), plan.model
    if reason := NOT_RELABELLABLE.get(facts["model_type"]):
        raise InputError(f"{facts['model_type']} cannot be resharded: {reason}")
    pairs = [("experts", facts["num_experts"], wanted.num_experts), ("top-k", facts["top_k"], wanted.top_k)]
    if wanted.num_model_layers:
        pairs.append(("layers", facts["num_model_layers"], wanted.num_model_layers))
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise InputError(f"{source.path} has {mine} {what}, the plan is for a model with {theirs}: {wanted.model}")
    # A trace may name the language model inside a multimodal one ("qwen3_5_moe_text"); both names
    # are in config.json.
    names = {
        str(name).removesuffix("_text") for name in (facts["model_type"], text_config(config).get("model_type")) if name
    }
    if names and wanted.model_type and wanted.model_type.removesuffix("_text") not in names:
        raise InputError(
            f"{source.path} is a {facts['model_type']} model, the plan is for {wanted.model_type}: {wanted.model}"
        )
    return routed_model(config, facts["num_experts"])


def routed_model(config: dict[str, Any], num_experts: int) -> RoutedModel:
    """What the roles of keys depend on."""
    facts, inner = moe_facts(config), text_config(config)
    extra = int(inner.get("zero_expert_num") or 0)
    if facts["model_type"].startswith("inkling"):
        extra = int(inner.get("n_shared_experts") or 0)
    elif facts["model_type"].startswith("zaya"):
        extra = 1
    return RoutedModel(facts["model_type"], num_experts, extra, facts["num_model_layers"])


def check_groups(config: dict[str, Any], orders: Orders) -> None:
    """Raise InputError where the router chooses among groups of experts and a permutation breaks
    them."""
    facts, inner = moe_facts(config), text_config(config)
    num_groups, chosen = facts["n_group"], facts["topk_group"]
    family = str(inner.get("model_type") or facts["model_type"]).removesuffix("_text")
    ignored = family in READ_TOPK_METHOD and inner.get("topk_method", "greedy") == "greedy"
    if num_groups <= 1 or chosen >= num_groups or ignored:
        return
    for layer, order_E in orders.items():
        group_GE = (order_E // (len(order_E) // num_groups)).reshape(num_groups, -1)
        if (group_GE != group_GE[:, :1]).any():
            raise InputError(
                f"layer {layer}: the router picks {chosen} of {num_groups} groups of experts, and the plan splits a group, "
                "which a permuted checkpoint cannot express: place with --expressible permutation, or export the plan"
            )


# ---- writing


def write_permuted(
    source: Checkpoint,
    model: RoutedModel,
    orders: Orders,
    out: Path,
    *,
    provenance: dict[str, Any] | None,
    link: bool,
    verify: str,
    force: bool,
    progress: Stages | None,
    undo: dict[str, Any] | None = None,
) -> ReshardResult:
    """The relabelled checkpoint; with `undo` (a sidecar) headers get their former length and no
    sidecar is written."""
    keys = classify_checkpoint(source, model, set(orders))
    lengths = {name: entry["source_header_bytes"] for name, entry in undo["files"].items()} if undo else {}
    files = [
        relabel_shard(shard, keys, orders, link=link, header_bytes=lengths.get(shard.name, 0))
        for shard in source.shards
    ]
    with output_directory(out, source.path, marker=SIDECAR, force=force) as folder:
        check_space(folder, total_bytes(files) + other_bytes(source))
        copy_others(source, folder, skip=(SIDECAR,))
        relabel_configs(source, orders, folder)
        write_index(source, keys, orders, folder)
        sums = write_all(files, folder, verify=verify, progress=progress)
        if verify != "none":
            check_written(source, model, orders, files, folder)
        difference = None
        if verify == "logits":
            from semmoe.runtime.reshard.logits import compare_logits

            difference = compare_logits(source.path, folder)
        entries = file_entries(source, files, sums)
        notes = ()
        if undo:
            notes = header_notes(files, {name: entry["source_header_sha256"] for name, entry in undo["files"].items()})
        else:
            sidecar = {
                "layout": "permuted",
                **(provenance or {}),
                "new2old": {str(k): v.tolist() for k, v in orders.items()},
            }
            write_sidecar(folder, {**sidecar, "files": entries})
    moved = sum(int((order != np.arange(len(order))).sum()) for order in orders.values())
    linked = sum(file.size for file in files if file.link)
    return ReshardResult(
        str(out),
        "permuted",
        len(orders),
        moved,
        len(files),
        total_bytes(files),
        linked,
        verify,
        difference,
        source.left_out,
        notes,
    )


def write_all(
    files: Sequence[FilePlan], root: Path, *, verify: str, progress: Stages | None
) -> dict[str, list[list[int]]]:
    """Write the files, telling `progress` how far it is; checksums [offset, bytes, checksum] by
    file name."""
    sums: dict[str, list[list[int]]] = defaultdict(list)
    total, done = sum(part.num_bytes for file in files for part in file.parts), 0

    def keep(written: Written) -> None:
        nonlocal done
        done += written.num_bytes
        if written.checksum >= 0:
            sums[written.name].append([written.offset, written.num_bytes, written.checksum])
        if progress:
            progress("writing", done, total)

    write_files(files, root, threads=THREADS, verify=verify != "none", done=keep)
    return {name: sorted(entries) for name, entries in sums.items()}


def check_written(
    source: Checkpoint, model: RoutedModel, orders: Orders, files: Sequence[FilePlan], root: Path
) -> None:
    """Raise InputError unless the headers and the index on the disk ask for just the bytes that
    were copied."""
    shards = {shard.name: shard for shard in source.shards}
    index = read_index(root / INDEX_NAME)["weight_map"] if source.index else {}
    for file in files:
        written = read_shard(root / file.name)
        if not file.link:
            check_parts(written.path, expected_parts(written, shards[file.name], model, orders), file.parts)
        for tensor in written.tensors:
            if index.pop(tensor.name, file.name) != file.name:
                raise InputError(f"{root / INDEX_NAME} names another file for {tensor.name}: nothing was kept")
    if index:
        raise InputError(f"{root / INDEX_NAME} names {next(iter(index))}, which no file holds: nothing was kept")


def other_bytes(source: Checkpoint) -> int:
    """Bytes of what copy_others copies."""
    return sum(path.stat().st_size for name in source.others if (path := source.path / name).exists())


def copy_others(source: Checkpoint, target: Path, *, skip: tuple[str, ...]) -> None:
    """Carry over config, tokenizer, generation config, custom code and whatever else is not
    weights."""
    for name in source.others:
        if name not in skip:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source.path / name, target / name)
            except FileNotFoundError:
                raise InputError(f"{source.path / name} is a link to nothing: the checkpoint is not complete") from None


def relabel_configs(source: Checkpoint, orders: Orders, target: Path) -> None:
    """Quantisation settings may name experts: config.json, hf_quant_config.json,
    quantize_config.json, ..."""
    for name in source.others:
        if "/" not in name and name.endswith(".json") and ("config" in name or "quant" in name):
            text = (target / name).read_bytes().decode("utf-8", errors="surrogateescape")
            renamed = relabelled_config(text, orders)
            if renamed != text:
                (target / name).write_bytes(renamed.encode("utf-8", errors="surrogateescape"))


def write_index(source: Checkpoint, keys: Mapping[str, Key], orders: Orders, target: Path) -> None:
    if source.index:
        index = {**source.index, "weight_map": relabelled_index(source.index["weight_map"], keys, orders)}
        end = "\n" if (source.path / INDEX_NAME).read_bytes().endswith(b"\n") else ""
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2, ensure_ascii=False) + end, encoding="utf-8")
