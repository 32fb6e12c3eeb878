"""Which checkpoint a trace was recorded on: facts of its config.json, and a hash of its routers.

Routers decide the routing, so two checkpoints with the same routers are one model to a plan,
however their other weights are stored, quantised or cut into files. Where a checkpoint has no
safetensors, the hash of its index stands for it.
"""

import hashlib
from pathlib import Path
from typing import Any

from semmoe.profiles.config import read_config, text_config
from semmoe.profiles.document import SHA256, integer, null_or, read_bounded, record, text
from semmoe.profiles.errors import InputError
from semmoe.profiles.families import LAYER, ROUTER_ROWS, VECTOR
from semmoe.profiles.files import inside
from semmoe.profiles.safetensors_file import Shard, read_shard, tensor_files

SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "moe_intermediate_size")
MUST_AGREE = ("num_hidden_layers", "hidden_size", "moe_intermediate_size")  # a fine-tune may add to the vocabulary
CONFIG = record({}, {"model_type": text(), **dict.fromkeys(SIZES, integer())})
IDENTITY = record({"config": CONFIG}, {"router_sha256": null_or(SHA256), "index_sha256": null_or(SHA256)})


def checkpoint_identity(folder: Path) -> dict[str, Any] | None:
    """What tells the checkpoint in a directory from others: {"config": some facts, "router_sha256",
    "index_sha256"}, the hashes null where there is nothing to hash. None where it holds no
    config.json.

    Raises InputError where a file of it is damaged.
    """
    if not (folder / "config.json").is_file():
        return None
    config = text_config(read_config(folder))
    index = next(iter(sorted(folder.glob("*.index.json"))), None)
    try:
        index_bytes = read_bounded(index) if index else None
    except (OSError, ValueError) as error:
        raise InputError(f"{index} cannot be read: {error}") from None
    return {
        "config": {"model_type": str(config.get("model_type") or "")}
        | {key: config[key] for key in SIZES if type(config.get(key)) is int and config[key] >= 0},
        "router_sha256": router_sha256(folder),
        "index_sha256": None if index_bytes is None else hashlib.sha256(index_bytes).hexdigest(),
    }


def router_sha256(folder: Path) -> str | None:
    """The hash of names, types, shapes and bytes of all routers of a checkpoint, by name: it does
    not depend on how tensors are cut into files. None where it has none."""
    digest, shards = hashlib.sha256(), dict[str, Shard]()
    names = {name: file for name, file in tensor_files(folder).items() if _is_router(name)}
    for name, file in sorted(names.items()):
        if file not in shards:
            shards[file] = read_shard(inside(folder, file, f"{folder}: the file of {name}", ending=".safetensors"))
        shard, tensor = shards[file], shards[file].find(name)
        digest.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with shard.path.open("rb") as file:
            file.seek(shard.header_bytes + tensor.begin)
            digest.update(file.read(tensor.num_bytes))
    return digest.hexdigest() if names else None


def _is_router(name: str) -> bool:
    layer = LAYER.match(name)
    return bool(layer and (ROUTER_ROWS.match(layer["rest"]) or VECTOR.match(layer["rest"])))


def same_routers(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool | None:
    """Whether two checkpoints have the same routers; None where that is not known."""
    hashes = [(known or {}).get("router_sha256") for known in (one, other)]
    return hashes[0] == hashes[1] if all(hashes) else None


def compare_checkpoint(traced: dict[str, Any] | None, folder: Path, where: str) -> tuple[bool | None, str]:
    """Whether the checkpoint in `folder` is the one that was traced, and a line for people where it
    is not; None and no line where nothing tells.

    Parameters:
        traced: `checkpoint_identity` of the one that was traced.
        folder: where config.json and routers lie.
        where: the checkpoint as the user named it.

    Raises InputError where it is of other sizes: it is not the same model, nor a fine-tune of it.
    """
    own = checkpoint_identity(folder) if traced else None
    if not traced or not own:
        return None, ""
    for key in MUST_AGREE:
        mine, theirs = own["config"].get(key), traced["config"].get(key)
        if mine is not None and theirs is not None and mine != theirs:
            raise InputError(f"{where} has {key} {mine}, the plan was traced on a checkpoint with {key} {theirs}")
    for key, what in (("router_sha256", "router weights"), ("index_sha256", "index")):
        mine, theirs = own.get(key), traced.get(key)
        if mine and theirs:
            line = f"the plan was traced on another checkpoint: {what} of {where} {mine[:12]}, of that one {theirs[:12]} (SHA-256)"
            return (True, "") if mine == theirs else (False, line)
    return None, ""
