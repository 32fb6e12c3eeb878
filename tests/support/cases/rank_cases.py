"""What the ranks of a runtime test do: real processes with gloo, each with a tiny model of its
own, compared with Transformers alone."""

from collections import deque
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from random_plans import random_plan

from semmoe.solvers.placement import Placement
from semmoe.solvers.plan import Plan

TIMEOUT_S = 300.0


def with_replicas(plan: Plan, replicas: int) -> Plan:
    """The plan with the first `replicas` experts that a rank lacks added to each rank."""
    experts_LRS, num_experts = plan.placement.experts_LRS, plan.placement.num_experts
    rows = [
        [[*own, *np.setdiff1d(np.arange(num_experts), own)[:replicas]] for own in experts_RS]
        for experts_RS in experts_LRS.tolist()
    ]
    return replace(plan, placement=Placement(np.array(rows, np.int32), num_experts))


def open_case(folder: Path, size: int, replicas: int, group: Any, dtype: str = "float32") -> Any:
    """The placed model of `folder` under a random placement that ignores router groups."""
    from semmoe.profiles.capture.loading import find_model
    from semmoe.runtime.transformers.placed_model import load_placed
    from semmoe.runtime.transformers.rank_parts import rank_checkpoints

    plan = random_plan(folder, ranks=size, grouped=False, seed=size)
    if replicas:
        plan = with_replicas(plan, replicas)
    checkpoint = rank_checkpoints(folder, plan)[group.rank]
    return load_placed(find_model(str(folder)), folder, checkpoint, plan, group, dtype=dtype)


def run_cases(
    root: str,
    families: list[str],
    generating: list[str],
    shuffled: list[str],
    refused: list[str],
    other_shapes: list[tuple[str, str]],
    size: int,
    replicas: int,
    lengths: list[int],
) -> dict[str, Any]:
    """All cases of a number of ranks in one group: starting processes takes longer than running
    them."""
    import torch

    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=TIMEOUT_S) as group, torch.inference_mode():
        return {
            "exchange": compare_exchange(group),
            "logits": {family: compare_logits(Path(root) / family, size, replicas, group) for family in families},
            "tokens": {family: generate(Path(root) / family, size, lengths, group) for family in generating},
            "tp": {family: generate_shuffled(Path(root) / family, size, lengths, group) for family in shuffled},
            "refused": {family: refusal(Path(root) / family, size, group) for family in refused},
            "other": {case: shuffled_refusal(Path(root), size, *case, group) for case in other_shapes},
        }


def refusal(folder: Path, size: int, group: Any) -> str:
    """Why the family does not run, "" where it does."""
    from semmoe.profiles.errors import InputError

    try:
        open_case(folder, size, 0, group)
    except InputError as error:
        return str(error)
    return ""


def shuffled_refusal(root: Path, size: int, family: str, dtype: str, group: Any) -> str:
    """Why the family does not run with Attention-TP in a number type, "" where it does."""
    from semmoe.profiles.errors import InputError
    from semmoe.runtime.serving.tensor_parallel import install_tensor_parallel
    from semmoe.runtime.serving.token_homes import make_homes

    plan = random_plan(root / family, ranks=size, grouped=False, seed=size)
    placed = open_case(root / family, size, 0, group, dtype)
    try:
        homes = make_homes("none", plan, relabelled=False, device=group.device)
        install_tensor_parallel(placed, homes, plan.model.model_layers, family)
    except InputError as error:
        return str(error)
    return ""


def compare_exchange(group: Any) -> dict[str, float]:
    """Largest difference of the exchange to dense arithmetic on any rank. Expert e multiplies by
    its own matrix; 2 slots per rank."""
    import torch
    import torch.distributed as dist

    from semmoe.runtime.layer.dispatch import join_empty, serve_tokens
    from semmoe.runtime.layer.tables import ExpertLayer, LayerTables, RankState

    num_experts, hidden, top_k = 2 * group.size, 16, 2
    weight_EDD = torch.randn(num_experts, hidden, hidden, generator=torch.Generator().manual_seed(0))
    expert_E = torch.arange(num_experts)
    # Experts are dealt out in turn, so that no rank's experts are neighbours.
    tables = LayerTables(0, "layer 0", expert_E % group.size, expert_E // group.size, 2)
    layer = ExpertLayer(tables, group, RankState.fresh(1, group), hidden, torch.float32, top_k)
    own_SDD = weight_EDD[group.rank :: group.size]

    def run_experts(rows_PD: Any, slot_P1: Any, weight_P1: Any) -> Any:
        return torch.einsum("pd,pdf->pf", rows_PD, own_SDD[slot_P1[:, 0]]) * weight_P1

    random = torch.Generator().manual_seed(group.rank)
    last = group.size - 1
    cases = {
        "random": torch.rand(33, num_experts, generator=random).argsort(1)[:, :top_k],
        "one token": torch.rand(1, num_experts, generator=random).argsort(1)[:, :top_k],
        "all to one rank": torch.tensor([[last, last + group.size]]).repeat(17, 1),
        "all stay": torch.tensor([[group.rank, group.rank + group.size]]).repeat(5 + group.rank, 1),
        "only rank 0 has tokens": torch.rand(9 if group.rank == 0 else 0, num_experts, generator=random).argsort(1)[
            :, :top_k
        ],
    }
    found = {}
    for name, ids_TK in cases.items():
        hidden_TD = torch.randn(len(ids_TK), hidden, generator=random)
        weight_TK = torch.rand(len(ids_TK), top_k, generator=random)
        expected_TD = torch.einsum("td,tkdf,tk->tf", hidden_TD, weight_EDD[ids_TK], weight_TK)
        got_TD = serve_tokens(layer, run_experts, hidden_TD, ids_TK, weight_TK)
        worst = torch.tensor((got_TD - expected_TD).abs().max() if len(ids_TK) else 0.0)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group.handle)
        found[name] = float(worst)
    join_empty(layer, run_experts)  # nobody has tokens
    return found


def compare_logits(folder: Path, size: int, replicas: int, group: Any) -> list[float]:
    """Largest logit differences to Transformers alone on rank 0: of a batch, of one token, and
    where only rank 0 has tokens.

    The other ranks have batches of other sizes; the last of several has none at all.
    """
    from tiny_models import tiny_input_ids

    from semmoe.profiles.capture.loading import find_model, load_model
    from semmoe.runtime.serving.probe import check_exchange

    placed = open_case(folder, size, replicas, group)
    check_exchange(placed, folder.name)
    batches = [
        tiny_input_ids(folder.name, batch=2 + group.rank, seed=group.rank),
        tiny_input_ids(folder.name, batch=1, length=1, seed=group.rank),
        tiny_input_ids(folder.name, batch=1, length=40, seed=7),
    ]
    reference = load_model(find_model(str(folder)), dtype="float32", device=group.device) if group.rank == 0 else None
    found = []
    for number, ids in enumerate(batches):
        if size > 1 and (group.rank == size - 1 or (number == 2 and group.rank)):
            placed.join_empty()
            continue
        logits = placed.model(input_ids=ids, use_cache=False).logits
        if reference is not None:
            found.append(float((logits - reference(input_ids=ids, use_cache=False).logits).abs().max()))
    return found


def generate_shuffled(folder: Path, size: int, lengths: list[int], group: Any) -> list[Any]:
    """The same with Attention-TP and consecutive slices: where the tokens differ from
    Transformers alone."""
    import torch

    from semmoe.profiles.capture.loading import find_model, load_model
    from semmoe.runtime.serving.batch import Completion, Limits, Prompt
    from semmoe.runtime.serving.check import compare_greedy
    from semmoe.runtime.serving.engine import serve
    from semmoe.runtime.serving.tensor_parallel import install_tensor_parallel
    from semmoe.runtime.serving.token_homes import make_homes

    placed, plan = open_case(folder, size, 1, group), random_plan(folder, ranks=size, grouped=False, seed=size)
    homes = make_homes("none", plan, relabelled=False, device=group.device)
    shuffled = install_tensor_parallel(placed, homes, plan.model.model_layers, folder.name)
    random = np.random.default_rng(4)
    prompts = [Prompt(i, str(i), random.integers(5, 100, n).astype(np.int32)) for i, n in enumerate(lengths)]
    limits = Limits(5, 100, frozenset([3]), max_running=3)
    done: list[Completion] = []
    serve(placed, prompts, limits, deliver=done.extend, shuffled=shuffled)
    if group.rank:
        return []
    model = load_model(find_model(str(folder)), dtype="float32", device=torch.device("cpu"))
    got = {completion.index: completion for completion in done}
    return [
        compare_greedy(model, p, got[p.index].token_ids, max_new_tokens=5, stop_ids=limits.stop_ids).mismatch
        for p in prompts
    ]


def generate(folder: Path, size: int, lengths: list[int], group: Any) -> dict[str, Any]:
    """Greedy continuations of prompts of the given lengths, dealt out in turn, and where they
    differ from Transformers alone."""
    import torch

    from semmoe.profiles.capture.loading import find_model, load_model
    from semmoe.runtime.serving.batch import Completion, Limits, Prompt
    from semmoe.runtime.serving.check import compare_greedy
    from semmoe.runtime.serving.engine import serve

    placed = open_case(folder, size, 1, group)
    random = np.random.default_rng(3)
    prompts = [Prompt(i, str(i), random.integers(5, 100, n).astype(np.int32)) for i, n in enumerate(lengths)]
    limits = Limits(6, 100, frozenset([3]), max_running=3)
    done: list[Completion] = []
    serve(placed, prompts[group.rank :: size], limits, deliver=done.extend)
    if group.rank:
        return {}
    model = load_model(find_model(str(folder)), dtype="float32", device=torch.device("cpu"))
    got = {completion.index: completion for completion in done}
    completions = [got[i] for i in range(len(prompts))]
    return {
        "ranks": [c.rank for c in completions],
        "reasons": [c.finish_reason for c in completions],
        "counts": [len(c.token_ids) for c in completions],
        "mismatches": [
            compare_greedy(model, p, c.token_ids, max_new_tokens=6, stop_ids=limits.stop_ids).mismatch
            for p, c in zip(prompts, completions, strict=True)
        ],
        "tokens": int(placed.state.counters.tokens_L[0]),
    }


def compare_layouts(root: str, families: list[str]) -> dict[str, float]:
    """Logits of `permuted` and `ranks` reshards on this rank against Transformers on the
    original, on rank 0."""
    import torch

    from semmoe.runtime.ranks.group import open_group
    from semmoe.runtime.serving.probe import check_exchange
    from semmoe.runtime.serving.run import find_source
    from semmoe.runtime.transformers.placed_model import load_placed
    from semmoe.runtime.transformers.rank_parts import rank_checkpoints

    found = {}
    with open_group(timeout_s=TIMEOUT_S) as group, torch.inference_mode():
        for family in families:
            ids, expected = logits_of_original(f"{root}/{family}", group)
            for layout, plan_name in (("permuted", f"{family}-plan"), ("ranks", f"{family}-ranks-plan")):
                source, folder = find_source(f"{root}/{family}-{layout}")
                plan = Plan.load(f"{root}/{plan_name}")
                checkpoint = rank_checkpoints(folder, plan)[group.rank]
                assert checkpoint.layout == layout
                placed = load_placed(source, folder, checkpoint, plan, group, dtype="float32")
                check_exchange(placed, family)
                model = placed.model
                found[f"{family}-{layout}"] = float(
                    (model(input_ids=ids, use_cache=False).logits - expected).abs().max()
                )
    return found


def logits_of_original(folder: str, group: Any) -> tuple[Any, Any]:
    """Token ids of this rank, and the logits of Transformers for them."""
    from tiny_models import tiny_input_ids

    from semmoe.profiles.capture.loading import find_model, load_model

    model = load_model(find_model(folder), dtype="float32", device=group.device)
    ids = tiny_input_ids(Path(folder).name, seed=group.rank)
    return ids, model(input_ids=ids, use_cache=False).logits


def compare_moved(root: str, families: dict[str, list[str]]) -> dict[str, float]:
    """Logits after a re-placement of what runs, from a plain checkpoint and both layouts of a
    reshard, against Transformers on rank 0; the probe before a run has passed on what moved."""
    import torch

    from semmoe.runtime.ranks.group import open_group
    from semmoe.runtime.serving.probe import check_exchange
    from semmoe.runtime.serving.replan import LiveReplan, replan_task
    from semmoe.runtime.serving.run import find_source
    from semmoe.runtime.transformers.expert_moves import check_movable
    from semmoe.runtime.transformers.placed_model import load_placed
    from semmoe.runtime.transformers.rank_parts import rank_checkpoints
    from semmoe.solvers.replan.delta import read_step

    found = {}
    with open_group(timeout_s=TIMEOUT_S) as group, torch.inference_mode():
        for family in families:
            ids, expected = logits_of_original(f"{root}/{family}", group)
            plan = Plan.load(f"{root}/{family}-old")
            new, delta = read_step(Path(f"{root}/{family}-new"), plan)
            for layout in families[family]:
                source, folder = find_source(f"{root}/{family}{layout}")
                checkpoint = rank_checkpoints(folder, plan)[group.rank]
                placed = load_placed(source, folder, checkpoint, plan, group, dtype="float32")
                check_movable(placed, family)
                task = replan_task(plan, new, delta, checkpoint, after=0, scheduler="none")
                LiveReplan(task, placed, [], 1, None, lambda line: None).move(deque())
                placed.state.unmoved = None
                check_exchange(placed, family)
                logits = placed.model(input_ids=ids, use_cache=False).logits
                found[f"{family}{layout}"] = float((logits - expected).abs().max())
    return found


def killed_while_experts_move(*arguments: Any) -> Any:
    """Rank 1 of a run is killed with the third expert on its way."""
    import os
    import signal

    from semmoe.runtime.serving.run import run_rank
    from semmoe.runtime.transformers import expert_moves

    wait_for, number = expert_moves.wait_for, count()

    def wait(work: list[Any]) -> None:
        if next(number) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(work)

    expert_moves.wait_for = wait
    return run_rank(*arguments)


def exchange_forever(group: Any, before: Any) -> None:
    """Empty exchanges of a layer named "layer 7"; `before(number)` runs before each."""
    import torch

    from semmoe.runtime.layer.dispatch import join_empty
    from semmoe.runtime.layer.tables import ExpertLayer, LayerTables, RankState

    nobody = torch.zeros(3, dtype=torch.int64)
    tables = LayerTables(0, "layer 7", nobody, nobody, 2)
    layer = ExpertLayer(tables, group, RankState.fresh(1, group), 8, torch.float32, 2)
    for number in range(10_000):
        before(number)
        join_empty(layer, lambda rows_PD, slot_P1, weight_P1: rows_PD)


def kill_itself(rank: int) -> None:
    """Rank `rank` is killed in the middle of a run."""
    import os
    import signal

    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=TIMEOUT_S) as group:
        exchange_forever(
            group, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 5 and group.rank == rank else None
        )


def hang(rank: int, timeout_s: float) -> None:
    """Rank `rank` stops taking part."""
    import time

    from semmoe.runtime.ranks.group import open_group

    with open_group(timeout_s=timeout_s) as group:
        exchange_forever(group, lambda n: time.sleep(60) if n == 5 and group.rank == rank else None)


def refuse_together(rank: int) -> list[str]:
    """What every rank is told where one of them refuses, on rank 0."""
    import torch.distributed as dist

    from semmoe.profiles.errors import InputError
    from semmoe.runtime.ranks.group import open_group, together

    def make() -> int:
        if group.rank == rank:
            raise InputError(f"rank {rank} lacks a file")
        return group.rank

    with open_group(timeout_s=TIMEOUT_S) as group:
        told = ""
        try:
            together(make, group)
        except InputError as error:
            told = str(error)
        found = [""] * group.size
        dist.all_gather_object(found, told, group=group.handle)
        return found


def write_rank_and_wait(folder: str) -> None:
    """Say that the rank is there, then do nothing for long."""
    import os
    import time

    (Path(folder) / os.environ["RANK"]).touch()
    time.sleep(600)


def probe_wrong_orders(root: str, families: list[str], replicas: int) -> dict[tuple[str, str, str], list[str]]:
    """What every rank is told by the probe before a run, by family, number type and what was
    changed: nothing, the table of slots, or the order in which experts are read; on rank 0."""
    import torch.distributed as dist

    from semmoe.profiles.capture.loading import find_model
    from semmoe.profiles.errors import InputError
    from semmoe.runtime.ranks.group import open_group
    from semmoe.runtime.serving.probe import check_exchange
    from semmoe.runtime.transformers.placed_model import load_placed
    from semmoe.runtime.transformers.rank_parts import rank_checkpoints

    told: dict[tuple[str, str, str], list[str]] = {}
    with open_group(timeout_s=TIMEOUT_S) as group:
        for family in families:
            folder = Path(root) / family
            plan = with_replicas(random_plan(folder, ranks=2, grouped=False, seed=2), replicas)
            for dtype in ("float32", "bfloat16"):
                for what in ("right", "tables", "reading"):
                    checkpoint = rank_checkpoints(folder, plan)[group.rank]
                    if what == "reading" and group.rank == 1:
                        tensors = [first_two_swapped(t) if t.layer == 1 else t for t in checkpoint.tensors]
                        checkpoint = replace(checkpoint, tensors=tensors)
                    placed = load_placed(find_model(str(folder)), folder, checkpoint, plan, group, dtype=dtype)
                    if what == "tables":
                        tables = placed.layers[1].tables
                        tables.slot_of_E[:-1] = tables.slots_per_rank - 1 - tables.slot_of_E[:-1]
                    mine, by_rank = "", [""] * group.size
                    try:
                        check_exchange(placed, family)
                    except InputError as error:
                        mine = str(error)
                    dist.all_gather_object(by_rank, mine, group=group.handle)
                    told[family, dtype, what] = by_rank
    return told


def first_two_swapped(stored: Any) -> Any:
    """A tensor of experts read as if the first two slots were each other's."""
    if len(stored.experts) > 1:
        block = stored.shape[0] // len(stored.experts)
        assert block == 1, "one row for each expert"
        size = sum(size for _, size in stored.pieces) // len(stored.experts)
        rows = [(offset + begin, size) for offset, length in stored.pieces for begin in range(0, length, size)]
        order = [1, 0, *range(2, len(rows))]
        return stored._replace(pieces=tuple(rows[i] for i in order), experts=tuple(stored.experts[i] for i in order))
    other = {0: 1, 1: 0}.get(stored.slot, stored.slot)
    return stored._replace(name=stored.name.replace(f".experts.{stored.slot}.", f".experts.{other}."), slot=other)


def meet_a_bug(rank: int) -> None:
    """Rank `rank` looks up what is not there."""
    import os

    if int(os.environ["RANK"]) == rank:
        {}["no such key"]
