"""What engines do without us: contiguous experts, and packing by load alone.

By load: even counts, heaviest expert first, each to the lightest rank that has room. With copies
the steps are those of the Expert Parallelism Load Balancer (DeepSeek-AI,
github.com/deepseek-ai/EPLB): routing groups are packed onto nodes, the hottest expert per slot is
replicated within its node, and the physical experts are packed onto the node's ranks. Nothing here
looks at which experts a token uses together.

Shape letters: L MoE layers, E experts, R ranks, N nodes, S slots per rank, G routing groups, I
items, P packs, J physical experts of a node.
"""

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.solvers.placement import Placement, Topology, part_sizes
from semmoe.solvers.slots import Slots


def place_contiguous(num_layers: int, num_experts: int, num_ranks: int) -> np.ndarray:
    """Rank of each expert, int64 [L, E]: consecutive experts in even shares at every layer, the
    first E mod R ranks with one more."""
    return np.tile(np.repeat(np.arange(num_ranks), part_sizes(num_experts, num_ranks)), (num_layers, 1))


def place_load(load_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rank of every expert, int32 [L, E], in even shares (`part_sizes`).

    `load_LE`: activations per layer and expert, any non-negative numbers.
    """
    load_LE = np.asarray(load_LE, np.float64)
    return np.stack([pack(load_E, num_ranks)[0] for load_E in load_LE]).astype(np.int32)


def place_load_on_nodes(load_LE: np.ndarray, topology: Topology, num_groups: int) -> np.ndarray:
    """Rank of every expert, int [L, E]: as `place_load`, on several nodes with the routing groups
    packed onto nodes first, where they divide over them."""
    num_ranks, num_experts = topology.num_ranks, load_LE.shape[1]
    if topology.num_nodes == 1 or num_experts % num_ranks:
        return place_load(load_LE, num_ranks)
    options = {"num_groups": num_groups, "num_nodes": topology.num_nodes, "num_ranks": num_ranks}
    experts_LRS = place_load_replicated(load_LE, num_experts, **options)
    return Placement(experts_LRS, num_experts).rank_of_LE


def baselines(
    load_LE: np.ndarray, topology: Topology, num_groups: int = 1, *, slots: Slots | None = None
) -> dict[str, Placement]:
    """What engines do without us, by name: "contiguous" experts, and packing by "load".

    Copies are those of the hottest experts per copy (`replicate`). By load they are packed with all
    others; beside contiguous experts they go, hottest first, to the rank that carries least and has
    room.

    Parameters:
        load_LE: activations of the fitted requests, [L, E].
        topology: ranks and nodes.
        num_groups: routing groups of the model, which packing puts onto nodes first.
        slots: what a placement has that is compared with them; None: ceil(E / R) a rank.
    """
    num_layers, num_experts = load_LE.shape
    num_ranks = topology.num_ranks
    slots = slots or Slots.least(num_experts, num_ranks)
    in_order_LE = place_contiguous(num_layers, num_experts, num_ranks)
    if not slots.has_spare(num_experts, num_ranks):
        by_load_LE = place_load_on_nodes(load_LE, topology, num_groups)
        ranks = {"contiguous": in_order_LE, "load": by_load_LE}
        return {name: Placement.from_ranks(rank_of_LE, num_ranks) for name, rank_of_LE in ranks.items()}
    options = {"num_groups": num_groups, "num_nodes": topology.num_nodes, "num_ranks": num_ranks}
    packed_LRS = place_load_replicated(load_LE, slots.per_rank * num_ranks, **options)
    filled_LRS = np.stack(
        [_filled_RS(r_E, load_E, slots, num_ranks) for r_E, load_E in zip(in_order_LE, load_LE, strict=True)]
    )
    return {"contiguous": Placement(filled_LRS, num_experts), "load": Placement(packed_LRS, num_experts)}


def _filled_RS(rank_of_E: np.ndarray, load_E: np.ndarray, slots: Slots, num_ranks: int) -> np.ndarray:
    """Experts of each rank and the copies that fill its slots, int32 [R, S]."""
    held_RS = [np.flatnonzero(rank_of_E == rank).tolist() for rank in range(num_ranks)]
    expert_J, copies_E = replicate(load_E, slots.per_rank * num_ranks, num_ranks)
    share_E = load_E / copies_E
    carried_R = np.bincount(rank_of_E, share_E, num_ranks)
    copies = expert_J[len(load_E) :]
    for expert in copies[np.argsort(-share_E[copies], kind="stable")].tolist():
        open_R = np.array([len(held) < slots.per_rank and expert not in held for held in held_RS])
        # Where every rank with room holds the expert already, the next hottest takes the slot.
        rank = int(np.argmin(np.where(open_R, carried_R, np.inf)))
        if not open_R.any():
            rank = next(r for r, held in enumerate(held_RS) if len(held) < slots.per_rank)
            expert = int(np.argmax(np.where(np.isin(np.arange(len(load_E)), held_RS[rank]), -1.0, share_E)))
        held_RS[rank].append(expert)
        carried_R[rank] += share_E[expert]
    return np.array(held_RS, np.int32)


def place_load_replicated(
    load_LE: np.ndarray, num_slots: int, *, num_groups: int, num_nodes: int, num_ranks: int
) -> np.ndarray:
    """Experts of every rank in slot order, the hottest of them several times.

    Parameters:
        load_LE: activations, [L, E], any non-negative numbers.
        num_slots: slots of all ranks together, R * S.
        num_groups: routing groups of consecutive experts. They stay on a node where their number
            divides over the nodes; otherwise all ranks count as one node and one group.
        num_nodes, num_ranks: N, R.

    Returns:
        int32 [L, R, S], no expert twice on one rank.

    Raises InputError where slots do not divide over the ranks, or cannot hold every expert without
    repeating one on a rank.
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
    placed = [_place_layer(load_E, num_slots, num_groups, num_nodes, num_ranks) for load_E in load_LE]
    return np.stack(placed).astype(np.int32).reshape(num_layers, num_ranks, num_slots // num_ranks)


def _place_layer(load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> np.ndarray:
    """Experts by slot of one layer, int64 [R * S], node by node."""
    # Step 1: pack groups onto nodes.
    group_size = len(load_E) // num_groups
    node_G, position_G = pack(load_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    start_G = (node_G * (num_groups // num_nodes) + position_G) * group_size
    order_E = np.empty(len(load_E), np.int64)
    order_E[(start_G[:, None] + np.arange(group_size)).ravel()] = np.arange(len(load_E))
    ranks_per_node, slots_per_node = num_ranks // num_nodes, num_slots // num_nodes
    placed = []
    for experts in order_E.reshape(num_nodes, -1):
        # Step 2: replicate the node's hottest experts.
        item_J, copies_I = replicate(load_E[experts], slots_per_node, ranks_per_node)
        # Step 3: pack all copies onto its ranks.
        rank_J, position_J = pack((load_E[experts] / copies_I)[item_J], ranks_per_node, item_J)
        slots_J = np.empty(slots_per_node, np.int64)
        slots_J[rank_J * (slots_per_node // ranks_per_node) + position_J] = experts[item_J]
        placed.append(slots_J)
    return np.concatenate(placed)


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


def pack(weight_I: np.ndarray, num_packs: int, label_I: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Items in packs of even counts (`part_sizes`): heaviest first, each to the lightest pack.

    Parameters:
        weight_I: float [I].
        num_packs: P.
        label_I: items of equal label go to different packs (there are at most P of each).

    Returns:
        Pack of every item and its position in it, int64 [I] each.
    """
    num_items = len(weight_I)
    room_P = part_sizes(num_items, num_packs)
    if label_I is None and num_items <= num_packs:
        return np.arange(num_items), np.zeros(num_items, np.int64)
    pack_I, position_I = np.empty(num_items, np.int64), np.empty(num_items, np.int64)
    weight_P, count_P = np.zeros(num_packs), np.zeros(num_packs, np.int64)
    items_P: list[list[int]] = [[] for _ in range(num_packs)]

    def put(item: int, chosen: int, position: int) -> None:
        pack_I[item], position_I[item] = chosen, position
        items_P[chosen].append(item)
        weight_P[chosen] += weight_I[item]

    for item in np.argsort(-weight_I, kind="stable").tolist():
        open_P = count_P < room_P
        clear_P = open_P
        if label_I is not None:
            holds_P = np.array([any(label_I[i] == label_I[item] for i in items) for items in items_P])
            clear_P = open_P & ~holds_P
        if clear_P.any():
            filled = int(np.argmin(np.where(clear_P, weight_P, np.inf)))
            put(item, filled, count_P[filled])
        else:  # an item of a full pack makes room
            filled = int(np.flatnonzero(open_P)[0])
            chosen, other = _make_room(item, filled, items_P, weight_I, np.asarray(label_I))
            items_P[chosen].remove(other)
            weight_P[chosen] -= weight_I[other]
            position = int(position_I[other])
            put(other, filled, count_P[filled])
            put(item, chosen, position)
        count_P[filled] += 1
    return pack_I, position_I


def _make_room(
    item: int, target: int, items_P: list[list[int]], weight_I: np.ndarray, label_I: np.ndarray
) -> tuple[int, int]:
    """A full pack without the item's label, and its item nearest in weight that the open pack
    `target` can take."""
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
