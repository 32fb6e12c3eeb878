"""semmoe.json of a reshard, and in which order a permuted one numbers its experts.

A server that runs such a checkpoint reports the new numbers. Traces speak of the model's own, so
they are mapped back here, where a trace is written.

Shape letters: T tokens, L MoE layers, K top-k, E experts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semmoe.profiles.config import hub_in_reach, is_hub_id
from semmoe.profiles.document import (
    SHA256,
    distinct,
    grid,
    integer,
    list_of,
    map_of,
    one_of,
    read_bounded,
    read_document,
    record,
    shortened,
    text,
    validate,
)
from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import MAX_HEADER_BYTES

SIDECAR = "semmoe.json"
FORMAT = "semmoe-reshard"
VERSION = 1

PLAN = record(
    {"fingerprint": text(200)},
    {
        "model": text(),
        "method": text(),
        "seed": integer(-(2**63)),
        "ranks": integer(1, 65_535),
        "nodes": integer(1, 65_535),
        "made_by": text(),
    },
)
HEADER_BYTES = integer(8, 8 + MAX_HEADER_BYTES)
OF_FILE = {
    "linked": one_of(True),
    "header_sha256": SHA256,
    "checksums": list_of(list_of(integer(0, 2**64 - 1), least=3, most=3)),  # offset, bytes, checksum
}
ANY = {"plan": PLAN, "num_experts": integer(1, 65_535)}
LAYOUTS = ("permuted", "ranks")
OF_LAYOUT = {
    "permuted": record(
        {
            **ANY,
            "new2old": map_of(list_of(integer(0, 65_534), most=65_535), keys=text(10, "[0-9]+", "a number of a layer")),
            "files": map_of(
                record(
                    {"bytes": integer(), "source_header_bytes": HEADER_BYTES, "source_header_sha256": SHA256},
                    {"source_sha256": SHA256, **OF_FILE},
                )
            ),
        },
        {"made_by": text(), "settings": map_of(text(10_000_000, "[\x00-\xff]*", "text of Latin-1"))},
    ),
    "ranks": record(
        {
            **ANY,
            "model_layers": distinct(list_of(integer(0, 1_000_000), most=100_000)),
            "placement": grid((None, None, None), -1, 65_534),  # -1 in empty slots
            "files": map_of(record({"bytes": integer()}, OF_FILE)),
        },
        {"made_by": text(), "headers_sha256": SHA256},
    ),
}


@dataclass(frozen=True)
class Relabelling:
    """The order of experts of a permuted reshard.

    Fields:
        where: its semmoe.json.
        plan: fingerprint of the plan that gave the order.
        num_experts: E of every layer.
        new2old: by model layer, which expert of the source each one is; a layer that is not named
            kept its order.
    """

    where: str
    plan: str
    num_experts: int
    new2old: dict[int, list[int]]

    @property
    def numbering(self) -> dict[str, Any]:
        """What trace.json says of a trace that was mapped back."""
        return {"plan": self.plan, "mapped_back": True}

    @property
    def note(self) -> str:
        """What people are told."""
        return (
            f"the model is a reshard of plan {self.plan}: expert ids are mapped back through new2old of its {SIDECAR}"
        )

    def orders(self, model_layers: Sequence[int], num_experts: int) -> np.ndarray:
        """The old number of every new one, int64 [L, E + 1]; E, an empty slot, stays. Raises
        InputError where the layers have another number of experts."""
        if num_experts != self.num_experts:
            raise InputError(
                f"{self.where} is of {self.num_experts} experts a layer, the routing to map back of {num_experts}"
            )
        own = list(range(num_experts))
        return np.array([[*self.new2old.get(layer, own), num_experts] for layer in model_layers], np.int64)

    def original(self, identity: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the identity of the reshard (profiles/checkpoint.py) tells of its source: hashes of
        the permuted routers are not the source's."""
        return identity and {**identity, "router_sha256": None, "index_sha256": None}


def hash_facts(facts: dict[str, Any]) -> str:
    """What semmoe.json says of itself: an order of experts that was changed would be taken back
    to another model."""
    content = json.dumps({key: facts[key] for key in facts if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def find_relabelling(model: str, *, revision: str | None = None) -> Relabelling | None:
    """The order of a checkpoint, where it is a permuted reshard; None for every other model.

    Parameters:
        model: a directory, a config.json in one, a hub id, or "demo".
        revision: of a hub model.

    Raises InputError where its semmoe.json is damaged.
    """
    path = Path(model)
    if path.exists():
        file: Path | None = (path.parent if path.is_file() else path) / SIDECAR
    else:
        file = _hub_sidecar(model, revision) if model != "demo" and is_hub_id(model) else None
    if file is None or not file.exists():
        return None
    facts = read_reshard(file.parent)
    if facts["layout"] == "ranks":  # routers keep the model's own numbering
        return None
    new2old = {int(layer): order for layer, order in facts["new2old"].items()}
    return Relabelling(str(file), facts["plan"]["fingerprint"], facts["num_experts"], new2old)


def config_folder(model: str) -> str:
    """Where the config.json of a model is to be looked for: in shared/ of a reshard of layout
    "ranks"."""
    shared = Path(model) / "shared"
    ranks = (Path(model) / SIDECAR).is_file() and (shared / "config.json").is_file()
    return str(shared) if ranks and not (Path(model) / "config.json").exists() else model


def _hub_sidecar(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, SIDECAR, revision=revision, local_files_only=not hub_in_reach()))
    except EntryNotFoundError:  # nor in the cache, where only that is left
        return None


def read_reshard(folder: Path) -> dict[str, Any]:
    """The content of semmoe.json. Raises InputError where there is none, it was changed, or it is
    not what a reshard writes; what its names lead to is for the reader of the files to check."""
    where = folder / SIDECAR
    facts = read_document(
        lambda: read_bounded(where), str(folder), SIDECAR, kind="reshard", format=FORMAT, version=VERSION
    )
    if facts.get("sha256", hash_facts(facts)) != hash_facts(facts):
        raise InputError(f"{where} was changed after it was written: its sha256 is not that of its keys")
    validate(facts, record({"layout": one_of(*LAYOUTS)}), str(where))
    validate(facts, OF_LAYOUT[facts["layout"]], str(where))
    experts = list(range(facts["num_experts"]))
    orders = facts.get("new2old", {})
    if facts["layout"] == "ranks":
        placed = [sorted({expert for rank in layer for expert in rank} - {-1}) for layer in facts["placement"]]
        if len(placed) != len(facts["model_layers"]):
            raise InputError(f"{where}: placement has {len(placed)} layers, model_layers {len(facts['model_layers'])}")
        orders = dict(zip(facts["model_layers"], placed, strict=True))
    for layer, order in orders.items():
        if sorted(order) != experts:
            at = f"new2old.{layer}" if facts["layout"] == "permuted" else f"placement of layer {layer}"
            raise InputError(f"{where}: {at} is {shortened(order)}, expected every expert of 0 to {experts[-1]}")
    return facts
