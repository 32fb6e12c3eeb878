"""The collectives of Attention-TP on real ranks: small slices go directly, large ones around a
ring, with the same result."""

import pytest
from cases import slice_cases

from semmoe.runtime.ranks.launch import launch


@pytest.mark.parametrize(("ranks", "hidden"), [(1, 8), (2, 8), (4, 8), (4, 128)])
def test_slices_are_summed_and_gathered(monkeypatch: pytest.MonkeyPatch, ranks: int, hidden: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = launch(slice_cases.compare_slices, (hidden,), ranks)
    is_large = float(hidden == 128)
    assert found.pop("float32 ring") == found.pop("bfloat16 ring") == is_large
    limits = {
        name: 1e-6 if "float32" in name else 0.02 if "sums" in name or "gathered" in name else 0 for name in found
    }
    assert {name: value for name, value in found.items() if value > limits[name]} == {}
