"""A run compares each file of a reshard once on a machine, and refuses one that was changed."""

from pathlib import Path

import pytest
from checkpoint_factory import make_plan, random_orders, write_checkpoint
from checkpoint_specs import per_expert_model

from semmoe.profiles.errors import InputError
from semmoe.runtime.reshard.records import ReshardOptions
from semmoe.runtime.reshard.reshard import reshard_checkpoint
from semmoe.runtime.serving.verify import entries_to_verify, my_share, verifying


def made(folder: Path, layout: str, **options: object) -> Path:
    write_checkpoint(folder / "model", per_expert_model(), shards=2)
    plan = make_plan(random_orders(2).reshape(2, 2, 4))
    reshard_checkpoint(folder / "model", plan, folder / "out", ReshardOptions(layout=layout, **options))
    return folder / "out"


@pytest.mark.parametrize("layout", ["permuted", "ranks"])
def test_every_file_is_compared_once_and_a_changed_one_refused(tmp_path: Path, layout: str) -> None:
    out = made(tmp_path, layout)
    entries, verified = entries_to_verify(out, 2, wanted=True, tell=pytest.fail)
    assert verified is True
    shares = [my_share(entries[rank], rank, rank, 2) for rank in range(2)]
    names = sorted(name for share in shares for name in share)
    assert names == sorted(str(file.relative_to(out)) for file in out.rglob("*.safetensors"))
    for share in shares:
        with verifying(out, share):
            pass
    for rank, share in enumerate(shares):
        for name in share:
            whole = (out / name).read_bytes()
            for place in (20, len(whole) - 1):  # the header, and the data
                changed = bytearray(whole)
                changed[place] ^= 1
                (out / name).write_bytes(changed)
                with pytest.raises(InputError, match=f"{name} (was changed after it was written|is damaged)"):
                    with verifying(out, my_share(entries[rank], rank, rank, 2)):
                        pass
            (out / name).write_bytes(whole)


def test_what_is_not_compared_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    out = made(tmp_path, "ranks", verify="none")
    assert entries_to_verify(tmp_path / "model", 2, wanted=True, tell=told.append) == ([{}, {}], None) and not told
    assert entries_to_verify(out, 2, wanted=False, tell=told.append) == ([{}, {}], False)
    assert entries_to_verify(out, 2, wanted=True, tell=told.append) == ([{}, {}], False)
    assert "(--no-verify)" in told[0] and "semmoe.json stores no checksums of them" in told[1]
