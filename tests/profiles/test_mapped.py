"""Arrays in a temporary file: their space is there before they are used."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from semmoe.profiles import mapped
from semmoe.profiles.errors import InputError
from semmoe.profiles.mapped import mapped_empty, open_view, view_of
from semmoe.runtime.serving.batch import Completion
from semmoe.runtime.serving.results import ResultKeeper, kept_results


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file can be larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_space_is_allocated_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "SMALL_BYTES", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = mapped_empty((1000, 1000), np.dtype(np.int32))
    view = view_of(array)
    assert view is not None and os.stat(view.path).st_blocks * 512 >= 4_000_000
    array[7] = 3
    assert (open_view(view)[7] == 3).all() and not open_view(view)[8].any()
    with largest_file(1 << 20), pytest.raises(InputError, match="has no room for 3 MiB of routing .*set TMPDIR"):
        mapped_empty((1000, 1000), np.dtype(np.int32))
    assert list(tmp_path.iterdir()) == []


class Words:
    """A tokenizer as far as results need one."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "w" * len(ids)


def test_a_full_disk_leaves_whole_lines_that_are_counted(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    keeper = ResultKeeper(str(output), Words())
    with largest_file(3000), pytest.raises(InputError, match="^cannot write .*o.jsonl.partial: File too large"):
        for index in range(100):
            keeper.add([Completion(index, f"r{index}", 0, [1] * 50, "length")])
    kept = (tmp_path / "o.jsonl.partial").read_bytes().splitlines(keepends=True)
    assert len(kept) > 3 and all(line.endswith(b"\n") for line in kept)
    assert kept_results(output, None) == f"; {len(kept)} finished requests are in {output}.partial"
