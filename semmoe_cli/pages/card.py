"""The card (README.md) of a trace or a plan on the Hugging Face Hub: metadata, what it is, how to
use it."""

from typing import TYPE_CHECKING, Any

from semmoe.pages.page import as_markdown
from semmoe.profiles.errors import model_name

if TYPE_CHECKING:
    from semmoe.profiles.trace import RoutingTrace
    from semmoe.solvers.plan import Plan

TAGS = ("semmoe", "mixture-of-experts", "expert-parallelism")


def trace_card(trace: "RoutingTrace", repo: str) -> str:
    """The card of a trace in the data set `repo`; its parts are what the Hub's viewer shows."""
    info = trace.info
    facts = {
        "model": model_name(info.model) or "not named",
        "MoE layers": info.num_layers,
        "experts": info.num_experts,
        "experts per token": info.top_k,
        "requests": f"{trace.num_requests:,}",
        "tokens": f"{trace.num_tokens:,}",
        "made by": info.made_by,
        "fingerprint": trace.fingerprint,
    }
    said = "Which experts a Mixture-of-Experts model chose for every token of recorded requests, one row per request."
    use = [f"semmoe show hf://datasets/{repo}", f"semmoe place hf://datasets/{repo} --ranks 8 -o plan"]
    metadata = {"configs": [{"config_name": "default", "data_files": "*.parquet"}]}
    return _card(
        f"Expert routing of {model_name(info.model) or 'a model'}", "routing-trace", metadata, said, facts, use, repo
    )


def plan_card(plan: "Plan", repo: str) -> str:
    """The card of a plan in the data set `repo`."""
    facts = {name.replace("_", " "): value for name, value in plan.facts().items() if name != "kind"}
    verdict = plan.scores.verdict if plan.scores else None
    said = (
        "Which rank holds which expert of a Mixture-of-Experts model, with tables that send tokens and requests there."
    )
    if verdict:
        said += f"\n\n{as_markdown(verdict.sentence)}"
    use = [f"semmoe report hf://datasets/{repo} TRACE", f"semmoe export hf://datasets/{repo} --to sglang -o map.json"]
    return _card(
        f"Expert placement of {model_name(plan.model.model) or 'a model'}",
        "expert-placement",
        {},
        said,
        facts,
        use,
        repo,
    )


def _card(
    title: str, tag: str, metadata: dict[str, Any], said: str, facts: dict[str, Any], use: list[str], repo: str
) -> str:
    import yaml

    from semmoe.profiles.hub.publish import MADE_BY_US

    head = yaml.safe_dump({"pretty_name": title, "tags": [*TAGS, tag], **metadata}, sort_keys=False)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    commands = "\n".join([*use, f"semmoe pull {repo} DIR"])
    return (
        f"---\n{head}---\n\n{MADE_BY_US}\n\n# {as_markdown(title)}\n\n{said}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"```bash\npip install semmoe\n{commands}\n```\n\nThe formats are those of semmoe's docs/formats.md.\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return as_markdown(str(value))
