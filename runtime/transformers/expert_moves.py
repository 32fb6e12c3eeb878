"""Experts that move between the ranks of a placed model: their weights travel from slot to slot
while nothing is served.

A rank receives one expert at a time, into a spare one's memory, and writes it into its slot once
what it gives away in the same step has left.

Shape letters: S slots per rank.
"""

from operator import attrgetter

import torch
import torch.distributed as dist

from semmoe.profiles.errors import InputError
from semmoe.runtime.layer.exchange import wait_for
from semmoe.runtime.ranks.failures import naming
from semmoe.runtime.transformers.placed_model import PlacedModel
from semmoe.solvers.replan.steps import Transfer


def move_experts(placed: PlacedModel, number: int, steps: list[list[Transfer]]) -> int:
    """Carry out the steps of MoE layer `number`, counted over MoE layers; every rank calls it.

    Returns the bytes that this rank has received. The layer's tables stay as they are. Raises
    ExchangeError where a rank is gone.
    """
    received, group, layer = 0, placed.group, placed.layers[number]
    for sent in steps:
        arriving = next((transfer for transfer in sent if transfer.to_rank == group.rank), None)
        leaving = [transfer for transfer in sent if transfer.from_rank == group.rank]
        if arriving is None and not leaving:
            continue
        with naming(group.rank, f"the move of experts at {layer.tables.name}"):
            spare = _exchanged(placed, number, arriving, leaving)
        if arriving is not None:
            for into, values in zip(slot_tensors(placed, number, arriving.to_slot), spare, strict=True):
                into.copy_(values.view(into.dtype).reshape(into.shape))
                received += values.nbytes
            placed.held_LS[number, arriving.to_slot] = arriving.expert
    return received


def slot_tensors(placed: PlacedModel, number: int, slot: int) -> list[torch.Tensor]:
    """The weights of one slot, as views of the module's tensors."""
    module = placed.modules[number]
    found = [(attrgetter(name)(module), rows) for name, rows, _ in placed.axes_L[number] if rows]
    return [whole[slot * rows : (slot + 1) * rows] for whole, rows in found]


def check_movable(placed: PlacedModel, name: str) -> None:
    """Raise InputError where experts modules keep their weights in another form than that which
    room was made for, as some quantised models do."""
    for layer, module, axes in zip(placed.layers, placed.modules, placed.axes_L, strict=True):
        rows_of = {axis.name: axis.rows * axis.slots for axis in axes}
        for key, values in module.state_dict(keep_vars=True).items():
            rows = rows_of.get(key)
            if rows is None or (rows and values.shape[0] != rows):
                raise InputError(
                    f"--replan: {name} keeps {key} of {layer.tables.name} in a form whose experts cannot move"
                )


def _exchanged(
    placed: PlacedModel, number: int, arriving: Transfer | None, leaving: list[Transfer]
) -> list[torch.Tensor]:
    """The bytes of what arrives, tensor by tensor, once all that leaves has left."""
    group, operations, spare = placed.group, list[dist.P2POp](), list[torch.Tensor]()
    # gloo sends from the host's memory.
    device = "cpu" if group.backend == "gloo" else group.device
    for transfer in leaving:
        for values in slot_tensors(placed, number, transfer.from_slot):
            sent = values.to(device).reshape(-1).view(torch.uint8)
            operations.append(dist.P2POp(dist.isend, sent, group=group.handle, group_peer=transfer.to_rank))
    if arriving is not None:
        for values in slot_tensors(placed, number, arriving.to_slot):
            spare.append(torch.empty(values.nbytes, dtype=torch.uint8, device=device))
            operations.append(dist.P2POp(dist.irecv, spare[-1], group=group.handle, group_peer=arriving.from_rank))
    wait_for(dist.batch_isend_irecv(operations))
    return spare
