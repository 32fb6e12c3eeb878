"""How the help of `semmoe` looks: options in panels, short metavars, an example on each line.

Panels are named here and not at the options: a panel is about a command as a whole. An option that
is not named here stands in the panel of the option before it, which is of the same record.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from semmoe.config import blame, settle

COMMON, OUTPUT = "Common", "Output and defaults"
PANELS = {
    COMMON: "ranks plan nodes topology method import_ dispatch hardware engine to format data dataset generate from_ "
    "server prompts upstream dp_ranks nproc scheduler predict max_new_tokens what_if undo layout against phase private "
    "message",
    "Texts": "subset split text_field messages_field domain_field",
    "What is traced": "temperature max_requests max_tokens max_length record_weights hash_layers resume",
    "Model": "model revision trust_remote_code dtype device device_map num_hidden_layers",
    "Engine files": "dense_layers repetition domain strict api",
    "Requests learned from": "holdout holdout_domain refit",
    "Search": "minimize load_cap objective lar_weight robust expressible effort processes certify",
    "Re-placement": "from_plan moves moves_per_layer move_cost horizon_tokens replan after",
    "Slots": "slots replicas redundant spare replica_choice mtp_layers",
    "Time": "backend tokens_per_rank weights rows overlap other_us step_ms gpu_hour measured",
    "Sizes and links": "hidden_size dispatch_bytes topology_bandwidth latency expert_bytes expert_size dtype_bytes",
    "Simulated batches": "batch_tokens window score_from seed",
    "Server": "tokenizer host port metrics_port band max_inflight record",
    "Replay": "replay",
    "Checks": "check verify timeout accept_edits",
    OUTPUT: "all_ fail_under output name link force json_ config quiet verbose version debug install_completion show_completion help",
}
# Options of one name that are about something else in a command.
PANELS_OF = {
    ("trace", "model"): "Engine files",
    ("place", "force"): "Re-placement",
    ("trace", "seed"): "What is traced",
    ("trace", "batch_tokens"): "Model",
    ("run", "max_requests"): "Texts",
    ("run", "batch_tokens"): COMMON,
    **{("run", name): "Replay" for name in ("hidden_size", "expert_size", "max_tokens", "seed")},
    **{("show", name): OUTPUT for name in ("seed", "accept_edits")},
    ("demo", "seed"): COMMON,
    ("run", "backend"): "Model",
    ("report", "tokenizer"): OUTPUT,
}
METAVARS = {
    "ranks": "R",
    "to": "ENGINE",
    "nodes": "N",
    "holdout": "SHARE",
    "batch_tokens": "TOKENS",
    "window": "REQUESTS",
    "device": "DEVICE",
    "backend": "NAME",
    "device_map": "auto",
    "dispatch_bytes": "BYTES",
    "dtype_bytes": "BYTES",
    "revision": "NAME",
    "subset": "NAME",
    "split": "NAME",
    "domain": "NAME",
}
TYPES = (("int", "N"), ("float", "X"), ("str|text", "TEXT"), ("path|file|directory", "PATH"))


class _Help:
    """What commands and the group of them have in common. Mixed into classes of Typer."""

    def parse_args(self: Any, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # pyright: ignore[reportAttributeAccessIssue]
        except BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise

    def collect_usage_pieces(self: Any, ctx: Any) -> list[str]:
        """What a command cannot do without, by name, and its arguments."""
        arguments, needed = [], []
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                word = parameter.metavar or parameter.name.upper()
                arguments.append(word if parameter.required else f"[{word}]")
            elif parameter.required:
                metavar = parameter.metavar or METAVARS.get(parameter.name) or parameter.name.upper()
                needed.append(f"{parameter.opts[0]} {metavar}")
        return [*arguments, *needed, "[OPTIONS]"]

    def format_help_text(self: Any, ctx: Any, formatter: Any) -> None:
        text, examples = _split(self.help)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
        _write_examples(formatter, examples)

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{panel: [] for panel in PANELS}}
        panel = COMMON
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                row = (parameter.metavar or parameter.name.upper(), record[1])
                panels["Arguments"].append(row)
                continue
            panel = _panel(ctx.command.name, parameter.name) or panel
            panels[panel].append(_row(parameter, record))
        for name, rows in panels.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl([(left, _readable(right)) for left, right in rows])

    def format_epilog(self: Any, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, _split(self.epilog)[1])


class Command(_Help, TyperCommand):
    """A command of semmoe, with defaults from a configuration file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except BadParameter as error:
            blame(ctx, error)
            raise
        settle(ctx)
        return rest


class Group(_Help, TyperGroup):
    """`semmoe` itself: its commands with their whole first sentence."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["COMMAND", *super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first: they are what a reader looks for."""
        rows = [(name, _summary(self.get_command(ctx, name))) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def _panel(command: str | None, option: str) -> str | None:
    if panel := PANELS_OF.get((command or "", option)):
        return panel
    return next((panel for panel, names in PANELS.items() if option in names.split()), None)


def _row(parameter: Any, record: tuple[str, str]) -> tuple[str, str]:
    """An option with a metavar in place of the name of its type; choices stand without brackets."""
    names = record[0]
    if parameter.metavar is not None:
        return record
    for kind, letter in TYPES:
        word = METAVARS.get(parameter.name, letter)
        names = re.sub(rf"(?i) <?\b(?:{kind})(?: range)?>?$", f" {word}", names)
    return re.sub(r"[<\[]([\w|-]+)[>\]]$", r"\1", names), record[1]


def _readable(text: str) -> str:
    """Ranges in words; that a number is not negative goes without saying."""
    text = re.sub(r"([\d.]+)<=x<=([\d.e+]+)", r"\1 to \2", text)
    text = re.sub(r"; x>=0(?=[;\]])|x>=0; |  \[x>=0\]", "", text)
    return re.sub(r"x>=([\d.]+)", r"at least \1", text)


def _split(text: str | None) -> tuple[str, list[str]]:
    """What a help says, and the command lines of its examples."""
    said, _, examples = re.sub(r"\bExamples?: ", "\f", inspect.cleandoc(text or "")).partition("\f")
    return said.strip(), [" ".join(line.split()) for line in examples.split("; ") if line.strip()]


def _summary(command: Any) -> str:
    return " ".join(_split(command.help)[0].partition("\n\n")[0].split()).removesuffix(".")


def _write_examples(formatter: Any, examples: Iterable[str]) -> None:
    """Each on one line, however long: a line that is cut cannot be copied."""
    examples = list(examples)
    if examples:
        with formatter.section("Examples" if len(examples) > 1 else "Example"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
