"""Names and links of somebody else's reshard or checkpoint never lead out of it, neither to write
nor to read."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from checkpoint_factory import make_plan, random_orders, write_checkpoint
from checkpoint_specs import per_expert_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.reshard.sidecar import hash_facts
from semmoe.runtime.reshard.undo import undo_reshard

PLAN = make_plan(random_orders(2).reshape(2, 2, 4))
FILE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", per_expert_model())


def edit(path: Path, change) -> None:
    """Change a JSON file of a reshard the way one would who wants it to be believed: hashes too."""
    facts = json.loads(path.read_text())
    change(facts)
    if "sha256" in facts:
        facts["sha256"] = hash_facts(facts)
    path.write_text(json.dumps(facts))


def rename(old: str, new: str):
    def change(facts: dict) -> None:
        facts["files"] = {new if name == old else name: entry for name, entry in facts["files"].items()}

    return change


def believe_headers(placed: Path) -> None:
    digest = hashlib.sha256((placed / "semmoe-source.json").read_bytes()).hexdigest()
    edit(placed / "semmoe.json", lambda facts: facts.update(headers_sha256=digest))


def refuse_undo(placed: Path, match: str) -> None:
    before = sorted(str(p) for p in placed.parent.rglob("*"))
    for verify in ("bytes", "none"):
        with pytest.raises(InputError, match=match) as caught:
            undo_reshard(placed, placed.parent / "back", verify=verify)
        assert "\n" not in str(caught.value)
    assert sorted(str(p) for p in placed.parent.rglob("*")) == before


NAMES = ["/tmp/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "", ".", "sub/x.safetensors", "config.json"]
NAMES += ["x.safetensors\0", "a\\..\\x.safetensors", "x\n.safetensors", ".bashrc"]


@pytest.mark.parametrize("name", NAMES)
def test_undo_writes_only_single_names(name: str, source: Path, tmp_path: Path) -> None:
    placed = tmp_path / "placed"
    reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout="ranks"))
    edit(placed / "semmoe-source.json", rename(FILE, name))
    believe_headers(placed)
    refuse_undo(placed, "semmoe-source.json: a name of 'files' is")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
@pytest.mark.parametrize("name", [*NAMES, "shared/../../x.safetensors", "other/x.safetensors", "shared//x.safetensors"])
def test_undo_reads_only_names_of_the_layout(name: str, layout: str, source: Path, tmp_path: Path) -> None:
    placed = tmp_path / "placed"
    reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout=layout))
    edit(placed / "semmoe.json", rename(FILE if layout == "permuted" else f"shared/{FILE}", name))
    refuse_undo(placed, "semmoe.json: (a name of 'files' is|files\\[)")


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("permuted", lambda f: f["files"][FILE].update(source_header_bytes=10**12), "source_header_bytes is 10000"),
        ("permuted", lambda f: f["files"][FILE].update(bytes=True), "bytes is True, expected a whole number"),
        ("permuted", lambda f: f["files"].update({FILE: 3}), "is 3, expected an object with named keys"),
        ("permuted", lambda f: f.update(num_experts=10**12), "num_experts is 10000"),
        ("permuted", lambda f: f.update(num_experts="8"), "num_experts is '8', expected"),
    ],
)
def test_numbers_of_a_sidecar_are_bounded(layout: str, change, match: str, source: Path, tmp_path: Path) -> None:
    placed = tmp_path / "placed"
    reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout=layout))
    edit(placed / "semmoe.json", change)
    refuse_undo(placed, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f["files"][FILE].update(header_bytes=10**12), "header_bytes is 10000"),
        (lambda f: f["files"][FILE].update(header_bytes="8"), "header_bytes is '8', expected"),
        (lambda f: f["files"][FILE].update(metadata=None), "metadata is None, expected"),
        (lambda f: f["files"][FILE]["tensors"].append(["x", "U8", [1], 0]), "tensors holds list, expected"),
        (lambda f: f["files"][FILE]["tensors"][0].__setitem__(2, [-1]), "tensors holds list, expected"),
        (lambda f: f.update(index=["x"]), "index is list, expected"),
        (lambda f: f.update(files={}), "files lacks 'model"),
    ],
)
def test_headers_of_the_source_are_checked(change, match: str, source: Path, tmp_path: Path) -> None:
    placed = tmp_path / "placed"
    reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout="ranks"))
    edit(placed / "semmoe-source.json", change)
    believe_headers(placed)
    refuse_undo(placed, match)


def test_links_out_of_a_reshard_are_not_followed(source: Path, tmp_path: Path) -> None:
    for layout, name in (("ranks", f"rank-000/{FILE}"), ("permuted", FILE)):
        placed = tmp_path / layout / "placed"
        placed.parent.mkdir()
        reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout=layout))
        (placed / name).rename(placed.parent / "elsewhere")
        (placed / name).symlink_to(placed.parent / "elsewhere")
        refuse_undo(placed, "is a link out of")
    placed = tmp_path / "whole" / "placed"
    placed.parent.mkdir()
    reshard_checkpoint(source, PLAN, placed, ReshardOptions(layout="ranks"))
    (placed / "shared").rename(placed.parent / "elsewhere")
    (placed / "shared").symlink_to(placed.parent / "elsewhere")
    refuse_undo(placed, "is a link out of")


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_links_out_of_a_checkpoint_pipes_and_devices_are_left_out(layout: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "custom").mkdir()
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "custom" / "code.py").symlink_to("../../secret")
    (source / "null").symlink_to("/dev/null")
    (source / "inner.json").symlink_to("tokenizer_config.json")
    os.mkfifo(source / "pipe")
    result = reshard_checkpoint(source, PLAN, tmp_path / "out", ReshardOptions(layout=layout))
    assert sorted(result.left_out) == ["custom/code.py", "notes.txt", "null", "pipe"]
    written = tmp_path / "out" / ("shared" if layout == "ranks" else "")
    assert (written / "inner.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert not any((written / name).exists() for name in result.left_out)


def test_a_config_elsewhere_and_a_pipe_for_weights_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "config.json").rename(tmp_path / "config.json")
    (source / "config.json").symlink_to("../config.json")
    with pytest.raises(InputError, match="config.json is a link out of"):
        reshard_checkpoint(source, PLAN, tmp_path / "out")
    (source / "config.json").unlink()
    (tmp_path / "config.json").rename(source / "config.json")
    os.mkfifo(source / "pipe.safetensors")
    with pytest.raises(InputError, match="pipe.safetensors is no file"):
        reshard_checkpoint(source, PLAN, tmp_path / "out")
