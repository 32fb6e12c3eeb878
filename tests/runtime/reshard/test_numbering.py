"""Routing of a permuted reshard is stored in the numbering of the model that it was made from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import random_orders
from command_line import run
from engine_samples import sglang_record, write_lines
from random_plans import random_plan
from tiny_models import tiny_model
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.engines.imports import ImportOptions, import_trace
from semmoe.profiles.errors import InputError
from semmoe.profiles.numbering import Relabelling, config_folder, find_relabelling
from semmoe.profiles.trace import RoutingTrace, TraceInfo
from semmoe.profiles.trace_writer import TraceWriter
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.sidecar import read_sidecar
from semmoe.runtime.reshard.undo import undo_reshard

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny checkpoint, `m`, and two reshards of it, `placed` and `ranks`."""
    path = tmp_path_factory.mktemp("numbering")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_model("qwen3_moe").save_pretrained(path / "m")
    tokenizer = Tokenizer(models.WordLevel({f"w{word}": word for word in range(64)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(path / "m")
    plan = random_plan(path / "m")
    plan.save(path / "p")
    reshard_checkpoint(path / "m", plan, path / "placed")
    reshard_checkpoint(path / "m", plan, path / "ranks", ReshardOptions(layout="ranks"))
    return path


def rows(trace: Path) -> list[list[list[list[int]]]]:
    """Expert ids of every request, sorted: the order within top-k has no meaning."""
    batch = RoutingTrace.open(trace).load()
    return np.sort(batch.expert_ids_TLK, axis=2).tolist()


def served(tiny: Path, where: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Responses of a server of m, and of one of placed that chose the same experts."""
    facts = read_sidecar(tiny / "placed")
    layers, num_experts = sorted(map(int, facts["new2old"])), facts["num_experts"]
    random = np.random.default_rng(seed)
    ids_TLK = np.argsort(random.random((30, len(layers), num_experts)), axis=2)[:, :, :2]
    old2new_LE = np.argsort([facts["new2old"][str(layer)] for layer in layers], axis=1)
    new_TLK = old2new_LE[np.arange(len(layers))[:, None], ids_TLK]
    assert (new_TLK != ids_TLK).any()
    return tuple(
        write_lines(where / f"{name}.jsonl", [sglang_record(ids.astype(np.int32))])
        for name, ids in (("m", ids_TLK), ("placed", new_TLK))
    )  # pyright: ignore


def test_responses_of_a_placed_server_are_mapped_back(tiny: Path, tmp_path: Path) -> None:
    of_m, of_placed = served(tiny, tmp_path)
    import_trace("sglang", [of_m], tmp_path / "t", ImportOptions(model_config=str(tiny / "m")))
    for model in (tiny / "placed", tiny / "placed" / "config.json"):
        out = tmp_path / f"of_{model.name}"
        summary = import_trace("sglang", [of_placed], out, ImportOptions(model_config=str(model)))
        assert rows(out) == rows(tmp_path / "t")
        info, plan = RoutingTrace.open(out).info, read_sidecar(tiny / "placed")["plan"]["fingerprint"]
        assert info.numbering == {"plan": plan, "mapped_back": True}
        assert info.notes["mapped_back"] in summary.notes and plan in info.notes["mapped_back"]
        assert not info.checkpoint or info.checkpoint["router_sha256"] is None
    # Routers of layout ranks speak of the model's own numbers.
    import_trace("sglang", [of_m], tmp_path / "r", ImportOptions(model_config=str(tiny / "ranks")))
    assert rows(tmp_path / "r") == rows(tmp_path / "t")
    assert RoutingTrace.open(tmp_path / "r").info.numbering == "model"


def test_the_command_says_so(tiny: Path, tmp_path: Path) -> None:
    _, of_placed = served(tiny, tmp_path)
    facts = json.loads(
        run("trace", "--from", "sglang", of_placed, "--model", tiny / "placed", "-o", tmp_path / "t", "--json")
    )
    assert any("mapped back through new2old" in line for line in facts["notes"])
    assert facts["numbering"]["mapped_back"] is True
    assert "mapped back from the order of plan" in run("show", tmp_path / "t")


def test_a_placed_model_is_traced_in_the_numbers_of_its_source(tiny: Path, tmp_path: Path) -> None:
    from semmoe.profiles.capture.requests import TextRequest
    from semmoe.profiles.capture.run import TraceProgress, trace_model

    lines: list[str] = []
    for name in ("m", "placed"):
        texts = (TextRequest(f"r{i}", "", " ".join(f"w{3 + (7 * i + k) % 40}" for k in range(12))) for i in range(5))
        trace_model(str(tiny / name), texts, tmp_path / name, progress=TraceProgress(), tell=lines.append)
    assert rows(tmp_path / "placed") == rows(tmp_path / "m")
    assert sum("mapped back" in line for line in lines) == 1
    assert RoutingTrace.open(tmp_path / "m").info.numbering == "model"
    assert isinstance(RoutingTrace.open(tmp_path / "placed").info.numbering, dict)


def test_loads_and_empty_slots_are_mapped_back(tmp_path: Path) -> None:
    order_LE = random_orders(2)
    orders = {layer: order.tolist() for layer, order in enumerate(order_LE)}
    relabelled = Relabelling("semmoe.json", "f" * 16, 8, orders)
    load_WLE = np.random.default_rng(0).integers(0, 99, (3, 2, 8))
    info = TraceInfo("m", 2, 8, 2, (0, 1), kind="counts")
    new_WLE = np.stack([load_WLE[:, layer, order_LE[layer]] for layer in range(2)], axis=1)
    with TraceWriter(tmp_path / "c", info, relabelled=relabelled) as writer:
        writer.add_counts(["a", "b", "c"], new_WLE)
    assert (RoutingTrace.open(tmp_path / "c").load_counts()[1] == load_WLE).all()
    with TraceWriter(tmp_path / "t", replace(info, kind="tokens", empty_slots=True), relabelled=relabelled) as writer:
        writer.add("r", np.array([[[0, 8], [7, 8]]]))
        with pytest.raises(InputError, match="expert id 9 is outside 0..8"):
            writer.add("s", np.array([[[0, 9], [7, 8]]]))
    assert rows(tmp_path / "t") == [[[orders[0][0], 8], [orders[1][7], 8]]]
    with pytest.raises(InputError, match="of 8 experts a layer, the routing to map back of 16"):
        TraceWriter(tmp_path / "u", replace(info, num_experts=16), relabelled=relabelled)


@pytest.fixture
def foreign(tiny: Path, tmp_path: Path) -> Path:
    """A trace whose ids are in the order of a plan."""
    _, of_placed = served(tiny, tmp_path)
    import_trace("sglang", [of_placed], tmp_path / "t", ImportOptions(model_config=str(tiny / "placed")))
    file = tmp_path / "t" / "trace.json"
    file.write_text(file.read_text().replace('"mapped_back": true', '"mapped_back": false'))
    return tmp_path / "t"


@pytest.mark.parametrize("command", ["report {p} {t}", "compare {p} {p}/. {t}", "place {t} --ranks 2 -o {t}-p"])
def test_a_trace_in_the_order_of_a_plan_is_refused(tiny: Path, foreign: Path, command: str) -> None:
    result = CliRunner().invoke(app, command.format(p=tiny / "p", t=foreign).split())
    assert isinstance(result.exception, InputError)
    assert "numbering in trace.json is the order of plan" in str(result.exception)


def test_numberings_are_not_mixed(tiny: Path, tmp_path: Path) -> None:
    of_m, of_placed = served(tiny, tmp_path)
    more = [json.loads(of_placed.read_text()) for _ in range(2)]
    again = write_lines(tmp_path / "again.jsonl", more)

    def add(out: str, file: Path, model: str | None) -> None:
        config = None if model is None else str(tiny / model)
        import_trace("sglang", [file], tmp_path / out, ImportOptions(model_config=config, resume=True))

    add("known", of_m, "m")
    add("known", again, "placed")
    assert rows(tmp_path / "known") == 2 * rows(tmp_path / "known")[:30]
    assert isinstance(RoutingTrace.open(tmp_path / "known").info.numbering, dict)
    old = tmp_path / "old"
    add("old", of_m, "m")
    facts = json.loads((old / "trace.json").read_text())
    del facts["numbering"]  # as the version before wrote it
    (old / "trace.json").write_text(json.dumps(facts))
    before = RoutingTrace.open(old)
    assert before.info.numbering is None and before.fingerprint
    assert "not known" in run("show", old)
    with pytest.raises(InputError, match="cannot be added to"):
        add("old", again, "placed")
    assert rows(old) == rows(tmp_path / "known")[:30]


def test_damaged_orders_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "placed").mkdir()
    (tmp_path / "placed" / "config.json").write_bytes((tiny / "placed" / "config.json").read_bytes())
    facts = json.loads((tiny / "placed" / "semmoe.json").read_text())
    layer = next(iter(facts["new2old"]))
    twice = {**facts["new2old"], layer: [0, *facts["new2old"][layer][:-1]]}
    for change, message in (
        ({"layout": "sideways", "sha256": None}, "layout is 'sideways', expected"),
        ({"new2old": facts["new2old"] | {layer: facts["new2old"][layer][::-1]}}, "was changed after it was written"),
        ({"new2old": twice, "sha256": None}, f"new2old.{layer} is .* expected every expert"),
        ({"new2old": [1], "sha256": None}, "new2old is .* expected an object"),
        ({"format": "other"}, "its format is not 'semmoe-reshard'"),
    ):
        changed = {key: value for key, value in (facts | change).items() if value is not None}
        (tmp_path / "placed" / "semmoe.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            find_relabelling(str(tmp_path / "placed"))


def test_other_models_have_no_order(tiny: Path, tmp_path: Path) -> None:
    undo_reshard(tiny / "placed", tmp_path / "undone")
    for model in (str(tiny / "m"), str(tiny / "ranks"), str(tmp_path / "undone"), "demo"):
        assert find_relabelling(model) is None
    assert config_folder(str(tiny / "ranks")) == str(tiny / "ranks" / "shared")
    assert config_folder(str(tiny / "m")) == str(tiny / "m")
