"""A user's mistake is one line, a bug is a traceback: on a rank, and inside the calls of another
package."""

import pytest
import torch
from cases import rank_cases

from semmoe.profiles.capture.loading import refusals
from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import ExchangeError, naming
from semmoe.runtime.ranks.launch import RankError, launch
from semmoe.runtime.serving.batch import padded
from semmoe.solvers.placement import Topology


def test_the_traceback_of_a_rank_reaches_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        launch(rank_cases.meet_a_bug, (1,), 2)
    text = str(caught.value)
    assert text.startswith("rank 1 failed:\nTraceback") and "in meet_a_bug" in text
    assert text.rstrip().endswith("KeyError: 'no such key'")
    assert "Traceback" not in capfd.readouterr().err  # once, not once for every rank


def test_only_what_others_raise_is_a_refusal() -> None:
    with pytest.raises(InputError, match="^m cannot be loaded: .*No such file.*$"), refusals("m cannot be loaded"):
        torch.load("/nowhere")
    with pytest.raises(ValueError, match="empty"), refusals("m cannot be loaded"):
        padded([])  # a bug of ours, whoever calls it
    with pytest.raises(InputError, match="^(?!m cannot)"), refusals("m cannot be loaded"):
        Topology(0)


def test_only_errors_of_collectives_name_rank_and_step() -> None:
    with pytest.raises(ExchangeError, match="^rank 3: the step failed: Connection closed$"), naming(3, "the step"):
        raise RuntimeError("Connection closed")
    for error in (KeyError("k"), MemoryError(), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error)), naming(3, "the step"):
            raise error
