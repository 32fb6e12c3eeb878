"""A reshard of an old plan becomes that of a new one: only files in which something moves are
written, the others are hard links to those of the reshard, or copies where links cannot be.

What is written is, byte for byte, what a reshard of the original for the new plan writes, and goes
back to the original in the same way.
"""

from dataclasses import replace
from pathlib import Path

from semmoe.profiles.errors import InputError
from semmoe.profiles.progress import Stages
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult
from semmoe.runtime.reshard.replan.permuted import replan_permuted
from semmoe.runtime.reshard.replan.ranks import replan_ranks
from semmoe.runtime.reshard.sidecar import check_unchanged, read_sidecar
from semmoe.solvers.plan import Plan


def replan_reshard(
    placed: Path,
    old: Plan,
    new: Plan,
    out: Path,
    options: ReshardOptions = ReshardOptions(),
    *,
    progress: Stages | None = None,
) -> ReshardResult:
    """Write as `out` what `placed`, a reshard for the plan `old`, is for the plan `new`.

    Parameters:
        placed: directory of a reshard of either layout; it is only read.
        old, new: plans for the same model.
        out: directory that is written; it appears at the end, whole.
        options: how to write and verify; the layout is that of `placed`. With "bytes" the reshard
            is compared with its own checksums first.
        progress: told the bytes done and the bytes in all.

    Raises InputError where the reshard is damaged or of another plan; then `out` is not there.
    """
    if options.verify == "logits":
        raise InputError("--verify logits compares with an original: use --verify bytes with --from-plan")
    facts = read_sidecar(placed)
    made_for = facts["plan"]["fingerprint"]
    if made_for != old.fingerprint:
        raise InputError(f"{placed} was resharded for plan {made_for}, --from-plan is {old.fingerprint}")
    for name in ("num_experts", "model_layers"):
        mine, wanted = getattr(old.model, name), getattr(new.model, name)
        if mine != wanted:
            raise InputError(f"the plans are for different models: {name} {mine} against {wanted}")
    if options.compares:
        check_unchanged(placed, facts, progress)
    write = replan_ranks if facts["layout"] == "ranks" else replan_permuted
    return write(placed, facts, new, out, replace(options, layout=facts["layout"]), progress)
