"""Rows that tokens send from every rank that they may live on, where copies make it matter where
they do: the expectation over random homes without a pass per rank.

A choice reaches one rank whatever the home where its expert has no copy. Of an expert with copies
each host serves a set of homes, so a token reaches a rank from the union of the sets of those of
its choices that the rank serves. Nearly all unions are one set, which is counted by number; only
the others are made.

Shape letters: T tokens, K top-k, E experts, R ranks, P targets of rows (ranks, or nodes), G groups,
X sets of homes (one for every target of every expert with copies).
"""

from typing import NamedTuple

import numpy as np

from semmoe.solvers.evaluate.reached import reached_of

MAX_CELLS = 2**24  # of tokens by targets at once


class HomeRows(NamedTuple):
    """Rows of each group of tokens, int64; a token is counted once for every rank that it may live
    on."""

    received_GP: np.ndarray  # by each target, from other targets
    sent_GR: np.ndarray  # from each home, to other targets


def rows_of_homes(
    ids_TK: np.ndarray, group_T: np.ndarray, num_groups: int, serving_RE: np.ndarray, target_of_R: np.ndarray
) -> HomeRows:
    """Rows to distinct targets other than the home's own, for every home.

    Parameters:
        ids_TK: chosen experts, integers [T, K]; E for an empty slot.
        group_T: group of each token, int [T] below `num_groups`.
        num_groups: G.
        serving_RE: rank that serves expert e for a token that lives on rank r, integers [R, E].
        target_of_R: target that each rank is part of: itself, or its node; int [R].
    """
    num_ranks, num_targets = len(serving_RE), int(target_of_R.max()) + 1
    sets = _HomeSets.of(serving_RE, target_of_R)
    received_GP = np.zeros((num_groups, num_targets), np.int64)
    sent_GR = np.zeros((num_groups, num_ranks), np.int64)
    away_PR = target_of_R != np.arange(num_targets)[:, None]
    size = max(1, MAX_CELLS // num_targets)
    for start in range(0, len(ids_TK), size):
        ids, group = ids_TK[start : start + size].astype(np.intp), group_T[start : start + size]
        # Step 1: targets that the token reaches wherever it lives; one more for what is none.
        target_TK = sets.always_E[ids]
        always_TP = np.zeros((len(ids), num_targets + 1), bool)
        always_TP[np.arange(len(ids))[:, None], target_TK] = True
        target_KT, first_KT = reached_of(target_TK, num_targets)
        keys_KT = np.where(first_KT, group * num_targets + target_KT, num_groups * num_targets)
        count_GP = np.bincount(keys_KT.reshape(-1), minlength=num_groups * num_targets + 1)[:-1]
        count_GP = count_GP.reshape(num_groups, num_targets)
        received_GP += count_GP * away_PR.sum(axis=1)
        sent_GR += count_GP @ away_PR.astype(np.int64)
        # Step 2: sets of homes that reach another target, one set alone or several together.
        token, chosen = np.nonzero(sets.number_E[ids] > 0)
        expert = ids[token, chosen]
        number = sets.number_E[expert]
        token, first = np.repeat(token, number), np.repeat(sets.first_E[expert], number)
        member = first + np.arange(len(token)) - np.repeat(np.cumsum(number) - number, number)
        partly = ~always_TP[token, sets.target_X[member]]
        token, member = token[partly], member[partly]
        key = token * num_targets + sets.target_X[member]
        order = np.argsort(key, kind="stable")
        key, member = key[order], member[order]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else np.zeros(0, np.int64)
        alone = np.diff(np.append(starts, len(key))) == 1
        _add_sets(sets, group, key[starts[alone]] // num_targets, member[starts[alone]], received_GP, sent_GR)
        if not alone.all():
            together = ~np.repeat(alone, np.diff(np.append(starts, len(key))))
            key, member = key[together], member[together]
            starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
            homes_XR = np.logical_or.reduceat(sets.homes_XR[member], starts, axis=0)
            token, target = np.divmod(key[starts], num_targets)
            keys = group[token] * num_targets + target
            found = np.bincount(keys, homes_XR.sum(axis=1), num_groups * num_targets)
            received_GP += found.reshape(num_groups, num_targets).astype(np.int64)
            order = np.argsort(group[token], kind="stable")
            groups, starts = np.unique(group[token][order], return_index=True)
            sent_GR[groups] += np.add.reduceat(homes_XR[order], starts, axis=0, dtype=np.int64)
    return HomeRows(received_GP, sent_GR)


class _HomeSets(NamedTuple):
    """Where experts are served: one target for every home, or sets of homes of several."""

    always_E: np.ndarray  # int64 [E + 1]: the one target; P for none
    first_E: np.ndarray  # int64 [E + 1]: the first set of each expert, and how many it has
    number_E: np.ndarray
    target_X: np.ndarray  # int64
    homes_XR: np.ndarray  # bool: ranks outside the target that it serves

    @classmethod
    def of(cls, serving_RE: np.ndarray, target_of_R: np.ndarray) -> "_HomeSets":
        served_RE = target_of_R[serving_RE]
        num_targets, alike_E = int(target_of_R.max()) + 1, (served_RE == served_RE[0]).all(axis=0)
        copied = np.flatnonzero(~alike_E)
        is_served_EP = np.zeros((len(copied), num_targets), bool)
        is_served_EP[np.arange(len(copied)), served_RE[:, copied]] = True
        row, target_X = np.nonzero(is_served_EP)
        number_E = np.zeros(len(alike_E) + 1, np.int64)
        number_E[copied] = is_served_EP.sum(axis=1)
        always_E = np.append(np.where(alike_E, served_RE[0], num_targets), num_targets)
        homes_XR = (served_RE[:, copied[row]] == target_X).T & (target_of_R != target_X[:, None])
        return cls(always_E, np.cumsum(number_E) - number_E, number_E, target_X, homes_XR)


def _add_sets(
    sets: _HomeSets,
    group_T: np.ndarray,
    token: np.ndarray,
    member: np.ndarray,
    received_GP: np.ndarray,
    sent_GR: np.ndarray,
) -> None:
    """Add targets that a token reaches from one set of homes each."""
    num_sets, num_groups = len(sets.target_X), len(received_GP)
    count_GX = np.bincount(group_T[token] * num_sets + member, minlength=num_groups * num_sets)
    count_GX = count_GX.reshape(num_groups, num_sets)
    np.add.at(received_GP.T, sets.target_X, (count_GX * sets.homes_XR.sum(axis=1)).T)
    sent_GR += count_GX @ sets.homes_XR.astype(np.int64)
