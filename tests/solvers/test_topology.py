"""Topologies from JSON matrices and from nvidia-smi text."""

from pathlib import Path

import pytest

from semmoe.profiles.errors import InputError
from semmoe.solvers.topology import read_topology

SMI = """\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tSYS\tPXB\t0-47\t0
GPU1\tNV18\t X \tSYS\tSYS\tPXB\t0-47\t0
GPU2\tSYS\tSYS\t X \tPIX\tSYS\t48-95\t1
GPU3\tSYS\tSYS\tPIX\t X \tSYS\t48-95\t1
NIC0\tPXB\tPXB\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def test_smi_text(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text(SMI)
    topology = read_topology(tmp_path / "topo.txt", num_ranks=4, num_nodes=2)
    assert topology.cost_RR is not None
    assert topology.cost_RR.tolist() == [[0, 1 / 18, 10, 10], [1 / 18, 0, 10, 10], [10, 10, 0, 4], [10, 10, 4, 0]]
    assert topology.num_nodes == 2


def test_json_matrix(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text('{"cost": [[0, 2.5], [1, 0]]}')
    topology = read_topology(tmp_path / "cost.json", num_ranks=2)
    assert topology.cost_RR is not None and topology.cost_RR.tolist() == [[0, 2.5], [1, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 1], [1]]", "square matrix"),
        ("[[0, -1], [1, 0]]", "negative"),
        ("[[1, 1], [1, 0]]", "to itself"),
        ("[[0, 1], [1, 0]", "not JSON"),
        ("[[0]]", "describes 1 ranks"),
        ("hello", "neither"),
        (SMI.replace("PIX", "WAT"), "unknown link 'WAT'"),
        (SMI.replace("GPU3\tSYS", "GPU4\tSYS"), "row of GPU3"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=message):
        read_topology(tmp_path / "file", num_ranks=2)
