"""TensorRT-LLM's map: the load balancer of `--extra_llm_api_options`, MoeLoadBalancerConfig in
llmapi/llm_args.py.

Shape letters: M rows of a file, P slots of all ranks.
"""

import json
from pathlib import Path
from typing import Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import shortened
from semmoe.solvers.maps.engine import Engine, Rows, Wanted, first_line, identity_row, ids_of, object_of, read_text
from semmoe.solvers.placement import Topology
from semmoe.solvers.plan import ModelFacts, Plan

KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


def make_map(wanted: Wanted) -> dict[str, Any]:
    """The three keys of MoeLoadBalancerConfig. Rows go by the number of the layer in the model;
    MTP layers follow the last one."""
    if wanted.num_mtp_layers and not wanted.depth:
        raise InputError(
            "MTP layers are numbered after the last layer, and the plan does not know it: --num-hidden-layers"
        )
    rows_LP = wanted.placement.physical_to_logical_LP
    rows = dict(zip(wanted.model.model_layers, rows_LP.tolist(), strict=True))
    mtp = {wanted.depth + i: identity_row(wanted.placement) for i in range(wanted.num_mtp_layers)}
    return {
        "num_slots": rows_LP.shape[1],
        "initial_global_assignments": {**dict(sorted(rows.items())), **mtp},
        "layer_updates_per_iter": 0,
    }


def render(value: dict[str, Any], ending: str) -> bytes:
    """YAML with a line per layer."""
    rows = "".join(f"  {layer}: {json.dumps(row)}\n" for layer, row in value["initial_global_assignments"].items())
    text = f"num_slots: {value['num_slots']}\ninitial_global_assignments:\n{rows}layer_updates_per_iter: 0\n"
    return text.encode()


def read_map(file: Path, model: ModelFacts, topology: Topology) -> Rows:
    import yaml

    class RowsAlone(yaml.SafeLoader):
        """An alias may stand for a row of numbers: of more, a few lines would be a list of any
        size."""

        def compose_node(self, parent: Any, index: int) -> Any:
            alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            nested = isinstance(node, yaml.CollectionNode) and (
                node.end_mark is None or not all(isinstance(item, yaml.ScalarNode) for item in node.value)
            )
            if alias and nested:
                raise ValueError("an alias (*name) stands for more than a row of numbers")
            return node

    where = str(file)
    try:
        # Not libyaml's loader: it is faster than this one's second, and crashes where brackets nest
        # deep.
        value = object_of(where, yaml.load(read_text(file), RowsAlone))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not YAML: {first_line(error)}") from None
    for key in value:
        if key not in KEYS:
            raise InputError(f"{where} has the key {str(key)[:40]!r}: TensorRT-LLM takes {', '.join(sorted(KEYS))}")
    table = value.get("initial_global_assignments")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{where} has no initial_global_assignments by layer: there is no map in it")
    for layer in table:
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise InputError(f"{where}: {str(layer)[:40]!r} is not the number of a layer")
    for layer in model.model_layers:
        if layer not in table:
            raise InputError(f"{where} has no row for layer {layer}, which has experts: TensorRT-LLM would stop there")
    rows_MP = ids_of(where, "initial_global_assignments", list(table.values()), 2)
    if value.get("num_slots") != rows_MP.shape[1]:
        raise InputError(
            f"{where}: num_slots is {shortened(value.get('num_slots'))}, its rows have {rows_MP.shape[1]} slots"
        )
    return Rows(rows_MP, list(table), list(model.model_layers))


def launch_lines(plan: Plan, file: str, format: str) -> list[str]:
    return [
        f"add to the file of --extra_llm_api_options, with --ep_size {plan.placement.num_ranks}: "
        f"enable_attention_dp: true, moe_config: {{backend: WIDEEP, load_balancer: {file}}}"
    ]


ENGINE = Engine((".yaml", ".yml"), make_map, read_map, launch_lines, render)
