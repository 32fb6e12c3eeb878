"""Relabel the experts of a checkpoint: which bytes and which names each output file gets, computed
from headers alone.

`orders` maps a model layer to new2old_E: position e of the output holds the expert that the source
calls new2old_E[e]. A per-expert key is renamed and its bytes stay; fused tensors, router rows and
per-expert vectors are gathered along the expert axis; tables of expert ids get new values. Reading
the output back (`expected_parts`) goes the other way, from the names in the written header to the
source, so that a mistake in one direction shows in the comparison.

Shape letters: E experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.safetensors_file import INTEGERS, Shard, Tensor, make_header
from semmoe.runtime.reshard.copy import Edit, FilePlan, Part, Piece, merged
from semmoe.runtime.reshard.keys import Key, Role, classify_written
from semmoe.runtime.reshard.model import RoutedModel

EDIT_BYTES = 4 << 20  # smaller tensors are gathered in memory, larger ones by copies of each expert's bytes
Orders = Mapping[int, np.ndarray]


def relabel_shard(
    shard: Shard, keys: Mapping[str, Key], orders: Orders, *, link: bool, header_bytes: int = 0
) -> FilePlan:
    """One output file. `header_bytes`: length its header should have; default that of the
    source."""
    if link and all(keys[tensor.name].role is Role.KEEP for tensor in shard.tensors):
        return FilePlan(shard.name, b"", shard.size, (), shard.path)
    old2new = {layer: np.argsort(order) for layer, order in orders.items()}
    tensors = []
    for tensor in shard.tensors:
        key = keys[tensor.name]
        name = key.renamed(tensor.name, int(old2new[key.layer][key.expert])) if key.role is Role.EXPERT else tensor.name
        tensors.append(replace(tensor, name=name))
    header = make_header(tuple(tensors), shard.metadata, header_bytes=header_bytes or shard.header_bytes)
    parts: list[Part] = []
    for tensor in shard.tensors:
        key = keys[tensor.name]
        parts += tensor_parts(shard, tensor, key, orders.get(key.layer), len(header) + tensor.begin)
    return FilePlan(shard.name, header, len(header) + shard.size - shard.header_bytes, tuple(merged(parts)))


def tensor_parts(shard: Shard, tensor: Tensor, key: Key, order_E: np.ndarray | None, offset: int) -> list[Part]:
    """Where the bytes of a tensor, relabelled, come from; `offset` is their place in the output
    file."""
    begin = shard.header_bytes + tensor.begin
    if key.role in (Role.KEEP, Role.EXPERT) or order_E is None:
        return [Piece(shard.path, begin, offset, tensor.num_bytes)]
    if key.role is Role.ROWS and tensor.num_bytes > EDIT_BYTES:
        block, routed = block_bytes(tensor, key, len(order_E), shard.path)
        parts: list[Part] = [
            Piece(shard.path, begin + int(old) * block, offset + new * block, block) for new, old in enumerate(order_E)
        ]
        return [*parts, Piece(shard.path, begin + routed, offset + routed, tensor.num_bytes - routed)]

    def make() -> bytes:
        return relabelled_bytes(read_bytes(shard.path, begin, tensor.num_bytes), tensor, key, order_E)

    def check(written: bytes) -> bool:
        # The way back: the inverse permutation of what was written must be what the source holds.
        inverse = np.argsort(order_E)
        return relabelled_bytes(written, tensor, key, inverse) == read_bytes(shard.path, begin, tensor.num_bytes)

    return [Edit(offset, tensor.num_bytes, make, check)]


def block_bytes(tensor: Tensor, key: Key, num_experts: int, where: Path) -> tuple[int, int]:
    """Bytes of one expert along axis 0, and of all routed experts."""
    row_bytes, rest = divmod(tensor.num_bytes, tensor.shape[0])
    if rest or key.rows % num_experts:
        raise InputError(f"{tensor.name} does not divide into {num_experts} experts of whole bytes: {where}")
    return row_bytes * (key.rows // num_experts), row_bytes * key.rows


def relabelled_bytes(data: bytes, tensor: Tensor, key: Key, order_E: np.ndarray) -> bytes:
    """The bytes of a whole tensor after the permutation order_E (new2old) of its experts."""
    if key.role is Role.VALUES:
        if tensor.dtype not in INTEGERS:
            raise InputError(f"{tensor.name} holds expert ids as {tensor.dtype}, expected integers")
        ids = np.frombuffer(data, INTEGERS[tensor.dtype])
        if len(ids) and (ids.min() < 0 or ids.max() >= len(order_E)):
            raise InputError(f"{tensor.name} names expert {ids.max()}, expected 0..{len(order_E) - 1}")
        return np.argsort(order_E).astype(ids.dtype)[ids].tobytes()
    if key.role is Role.COLUMNS:
        # Ernie 4.5: a router [H, E], a bias [1, E], or [2, E] whose second row belongs to the
        # vision experts.
        table = np.frombuffer(data, np.uint8).reshape(tensor.shape[0], tensor.shape[1], -1).copy()
        rows = slice(0, 1) if tensor.shape[0] == 2 else slice(None)
        table[rows] = table[rows][:, order_E]
        return table.tobytes()
    block, routed = block_bytes(tensor, key, len(order_E), Path(tensor.name))
    rows_EB = np.frombuffer(data, np.uint8)[:routed].reshape(len(order_E), block)
    return rows_EB[order_E].tobytes() + data[routed:]


def read_bytes(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise InputError(f"{path} ends at byte {offset + len(data):,}, expected {num_bytes:,} bytes from {offset:,}")
    return data


def expected_parts(shard: Shard, source: Shard, model: RoutedModel, orders: Orders) -> list[Part]:
    """What a written file must hold, told from its own header: parts of the source that cover its
    data region.

    Raises InputError where its names, types, shapes or metadata are not those of the source under
    the permutation.
    """
    written = shard.path
    sources = {tensor.name: tensor for tensor in source.tensors}
    parts: list[Part] = []
    for tensor in shard.tensors:
        key = classify_written(tensor, model, set(orders), written)
        name = key.renamed(tensor.name, int(orders[key.layer][key.expert])) if key.role is Role.EXPERT else tensor.name
        original = sources.pop(name, None)
        if original is None or (original.dtype, original.shape) != (tensor.dtype, tensor.shape):
            raise InputError(
                f"{written} holds {tensor.name}, which has no counterpart in {source.path}: nothing was kept"
            )
        order_E = orders.get(key.layer) if key.role is not Role.KEEP else None
        parts += tensor_parts(source, original, key, order_E, shard.header_bytes + tensor.begin)
    if sources or shard.metadata != source.metadata:
        raise InputError(f"{written} lacks {next(iter(sources), 'the metadata')} of {source.path}: nothing was kept")
    return merged(parts)


def relabelled_index(weight_map: Mapping[str, str], keys: Mapping[str, Key], orders: Orders) -> dict[str, str]:
    """The index's map after renaming, sorted where it was sorted."""
    old2new = {layer: np.argsort(order) for layer, order in orders.items()}
    result = {}
    for name, file in weight_map.items():
        key = keys[name]
        result[key.renamed(name, int(old2new[key.layer][key.expert])) if key.role is Role.EXPERT else name] = file
    return dict(sorted(result.items())) if list(weight_map) == sorted(weight_map) else result
