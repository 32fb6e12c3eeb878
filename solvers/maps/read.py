"""The way back: an expert map that an engine runs today, read into a placement.

Each engine's reader takes a file as the engine itself would take it and refuses what the engine
would refuse or, worse, quietly misread. What the readers return is checked by Placement: every
expert somewhere. A rank may hold one twice, which EPLB often makes (its issue 22): the second slot
serves nobody who could not use the first, and is counted.

Shape letters: L MoE layers, R ranks, S slots per rank, P slots of all ranks (R * S), M rows of a
file.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.maps.kinds import engine_of
from semmoe.solvers.placement import Placement, Topology
from semmoe.solvers.plan import ModelFacts


class ImportedMap(NamedTuple):
    """A placement that an engine's file holds, and what is to say of it, a line each."""

    placement: Placement
    notes: list[str]


def import_placement(kind: str, file: Path, model: ModelFacts, topology: Topology) -> Placement:
    """The placement alone of `read_placement`."""
    return read_placement(kind, file, model, topology).placement


def read_placement(kind: str, file: Path, model: ModelFacts, topology: Topology) -> ImportedMap:
    """The placement in an engine's file, for the ranks of `topology`.

    Parameters:
        kind: one of KINDS.
        file: what the engine reads today.
        model: from a trace; its layers are those that the placement will have.
        topology: its ranks share the slots of the file in order.

    Raises InputError, one line with the file, where it is damaged, of another kind, or for another
    model or number of ranks.
    """
    # Rows of all layers of the file are checked, under their numbers there; then those of the MoE
    # layers are taken.
    rows_MP, layer_of_M, wanted_L, num_draft = engine_of(kind, "--import").read(file, model, topology)
    where = str(file)
    num_slots = rows_MP.shape[1]
    if num_slots % topology.num_ranks:
        raise InputError(f"{where}: {num_slots} slots do not divide over {topology.num_ranks} ranks")
    if num_slots < model.num_experts:
        raise InputError(f"{where}: {num_slots} slots cannot hold the model's {model.num_experts} experts")
    if rows_MP.min() < 0 or rows_MP.max() >= model.num_experts:
        bad = rows_MP.min() if rows_MP.min() < 0 else rows_MP.max()
        raise InputError(f"{where} names expert {bad}, the model has experts 0..{model.num_experts - 1}")
    experts_MRS = rows_MP.astype(np.int32).reshape(len(rows_MP), topology.num_ranks, -1)
    try:
        Placement(experts_MRS, model.num_experts, may_waste=True)
    except InputError as error:
        # Placement counts rows from 0; the file may number its layers otherwise.
        said = re.sub(r"^layer (\d+)", lambda m: f"layer {layer_of_M[int(m[1])]}", str(error))
        raise InputError(f"{where}: {said}") from None
    index = {layer: m for m, layer in enumerate(layer_of_M)}
    placement = Placement(experts_MRS[[index[layer] for layer in wanted_L]], model.num_experts, may_waste=True)
    notes = [f"the last {num_draft} rows of {file} are taken as draft layers and left out"] if num_draft else []
    if wasted := placement.num_wasted:
        notes.append(
            f"{wasted} of {placement.experts_LRS.size} slots hold an expert that their rank of {topology.num_ranks} holds "
            "already: they serve nothing; where so many are a surprise, the map was made for another number of ranks"
        )
    return ImportedMap(placement, notes)
