"""`semmoe show`: any trace or plan in a screen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semmoe.options import Json, PhaseOption, Seed
from semmoe.profiles.errors import InputError, model_name

if TYPE_CHECKING:
    from semmoe.profiles.trace import RoutingTrace

LARGEST_SAMPLE_IDS = 100_000_000  # enough for every statistic of a screen


def show(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A trace or a plan: a directory, or a URL such as hf://datasets/OWNER/NAME."
        ),
    ],
    accept_edits: Annotated[
        bool,
        typer.Option(
            "--accept-edits",
            help="The plan.json of a plan was edited on purpose: check all else, sign it again, and note the edit in it.",
        ),
    ] = False,
    phase: PhaseOption = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Describe a trace or a plan in a screen: sizes, layers, load skew, and whether there is
    structure to use.

    Example: semmoe show t
    """
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.tables import print_facts
    from semmoe.terminal.text import quoted

    facts = describe_path(path, seed=seed, accept_edits=accept_edits, phase=phase and phase.value)
    named = {} if json_ else {"model": model_name(facts["model"]) or "not named (place --name names it in a plan)"}
    print_facts(facts | named, as_json=json_)
    where = quoted(path)
    is_plan = facts["kind"] == "plan"
    lines = [f"semmoe export {where} --to sglang -o map.json"] if is_plan else [f"semmoe report {where}"]
    next_step(*lines, *([] if is_plan else [f"semmoe place {where} --ranks 8 -o plan"]), as_json=json_)


def describe_path(path: str, *, seed: int, accept_edits: bool = False, phase: str | None = None) -> dict[str, Any]:
    """Facts about the trace or plan at `path`. Raises InputError where it is neither. With
    `accept_edits` a plan is signed again first. `phase`: of a trace, whose tokens are described."""
    from semmoe.profiles.hub.urls import holds, is_url
    from semmoe.profiles.split import only_phase
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import Plan, sign_again
    from semmoe.terminal.tables import note, note_unchecked

    if accept_edits and is_url(path):
        raise InputError(f"--accept-edits: {path} is a URL: semmoe pull it first")
    if holds(path, "plan.json") if is_url(path) else (Path(path) / "plan.json").is_file():
        plan = sign_again(path) if accept_edits else Plan.load(path)
        if accept_edits:
            note(f"signed {path} as it is now")
        note_unchecked(plan)
        if phase:
            raise InputError(f"--phase {phase}: {path} is a plan, and only a trace has tokens of both phases")
        return plan.facts()
    if accept_edits:
        raise InputError(f"--accept-edits: {path} is not a plan, it holds no plan.json")
    if not is_url(path) and not Path(path).exists():
        raise InputError(f"{path} does not exist: expected a trace or a plan")
    if not is_url(path) and not (Path(path) / "trace.json").is_file():
        raise InputError(f"{path} is neither a trace nor a plan: it holds no trace.json and no plan.json")
    trace = only_phase(RoutingTrace.open(path), phase or "all")
    facts = _describe_trace(trace, seed)
    note_unchecked(trace)
    return facts


def _describe_trace(trace: "RoutingTrace", seed: int) -> dict[str, Any]:
    import numpy as np

    info = trace.info
    facts: dict[str, Any] = {
        "kind": "trace",
        "model": info.model,
        "layers": info.num_layers,
        "model_layers": list(info.model_layers),
        "experts": info.num_experts,
        "top_k": info.top_k,
        "routing_groups": info.n_group,
        "content": "routing per token" if info.kind == "tokens" else "expert loads only",
        "numbering": _describe_numbering(info.numbering),
        "made_by": info.made_by,
        "fingerprint": trace.fingerprint,
    }
    if info.kind == "counts":
        windows, load_WLE = trace.load_counts()
        facts |= {"windows": len(windows), "activations": int(load_WLE.sum())}
        return facts | {"scored": "for balance only (--method load)"} | _load_skew(load_WLE.sum(0), info.model_layers)
    from semmoe.profiles.counts import profile_traces
    from semmoe.profiles.split import one_sided, phase_of, phase_shares
    from semmoe.solvers.health.health import left_out_facts
    from semmoe.solvers.health.impossible import impossible_routing
    from semmoe.solvers.health.structure import measure_structure

    requests = trace.requests()
    domains = requests.column("domain").to_pylist()
    facts |= {"requests": trace.num_requests, "tokens": trace.num_tokens, "domains": len(set(domains))}
    if left_out := left_out_facts(trace):
        facts["left_out"] = str(left_out)
    if not trace.num_tokens:
        return facts
    shares = phase_shares([trace])
    facts |= {"phase": phase_of(trace), "prompt_share": shares["prompt"], "generated_share": shares["generated"]}
    if said := one_sided(shares):
        facts["phases"] = said
    profile = profile_traces([trace], seed=seed, sample_ids=LARGEST_SAMPLE_IDS)
    known = profile.sample.token_ids_T >= 0
    facts["token_ids_seen"] = len(np.unique(profile.sample.token_ids_T[known]))
    facts |= _load_skew(profile.load_LE, info.model_layers)
    if impossible := impossible_routing(profile.load_LE, profile.sample, info):
        facts["impossible_routing"] = list(impossible.values())
        facts["structure"] = "not judged: the trace holds routing that cannot be"
    elif structure := measure_structure(profile.sample, info, seed=seed):
        facts["co_activation_lift"] = float(structure.lift_L.mean())
        facts["co_activation_lift_per_layer"] = [round(float(v), 3) for v in structure.lift_L]
        facts["structure"] = structure.verdict
    else:
        facts["structure"] = "cannot tell: too few requests or tokens, or a single expert per token"
    return facts


def _describe_numbering(numbering: Any) -> str:
    if isinstance(numbering, dict):
        return f"{'mapped back from' if numbering['mapped_back'] else 'in'} the order of plan {numbering['plan']}"
    return "of the model" if numbering == "model" else "not known (taken as the model's)"


def _load_skew(load_LE: Any, model_layers: tuple[int, ...]) -> dict[str, Any]:
    """Load skew over the experts of a layer: mean over layers of busiest / mean, and the share
    of experts never used; of the layers that have any load."""
    import numpy as np

    counted_L = load_LE.any(axis=1)
    load_LE = load_LE[counted_L]
    facts: dict[str, Any] = {
        "busiest_expert_over_mean": float((load_LE.max(1) / load_LE.mean(1)).mean()) if len(load_LE) else 0.0,
        "unused_expert_share": float((load_LE == 0).mean()) if len(load_LE) else 0.0,
    }
    if not counted_L.all():
        facts["layers_without_counts"] = [model_layers[layer] for layer in np.flatnonzero(~counted_L)]
    return facts
