"""The replica rule: a static choice of the copy that serves."""

import numpy as np

from semmoe.solvers.place.replicas import served_load_R, serving_LRE
from semmoe.solvers.placement import Topology


def test_own_rank_then_own_node_then_least_loaded() -> None:
    # Expert 0 on ranks 0 and 2, expert 1 on rank 1 only, expert 2 on ranks 1 and 3; nodes are ranks
    # 0-1 and 2-3.
    hosts_LER = np.zeros((1, 3, 4), bool)
    hosts_LER[0, 0, [0, 2]] = hosts_LER[0, 1, 1] = hosts_LER[0, 2, [1, 3]] = True
    serving = serving_LRE(hosts_LER, np.array([[8, 100, 4]]), Topology(4, 2))[0]
    assert serving[:, 0].tolist() == [0, 0, 2, 2]
    assert serving[:, 1].tolist() == [1, 1, 1, 1]
    assert serving[:, 2].tolist() == [1, 1, 3, 3]
    one_node = serving_LRE(hosts_LER, np.array([[8, 100, 4]]), Topology(4, 1))[0]
    assert one_node[0, 2] == 3 and one_node[2, 2] == 3  # rank 1 carries expert 1 already


def test_who_is_chosen_first_leaves_room_for_others() -> None:
    # Expert 0 on ranks 0 and 1, expert 1 on ranks 1 and 2, expert 2 on rank 3 alone. Were the load
    # of expert 1 unknown while expert 0 is shared out, rank 1 would get half of it.
    hosts_ER = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]], bool)
    load_E = np.array([80, 72, 40, 8])
    load_R = served_load_R(serving_LRE(hosts_ER[None], load_E[None], Topology(4))[0], load_E)
    assert load_R.max() <= 60


def test_served_load_counts_equal_shares() -> None:
    # Expert 0 (load 9) is served by rank 0 for all, expert 1 (load 6) by each rank for itself.
    assert served_load_R(np.array([[0, 0], [0, 1], [0, 2]]), np.array([9, 6])).tolist() == [11, 2, 2]
