"""In which order a checkpoint numbers its experts: semmoe.json of a permuted reshard.

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

SIDECAR = "semmoe.json"
FORMAT = "semmoe-reshard"
VERSION = 1

ANY = record({"layout": one_of("permuted", "ranks"), "plan": record({"fingerprint": text(200)})})
PERMUTED = record(
    {
        "num_experts": integer(1, 65_535),
        "new2old": map_of(list_of(integer(0, 65_534), most=65_535), keys=text(10, "[0-9]+", "a number of a layer")),
    }
)


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
    return None if file is None or not file.exists() else _read(file)


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


def _read(file: Path) -> Relabelling | None:
    facts = read_document(
        lambda: read_bounded(file), str(file.parent), SIDECAR, kind="reshard", format=FORMAT, version=VERSION
    )
    validate(facts, ANY, str(file))
    if facts.get("sha256", hash_facts(facts)) != hash_facts(facts):
        raise InputError(f"{file} was changed after it was written: its sha256 is not that of its keys")
    if facts["layout"] == "ranks":  # routers keep the model's own numbering
        return None
    validate(facts, PERMUTED, str(file))
    experts = list(range(facts["num_experts"]))
    for layer, order in facts["new2old"].items():
        if sorted(order) != experts:
            raise InputError(
                f"{file}: new2old.{layer} is {shortened(order)}, expected every expert of 0 to {experts[-1]} once"
            )
    new2old = {int(layer): order for layer, order in facts["new2old"].items()}
    return Relabelling(str(file), facts["plan"]["fingerprint"], facts["num_experts"], new2old)
