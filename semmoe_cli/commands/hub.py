"""`semmoe push` and `semmoe pull`: traces and plans on the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from semmoe.options import Json, refuse_to_replace
from semmoe.profiles.errors import InputError

Force = Annotated[bool, typer.Option("--force", help="Replace a trace or plan that is there.")]


def push(
    path: Annotated[Path, typer.Argument(metavar="TRACE|PLAN", help="Directory of a finished trace, or of a plan.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Data set of the Hub; made where it is not there yet.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a data set that is new a private one.")] = False,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Message of the commit.", show_default=False)] = "",
    force: Force = False,
    json_: Json = False,
) -> None:
    """Push a trace or a plan to the Hugging Face Hub, with a card that says what it is; other
    commands read it as hf://datasets/OWNER/NAME.

    Example: semmoe push t me/gpt-oss-20b-routing --private
    """
    from semmoe.pages.card import plan_card, trace_card
    from semmoe.profiles.hub.publish import Push, repository
    from semmoe.profiles.hub.publish import push as push_files
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import TABLES, Plan
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.tables import note, print_json
    from semmoe.terminal.text import quoted

    name = repository(repo)
    if (path / "plan.json").is_file():
        plan = Plan.load(path)
        kind, files, card, fingerprint = "plan", ["plan.json", TABLES], plan_card(plan, name), plan.fingerprint
    else:
        trace = RoutingTrace.open(path)
        trace.check_parts()
        files = ["trace.json", *(part["file"] for part in trace.facts["parts"])]
        kind, card, fingerprint = "trace", trace_card(trace, name), trace.fingerprint
    how = Push(private=private, force=force, message=message or f"{kind} {fingerprint}, by semmoe push")
    url = push_files(path, files, card, name, how)
    if json_:
        print_json({"kind": kind, "url": url, "files": files, "fingerprint": fingerprint})
    note(f"pushed the {kind} {path} to {url} ({len(files)} files)")
    next_step(f"semmoe show {quoted(url)}", as_json=json_, aside=True)


def pull(
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Data set of the Hub, or any URL that fsspec knows.")
    ],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to write.")],
    force: Force = False,
    json_: Json = False,
) -> None:
    """Copy a trace or a plan from the Hugging Face Hub, and compare every file with its hash.

    Example: semmoe pull me/gpt-oss-20b-routing t
    """
    from semmoe.profiles.files import check_directory_target, new_directory
    from semmoe.profiles.hub.publish import CARD, repository
    from semmoe.profiles.hub.urls import fetched, holds, is_url, shown
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import TABLES, Plan
    from semmoe.terminal.decision import next_step
    from semmoe.terminal.tables import note, print_json
    from semmoe.terminal.text import quoted

    _refuse_other(output, force=force)
    check_directory_target(output)
    url = repo if is_url(repo) else f"hf://datasets/{repository(repo)}"
    kind = "plan" if holds(url, "plan.json") else "trace"
    files = (
        ("plan.json", TABLES)
        if kind == "plan"
        else ("trace.json", *(part["file"] for part in RoutingTrace.open(url).facts["parts"]))
    )
    with fetched(url, (*files, CARD)) as folder:
        if kind == "plan":
            fingerprint = Plan.load(folder).fingerprint
        else:
            trace = RoutingTrace.open(folder)
            trace.check_parts()
            fingerprint = trace.fingerprint
        with new_directory(output) as there:
            for file in folder.iterdir():
                (there / file.name).write_bytes(file.read_bytes())
    if json_:
        print_json({"kind": kind, "path": str(output), "files": list(files), "fingerprint": fingerprint})
    note(f"wrote {output}: the {kind} of {shown(url)} ({len(files)} files, compared with their hashes)")
    next_step(f"semmoe show {quoted(str(output))}", as_json=json_, aside=True)


def _refuse_other(output: Path, *, force: bool) -> None:
    """Raise InputError where a directory that is there is no trace or plan, or is one and --force
    is not given."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not any((output / name).is_file() for name in ("trace.json", "plan.json")):
        raise InputError(f"{output} is there and is no trace or plan: choose another name")
    refuse_to_replace(output, force=force)
