"""Placement by load alone: equal counts, heaviest expert first, each to the lightest rank that has
room.

With replicas the steps are those of the Expert Parallelism Load Balancer (DeepSeek-AI,
github.com/deepseek-ai/EPLB): routing groups are packed onto nodes, the hottest expert per slot is
replicated within its node, and the physical experts are packed onto the node's ranks. Nothing here
looks at which experts a token uses together: this is the baseline that engines ship.

Shape letters: L MoE layers, E experts, R ranks, N nodes, S slots per rank, I items, P packs, J
physical experts of a node.
"""

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Placement, Topology


def place_load(load_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rank of every expert, int32 [L, E], E / R experts on each rank.

    `load_LE`: activations per layer and expert, any non-negative numbers. Raises InputError where E
    does not divide over the ranks.
    """
    load_LE = np.asarray(load_LE, np.float64)
    num_experts = load_LE.shape[1]
    if num_ranks < 1 or num_experts % num_ranks:
        raise InputError(f"{num_experts} experts do not divide over {num_ranks} ranks")
    return np.stack([pack(load_E, num_ranks)[0] for load_E in load_LE]).astype(np.int32)


def place_load_on_nodes(load_LE: np.ndarray, topology: Topology, num_groups: int) -> np.ndarray:
    """Rank of every expert, int [L, E]: as `place_load`, on several nodes with the routing groups
    packed onto nodes first, where they divide over them."""
    num_ranks, num_experts = topology.num_ranks, load_LE.shape[1]
    if topology.num_nodes == 1:
        return place_load(load_LE, num_ranks)
    options = {"num_groups": num_groups, "num_nodes": topology.num_nodes, "num_ranks": num_ranks}
    experts_LRS = place_load_replicated(load_LE, num_experts, **options)
    return Placement(experts_LRS, num_experts).rank_of_LE


def place_load_replicated(
    load_LE: np.ndarray, num_slots: int, *, num_groups: int, num_nodes: int, num_ranks: int
) -> np.ndarray:
    """Experts of every rank in slot order, int32 [L, R, S] with S = num_slots / R; no expert twice
    on one rank.

    Groups stay on a node where their number divides over the nodes; otherwise all ranks count as
    one node and one group. Raises InputError where slots, experts, groups, nodes and ranks do not
    fit each other.
    """
    load_LE = np.asarray(load_LE, np.float64)
    num_layers, num_experts = load_LE.shape
    if num_ranks < 1 or num_slots % num_ranks:
        raise InputError(f"{num_slots} slots do not divide over {num_ranks} ranks")
    if not num_experts <= num_slots <= num_experts * num_ranks:
        raise InputError(f"{num_slots} slots on {num_ranks} ranks cannot hold {num_experts} experts without repetition")
    uneven = num_groups % num_nodes or num_experts % num_groups or num_ranks % num_nodes
    if uneven or num_slots * num_nodes > num_experts * num_ranks:
        num_groups = num_nodes = 1
    experts_LJ = np.empty((num_layers, num_slots), np.int32)
    for layer, load_E in enumerate(load_LE):
        experts_LJ[layer] = _place_layer(load_E, num_slots, num_groups, num_nodes, num_ranks)
    return experts_LJ.reshape(num_layers, num_ranks, num_slots // num_ranks)


def pack(weight_I: np.ndarray, num_packs: int, label_I: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pack of every item and its position in it, int64 [I] each: equal counts, heaviest first, to
    the lightest pack.

    Items of equal `label_I` go to different packs (there are at most P of each label).
    """
    num_items = len(weight_I)
    per_pack = num_items // num_packs
    if label_I is None and per_pack == 1:
        return np.arange(num_items), np.zeros(num_items, np.int64)
    pack_I, position_I = np.empty(num_items, np.int64), np.empty(num_items, np.int64)
    weight_P, count_P = np.zeros(num_packs), np.zeros(num_packs, np.int64)
    items_P: list[list[int]] = [[] for _ in range(num_packs)]
    for item in np.argsort(-weight_I, kind="stable"):
        open_P = count_P < per_pack
        clear_P = open_P
        if label_I is not None:
            holds_P = np.array([any(label_I[i] == label_I[item] for i in items) for items in items_P])
            clear_P = open_P & ~holds_P
        if clear_P.any():
            chosen = int(np.argmin(np.where(clear_P, weight_P, np.inf)))
        else:
            chosen, other = _make_room(item, items_P, open_P, weight_I, np.asarray(label_I))
            target = int(np.flatnonzero(open_P)[0])
            position_I[other], pack_I[other] = count_P[target], target
            items_P[chosen].remove(other)
            items_P[target].append(other)
            weight_P[[target, chosen]] += weight_I[other], -weight_I[other]
            count_P[target] += 1
            taken = {int(position_I[i]) for i in items_P[chosen]}
            pack_I[item], position_I[item] = chosen, next(p for p in range(per_pack) if p not in taken)
            items_P[chosen].append(int(item))
            weight_P[chosen] += weight_I[item]
            continue
        pack_I[item], position_I[item] = chosen, count_P[chosen]
        items_P[chosen].append(int(item))
        weight_P[chosen] += weight_I[item]
        count_P[chosen] += 1
    return pack_I, position_I


def _make_room(
    item: int, items_P: list[list[int]], open_P: np.ndarray, weight_I: np.ndarray, label_I: np.ndarray
) -> tuple[int, int]:
    """A full pack without the item's label, and its item nearest in weight that the first open
    pack can take."""
    target = int(np.flatnonzero(open_P)[0])
    held = {int(label_I[i]) for i in items_P[target]}
    moves = [
        (abs(weight_I[other] - weight_I[item]), p, other)
        for p, items in enumerate(items_P)
        if p != target and all(label_I[i] != label_I[item] for i in items)
        for other in items
        if int(label_I[other]) not in held
    ]
    _, chosen, other = min(moves)
    return chosen, other


def replicate(weight_I: np.ndarray, num_slots: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Item of every slot, int64 [num_slots], and copies of every item, int64 [I]: one each, then to
    the hottest per copy.

    No item gets more than `limit` copies.
    """
    count_I = np.ones(len(weight_I), np.int64)
    item_of_slot = list(range(len(weight_I)))
    for _ in range(num_slots - len(weight_I)):
        hottest = int(np.argmax(np.where(count_I < limit, weight_I / count_I, -np.inf)))
        item_of_slot.append(hottest)
        count_I[hottest] += 1
    return np.array(item_of_slot), count_I


def _place_layer(load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> np.ndarray:
    """Experts by slot of one layer, [num_slots]: groups to nodes, replicas in the node, all
    copies to its ranks."""
    num_experts = len(load_E)
    group_size = num_experts // num_groups
    node_G, position_G = pack(load_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    start_G = (node_G * (num_groups // num_nodes) + position_G) * group_size
    order_E = np.empty(num_experts, np.int64)
    order_E[(start_G[:, None] + np.arange(group_size)).ravel()] = np.arange(num_experts)
    ranks_per_node, slots_per_node = num_ranks // num_nodes, num_slots // num_nodes
    placed = []
    for experts in order_E.reshape(num_nodes, -1):
        item_J, copies_I = replicate(load_E[experts], slots_per_node, ranks_per_node)
        rank_J, position_J = pack((load_E[experts] / copies_I)[item_J], ranks_per_node, item_J)
        slots_J = np.empty(slots_per_node, np.int64)
        slots_J[rank_J * (slots_per_node // ranks_per_node) + position_J] = experts[item_J]
        placed.append(slots_J)
    return np.concatenate(placed)
