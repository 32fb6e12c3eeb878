"""From what an engine recorded to what a trace holds: which layers route, how many columns count,
what to leave out.

Engines record every layer of the model; a dense layer is a row of zeros (or of -1) and is dropped
by its number, never counted as expert 0. A fused shared expert is a last column of ids at or above
E, or of one id: it is left out. The ids of a row are distinct, so with top-k > 1 one row
that repeats an id tells a dense layer; with top-1 only a whole file of zeros does. Rows in which
every layer says the same are warm-up dummies: no prompt ran.

Shape letters: T rows, L layers (of the record, or kept), K top-k, E experts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from semmoe.profiles.engines.records import EngineRequest
from semmoe.profiles.errors import InputError

MOST_EXPERTS = 4096  # a larger id is a damaged record: no model of today has as many
LEAST_REQUESTS = 5  # with the same id in a column, all of them: fewer may be chance
CHANCE = 1e-9  # a row that is the same in every layer is a dummy where luck makes fewer of them than this


@dataclass(frozen=True, eq=False)
class Layout:
    """How to read the records of one import."""

    num_rows: int  # layers in a record
    width: int  # columns in a record
    kept_L: np.ndarray  # int64, the rows that route
    dense_L: np.ndarray  # int64, the others
    model_layers: tuple[int, ...]  # number of each kept row in the model
    num_model_layers: int
    top_k: int
    num_experts: int
    empty_slots: bool  # -1 and ids past num_experts mean no routed expert
    layer_ids: tuple[int, ...] | None  # as the records state them
    shared_K: np.ndarray  # int64: the one id in each column past top_k, of a fused shared expert; -1 = none

    @property
    def repeats_are_dummies(self) -> bool:
        """Whether a row that is the same in every layer cannot be luck."""
        return math.comb(self.num_experts, self.top_k) ** (self.num_kept - 1) > 1 / CHANCE

    @property
    def num_kept(self) -> int:
        return len(self.kept_L)


@dataclass(frozen=True, eq=False)
class Survey:
    """What a first look over the records found."""

    num_requests: int
    num_rows: int
    width: int
    routes_L: np.ndarray  # bool: some row of this layer is more than zeros or padding
    used_K: np.ndarray  # bool: some row of a layer that routes has an id in this column
    empty_LK: np.ndarray  # bool: some row that is not blank all over has none there
    lowest_K: np.ndarray  # int64: least and largest id of a column, over rows of layers that route
    largest_K: np.ndarray
    num_experts: int
    layer_ids: tuple[int, ...] | None
    model: str


def survey_requests(requests: Iterable[EngineRequest]) -> Survey:
    """One pass over the records; keeps nothing of a request but a few flags."""
    first: EngineRequest | None = None
    count, largest, num_experts, model = 0, -1, 0, ""
    routes_L = used_K = empty_LK = np.zeros(0, bool)
    lowest_K = largest_K = np.zeros(0, np.int64)
    for request in requests:
        ids = request.expert_ids_TLK
        if first is None:
            first = request
            routes_L, used_K = np.zeros(ids.shape[1], bool), np.zeros(ids.shape[2], bool)
            empty_LK = np.zeros(ids.shape[1:], bool)
            lowest_K, largest_K = np.full(ids.shape[2], MOST_EXPERTS), np.full(ids.shape[2], -1)
        _check_shape(request, first.expert_ids_TLK.shape[1], first.expert_ids_TLK.shape[2], first.layer_ids)
        count += 1
        num_experts, model = max(num_experts, request.num_experts), model or request.model
        if not ids.size:
            continue
        largest = max(largest, int(ids.max()))
        if largest >= MOST_EXPERTS:
            t, layer, _ = np.argwhere(ids == largest)[0]
            raise InputError(
                f"{request.where}, row {t}, layer {layer}: expert id {largest}, expected less than {MOST_EXPERTS}"
            )
        routes_TL = ids[:, :, 0] != ids[:, :, 1] if ids.shape[2] > 1 else ids[:, :, 0] > 0
        routes_L |= routes_TL.any(axis=0)
        if routes_TL.any():
            lowest_K = np.minimum(lowest_K, ids[routes_TL].min(axis=0))
            largest_K = np.maximum(largest_K, ids[routes_TL].max(axis=0))
        if ids.min() < 0:
            used_K |= (ids[routes_TL] >= 0).any(axis=0)
            empty_LK |= (ids[(ids >= 0).any(axis=(1, 2))] < 0).any(axis=0)
        else:
            used_K[:] = True
    if first is None:
        raise InputError("the files hold no request")
    _, num_rows, width = first.expert_ids_TLK.shape
    return Survey(
        count, num_rows, width, routes_L, used_K, empty_LK, lowest_K, largest_K, num_experts, first.layer_ids, model
    )  # fmt: skip


def _check_shape(request: EngineRequest, num_rows: int, width: int, layer_ids: tuple[int, ...] | None) -> None:
    if request.layer_ids != layer_ids:
        raise InputError(
            f"{request.where}: layers {_ranges(request.layer_ids)}, the records before it hold {_ranges(layer_ids)}: "
            "steps that are cut off, or ranks of a pipeline, cannot be joined"
        )
    shape = request.expert_ids_TLK.shape
    if shape[1:] != (num_rows, width):
        raise InputError(
            f"{request.where}: {shape[1]} layers x {shape[2]} ids, the records before it have {num_rows} x {width}"
        )


def _ranges(layers: tuple[int, ...] | None) -> str:
    return f"{min(layers)}..{max(layers)}" if layers else "unnamed"


def parse_layers(text: str) -> set[int]:
    """Layer numbers of `0,1` or `0-2,5`. Raises InputError for anything else."""
    layers: set[int] = set()
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        if (
            not first.isdecimal()
            or (last and not last.isdecimal())
            or (_ and not last)
            or int(last or first) < int(first)
        ):
            raise InputError(f"dense layers {text!r}: {piece.strip()!r} is neither a layer (3) nor a range (0-2)")
        layers.update(range(int(first), int(last or first) + 1))
    return layers


class Rows(NamedTuple):
    """Which rows of a record route, and what the layers are called in the model."""

    kept_L: np.ndarray
    model_layers: tuple[int, ...]
    num_model_layers: int


def find_rows(
    num_rows: int,
    layer_ids: tuple[int, ...] | None,
    routes_L: np.ndarray,
    facts: dict[str, Any] | None,
    dense: set[int] | None,
) -> Rows:
    """The rows that route: by `dense` (model layer numbers) if given, else by `facts`, else
    those that were seen to."""
    names = np.array(layer_ids if layer_ids is not None else range(num_rows))
    num_model_layers = num_rows if layer_ids is None else 0
    routed: tuple[int, ...] = ()
    if facts is not None:
        routed, num_model_layers = facts["model_layers"], facts["num_model_layers"]
        if layer_ids is None and num_rows == len(routed) != num_model_layers:
            names = np.array(routed)  # an engine that records its MoE layers only
        elif layer_ids is not None and set(layer_ids) == {layer + 1 for layer in routed}:
            names = names - 1  # counted from 1
        elif layer_ids is None and num_rows != num_model_layers:
            raise InputError(
                f"the records hold {num_rows} layers, the model has {num_model_layers}, of which {len(routed)} route"
            )
    if dense is not None:
        if unknown := sorted(dense - set(names.tolist())):
            raise InputError(
                f"dense layer {unknown[0]} is not in the records: they hold layers {names[0]}..{names[-1]}"
            )
        kept_L = np.flatnonzero(~np.isin(names, sorted(dense)))
    elif facts is not None:
        if missing := sorted(set(routed) - set(names.tolist())):
            raise InputError(f"layer {missing[0]} routes in the model, the records lack it: they hold {names.tolist()}")
        kept_L = np.flatnonzero(np.isin(names, routed))
    else:
        kept_L = np.flatnonzero(routes_L)
    if not kept_L.size:
        raise InputError(
            f"none of the {num_rows} layers in the records routes: all are zeros, padding or named as dense"
        )
    return Rows(kept_L, tuple(names[kept_L].tolist()), num_model_layers)


def plausible_num_experts(largest: int) -> int:
    """The number of experts where nothing but the ids tells it: the next of 2, 4, 60 and the
    multiples of 8."""
    seen = largest + 1
    if seen <= 4:
        return 2 if seen <= 2 else 4
    return 60 if 56 < seen <= 60 else -(-seen // 8) * 8


def find_layout(survey: Survey, facts: dict[str, Any] | None, dense: set[int] | None) -> Layout:
    """The layout of the surveyed records. With `facts` of the model, the survey may be of one
    record."""
    rows = find_rows(survey.num_rows, survey.layer_ids, survey.routes_L, facts, dense)
    if facts is not None:
        top_k, num_experts, empty = facts["top_k"], facts["num_experts"], facts["empty_slots"]
        if top_k > survey.width:
            raise InputError(f"the records are {survey.width} ids wide, the model routes to {top_k}: ids are lost")
    else:
        used = np.flatnonzero(survey.used_K)
        top_k = int(used[-1]) + 1 if used.size else survey.width
        constant_K = (survey.lowest_K == survey.largest_K) & (survey.largest_K == survey.largest_K.max())
        while top_k > 1 and constant_K[top_k - 1] and not constant_K[0] and survey.num_requests >= LEAST_REQUESTS:
            top_k -= 1
        num_experts = survey.num_experts or plausible_num_experts(int(survey.largest_K[:top_k].max()))
        empty = bool(survey.empty_LK[rows.kept_L, :top_k].any())
    return Layout(
        num_rows=survey.num_rows,
        width=survey.width,
        kept_L=rows.kept_L,
        dense_L=np.setdiff1d(np.arange(survey.num_rows), rows.kept_L),
        model_layers=rows.model_layers,
        num_model_layers=rows.num_model_layers,
        top_k=top_k,
        num_experts=num_experts,
        empty_slots=empty,
        layer_ids=survey.layer_ids,
        shared_K=np.where(survey.lowest_K == survey.largest_K, survey.largest_K, -1)[top_k:],
    )


def kept_runs(request: EngineRequest, layout: Layout, dtype: np.dtype) -> tuple[list[tuple[int, np.ndarray]], int]:
    """Runs of rows to keep, as (first row, ids of `dtype` [T, L, K]), and how many dummy rows were
    left out.

    One run, unless dummy rows lie inside. Raises InputError that names the row, layer and value of
    an id that cannot be.
    """
    _check_shape(request, layout.num_rows, layout.width, layout.layer_ids)
    ids = request.expert_ids_TLK
    if layout.dense_L.size:
        _check_dense(request, layout)
        ids = ids[:, layout.kept_L]
    dummy_T = _dummy_rows(ids, layout)
    past_TLK = ids[:, :, layout.top_k :]
    past_TLK = (past_TLK >= 0) & (past_TLK < layout.num_experts) & (past_TLK != layout.shared_K)
    past_TLK[dummy_T] = False
    if past_TLK.any():
        t, layer, column = np.argwhere(past_TLK)[0]
        value = ids[t, layer, layout.top_k + column]
        raise InputError(
            f"{_place(request, layout, t, layer)}: expert {value} past the top-{layout.top_k} of the model"
        )
    ids = ids[:, :, : layout.top_k]
    num_dummies = int(np.count_nonzero(dummy_T))
    runs = []
    for start, stop in _false_runs(dummy_T) if num_dummies else [(0, len(ids))]:
        if stop > start:
            runs.append((start, _checked(request, layout, start, ids[start:stop]).astype(dtype)))
    return runs, num_dummies


def _place(request: EngineRequest, layout: Layout, row: int, kept: int) -> str:
    return f"{request.where}, row {row}, layer {layout.model_layers[kept]}"


def _check_dense(request: EngineRequest, layout: Layout) -> None:
    ids = request.expert_ids_TLK[:, layout.dense_L]
    wrong = np.argwhere((ids > 0) | (ids < -1))
    if wrong.size:
        t, layer, column = wrong[0]
        number = layout.layer_ids[layout.dense_L[layer]] if layout.layer_ids else int(layout.dense_L[layer])
        raise InputError(
            f"{request.where}, row {t}: layer {number} is taken as dense but routes to expert {ids[t, layer, column]}"
        )


def _dummy_rows(ids_TLK: np.ndarray, layout: Layout) -> np.ndarray:
    """bool [T]: rows that no prompt made, the same in every layer."""
    dummy_T = np.zeros(len(ids_TLK), bool)
    other = min(1, layout.num_kept - 1)
    for t in np.flatnonzero((ids_TLK[:, 0] == ids_TLK[:, other]).all(axis=1)):
        row_LK = ids_TLK[t]
        if (row_LK == row_LK[0]).all():
            blank = (row_LK[0] < 0).all() or (layout.top_k > 1 and not row_LK[0].any())
            dummy_T[t] = blank or layout.repeats_are_dummies
    return dummy_T


def _false_runs(flag_T: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[1], flag_T.astype(np.int8), [1]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _checked(request: EngineRequest, layout: Layout, start: int, ids_TLK: np.ndarray) -> np.ndarray:
    """The ids with `num_experts` for every slot without a routed expert; or InputError."""
    num_experts = layout.num_experts

    def refuse(wrong_TLK: np.ndarray, problem: str) -> InputError:
        t, layer, column = np.argwhere(wrong_TLK)[0]
        return InputError(f"{_place(request, layout, start + t, layer)}: {problem.format(ids_TLK[t, layer, column])}")

    smallest, largest = int(ids_TLK.min()), int(ids_TLK.max())
    if smallest < -1:
        raise refuse(ids_TLK < -1, "expert id {}")
    if smallest < 0 and not layout.empty_slots:
        raise refuse(ids_TLK < 0, "no expert ({}), in a model whose every slot has one")
    if largest >= num_experts and not layout.empty_slots:
        raise refuse(ids_TLK >= num_experts, f"expert {{}} is outside 0..{num_experts - 1}")
    if layout.empty_slots:
        # Some engines write 0 for a zero expert: of several, one may be expert 0.
        again_TLK = (ids_TLK == 0) & (np.cumsum(ids_TLK == 0, axis=2) > 1)
        ids_TLK = np.where((ids_TLK < 0) | (ids_TLK >= num_experts) | again_TLK, num_experts, ids_TLK)
    if layout.top_k > 1:
        sorted_TLK = np.sort(ids_TLK.astype(np.uint8 if num_experts < 256 else np.uint16), axis=2)
        repeated = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]) & (sorted_TLK[:, :, 1:] < num_experts)
        if repeated.any():
            t, layer, column = np.argwhere(repeated)[0]
            raise InputError(
                f"{_place(request, layout, start + t, layer)}: expert {sorted_TLK[t, layer, column]} twice in one row; "
                "a dense layer is to be named with --dense-layers"
            )
    return ids_TLK
