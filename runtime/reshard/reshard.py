"""Reshard: a checkpoint and a plan in, a checkpoint out that realises the plan.

Layout "permuted" (permuted.py) is a normal checkpoint with relabelled experts, layout "ranks"
(ranks.py) a directory per rank; undo.py takes both back. The work is done on keys and bytes
(relabel.py, copy.py); tensors are never loaded. OUT is written beside its name, compared with the
source byte by byte, and renamed: it appears whole or not at all, and what a killed run left is
removed by the next. semmoe.json in OUT says what was done.
"""

from dataclasses import replace
from pathlib import Path

from semmoe.profiles.checkpoint import compare_checkpoint
from semmoe.profiles.errors import InputError, require_extra
from semmoe.profiles.numbering import LAYOUTS
from semmoe.profiles.progress import Stages
from semmoe.runtime.reshard.permuted import write_permuted
from semmoe.runtime.reshard.ranks import write_ranks
from semmoe.runtime.reshard.records import ReshardOptions, ReshardResult
from semmoe.runtime.reshard.source import open_checkpoint
from semmoe.solvers.plan import Plan

VERIFY = ("none", "bytes", "logits")


def reshard_checkpoint(
    checkpoint: Path,
    plan: Plan,
    out: Path,
    options: ReshardOptions = ReshardOptions(),
    *,
    progress: Stages | None = None,
) -> ReshardResult:
    """Write `checkpoint` as `out` so that the placement of `plan` holds in it.

    Parameters:
        checkpoint: directory with config.json and safetensors files; it is only read.
        plan: a plan for the checkpoint's model.
        out: directory that is written; it appears at the end, whole.
        options: layout, and how to write and verify.
        progress: told the bytes done and the bytes in all.

    Raises InputError where the placement, the model or the files do not allow it; then `out` is not
    there.
    """
    layout, verify = options.layout, options.verify
    if layout not in LAYOUTS or verify not in VERIFY:
        raise InputError(f"layout {layout!r} and verify {verify!r}: expected one of {LAYOUTS} and of {VERIFY}")
    if layout == "ranks" and verify == "logits":
        raise InputError("--verify logits needs a checkpoint that Transformers can load: use --layout permuted")
    if verify == "logits":
        require_extra("--verify logits runs both models, which", "torch", "transformers")
    write = write_ranks if layout == "ranks" else write_permuted
    source = open_checkpoint(checkpoint)
    same, line = compare_checkpoint(plan.model.checkpoint, checkpoint, str(checkpoint))
    result = write(source, plan, out, options, progress)
    return replace(result, same_checkpoint=same, notes=(*result.notes, *filter(None, [line])))
