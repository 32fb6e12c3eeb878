"""How to bring a plan into each engine: the exact commands, from the launch lines that `semmoe
export` prints.

Heavy modules are imported inside.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semmoe.pages.page import Commands
from semmoe.profiles.errors import model_name
from semmoe.terminal.text import quoted

if TYPE_CHECKING:
    from semmoe.solvers.plan import ModelFacts, Plan

LINE = 90  # characters of a command on one line


class Engine(NamedTuple):
    """An engine that reads a map: its name, `--to` and `--format` of export, the file, and the
    program that the launch flags follow."""

    name: str
    kind: str
    format: str
    file: str
    program: str


ENGINES = (
    Engine("SGLang", "sglang", "", "sglang.json", "python -m sglang.launch_server --model-path"),
    Engine("TensorRT-LLM", "trtllm", "", "trtllm.yaml", "trtllm-serve"),
    Engine("vLLM (a build with pull request 41141; no release has it)", "vllm", "pr41141", "vllm.jsonl", "vllm serve"),
    Engine("vLLM-Ascend (model runner 1)", "vllm-ascend", "", "ascend.json", "vllm serve"),
)


def export_command(engine: Engine, model: "ModelFacts", plan_path: str, file: str) -> str:
    """What writes an engine's map. `plan_path`, `file`: as they are typed."""
    option = f" --format {engine.format}" if engine.format else ""
    if engine.kind in ("sglang", "trtllm") and not model.num_model_layers:  # they name every layer, dense ones too
        option += f" --model {quoted(model_name(model.model) or 'CHECKPOINT')}"
    return f"semmoe export {plan_path} --to {engine.kind}{option} -o {file}"


def deploy_lines(plan: "Plan", plan_path: str, engine: str | None) -> list[str]:
    """What brings the plan into an engine: the map that it reads, where one is named; else the two
    ways there are. `plan_path`: as it is typed."""
    chosen = [e for e in ENGINES if e.kind == engine]
    lines = [export_command(e, plan.model, plan_path, e.file) for e in chosen or ENGINES[:1]]
    if not chosen and not plan.placement.num_replicas:
        source = model_name(plan.model.model) or "CHECKPOINT"
        lines.append(f"semmoe reshard {quoted(source)} {plan_path} -o {quoted(Path(source).name + '-placed')}")
    return lines


def deployment(plan: "Plan", plan_path: str) -> list[Commands]:
    """Commands for every engine that reads a map, and for those that only split experts in
    checkpoint order."""
    from semmoe.solvers.maps.launch import launch_lines

    where = quoted(plan_path)
    model = model_name(plan.model.model) or "CHECKPOINT"
    found = []
    for engine in ENGINES:
        export = export_command(engine, plan.model, where, engine.file)
        said = launch_lines(plan, engine.kind, Path(engine.file), format=engine.format)
        start, notes = _start(engine, model, plan, said)
        found.append(Commands(engine.name, [export, *map(_wrapped, start)], [_sentence(line) for line in notes]))
    if not plan.placement.num_replicas:
        ranks = plan.topology.num_ranks
        source = quoted(model)
        placed = quoted(Path(model).name + "-placed")
        found.append(
            Commands(
                "Any other engine that splits experts in order (vLLM's releases, Transformers, Megatron, torchtitan)",
                [
                    f"semmoe reshard {source} {where} -o {placed}",
                    _wrapped(serve_line(f"{Path(model).name}-placed", ranks)),
                ],
                [
                    f"An ordinary checkpoint: the same model, experts and router relabelled, to be served with expert parallelism over "
                    f"{ranks} ranks. Its outputs are those of the original. "
                    f"{source} is the directory of the checkpoint."
                ],
            )
        )
    return found


def serve_line(checkpoint: str, ranks: int) -> str:
    """What serves a rewritten checkpoint with vLLM, on that many ranks of experts."""
    split = f" --data-parallel-size {ranks} --enable-expert-parallel --all2all-backend deepep_high_throughput"
    return f"vllm serve {quoted(checkpoint)}{split if ranks > 1 else ''}"


def _start(engine: Engine, model: str, plan: "Plan", said: list[str]) -> tuple[list[str], list[str]]:
    """Command lines that start the engine, and what else the launch lines say."""
    source, first, rest = quoted(model), said[0], said[1:]
    if engine.kind == "trtllm":
        ranks = plan.topology.num_ranks
        options = ("enable_attention_dp: true", f"moe_config: {{backend: WIDEEP, load_balancer: {engine.file}}}")
        return [
            f"printf '%s\\n' {' '.join(map(quoted, options))} > extra.yaml",
            f"{engine.program} {source} --tp_size {ranks} --ep_size {ranks} --extra_llm_api_options extra.yaml",
        ], ["add the two lines to your own extra.yaml where you have one", *rest]
    _, colon, flags = first.partition(" with: --")
    if not colon:  # the engine cannot run this model's map, and says so
        return [], said
    parallel = f"--data-parallel-size {plan.topology.num_ranks} --enable-expert-parallel "
    flags = f"{parallel if engine.kind == 'vllm-ascend' else ''}--{flags}"
    return [f"{engine.program} {source} {flags}"], rest


def _wrapped(command: str) -> str:
    """The command over lines that a page and a terminal show whole, broken before options."""
    first, *options = command.split(" --")
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) > LINE:
            lines.append("  --" + option)
        else:
            lines[-1] += " --" + option
    return " \\\n".join(lines)


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:]
