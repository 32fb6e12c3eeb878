"""The cost model by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.solvers.placement import Topology
from semmoe.solvers.time.layer_time import LayerWork, Network, exchange_seconds, fit_network, layer_seconds
from semmoe.solvers.time.links import communication_seconds_L, exchange_seconds_L, parse_links, through_nodes


def test_an_exchange_is_latency_and_bytes() -> None:
    assert exchange_seconds(100, 1000, Network(1e6, 0.01)) == pytest.approx(0.11)


def test_a_layer_is_three_exchanges_and_the_busiest_experts() -> None:
    # 2 rows per token on the busiest of 4 ranks: 200 rows out (100 bytes each) and back (50).
    # 400 * 2 / 4 activations per rank, 1.5 times that on the busiest.
    work = LayerWork(tokens=400, num_ranks=4, row_bytes=100, result_bytes=50, top_k=2, seconds_per_activation=1e-4)
    network = Network(1e6, 0.001)
    assert layer_seconds(2.0, 1.5, work, network) == pytest.approx(3 * 0.001 + 0.02 + 0.01 + 300 * 1e-4)
    # Its own tokens' take 15 ms of the 21 that rows travel; or 24, longer than those.
    assert layer_seconds(2.0, 1.5, work, network, 0.5) == pytest.approx(2 * 0.001 + 0.021 + 0.01 + 150 * 1e-4)
    assert layer_seconds(2.0, 1.5, work, network, 0.8) == pytest.approx(2 * 0.001 + 0.03 + 0.01)


def test_a_network_is_found_again() -> None:
    sizes = np.array([1e3, 1e5, 1e6])
    network = fit_network(sizes, 0.002 + sizes / 2e7)
    assert network.bytes_per_s == pytest.approx(2e7) and network.latency_s == pytest.approx(0.002)


@pytest.mark.parametrize(("bandwidth", "latency"), [(0.0, 0.0), (-1.0, 0.0), (1e6, -1e-3), (float("nan"), 0.0)])
def test_impossible_links_are_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(InputError, match="bandwidth must be positive"):
        Network(bandwidth, latency)


NODES = Topology(4, 2)
# Rank 0 sends 3 rows to its neighbour and 2 to each rank of the other node; rank 3 sends 1 row to
# rank 0.
ROWS_LRR = np.array([[[9, 3, 2, 2], [0, 9, 0, 0], [0, 0, 9, 0], [1, 0, 0, 9]]], np.float64)


def test_an_exchange_ends_with_the_busiest_port() -> None:
    # 1 GB rows: 7 leave rank 0.
    assert exchange_seconds_L(ROWS_LRR, 1e9, parse_links("2", "", NODES)).tolist() == [3.5]
    # Two ports: 3 rows at 3 GB/s beside 4 rows at 0.5 GB/s; the latencies are those of the ports.
    links = parse_links("3:0.5", "1e6:2e6", NODES)
    assert exchange_seconds_L(ROWS_LRR, 1e9, links).tolist() == [pytest.approx(2 + 8)]
    assert exchange_seconds_L(ROWS_LRR, 1e9, parse_links("3:40", "1e6:0", NODES)).tolist() == [pytest.approx(1 + 1)]
    # Sizes, dispatch, combine.
    seconds_L = communication_seconds_L(ROWS_LRR, links, row_bytes=1e9, result_bytes=5e8)
    assert seconds_L.tolist() == [pytest.approx(2 + (2 + 8) + (2 + 4))]


def test_links_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    file.write_text(json.dumps({"intra": {"gb_per_s": 3}, "inter": {"gb_per_s": 0.5, "latency_us": 2e6}}))
    links = parse_links(str(file), "", NODES)
    assert exchange_seconds_L(ROWS_LRR, 1e9, links).tolist() == [pytest.approx(2 + 8)] and not links.is_uniform
    # One port, a bandwidth for every pair: 3 / 3 + 2 / 1 + 2 / 4 seconds.
    rate_RR = [[0, 3, 1, 4], [1] * 4, [1] * 4, [1] * 4]
    file.write_text(json.dumps({"gb_per_s": np.maximum(rate_RR, 0.1).tolist(), "latency_us": 0}))
    assert exchange_seconds_L(ROWS_LRR, 1e9, parse_links(str(file), "", NODES)).tolist() == [pytest.approx(3.5)]


@pytest.mark.parametrize(
    ("bandwidth", "latency", "nodes", "message"),
    [
        ("fast", "", 1, "--topology-bandwidth fast: expected GB/s"),
        ("nan", "", 1, "--topology-bandwidth nan: expected GB/s"),
        ("1:2:3", "", 2, "--topology-bandwidth 1:2:3: expected GB/s"),
        ("400:50", "", 1, "the plan has one node"),
        ("0", "", 1, "bandwidths must be positive"),
        ("5", "-1", 1, "latencies not negative"),
        ("/nowhere.json", "", 1, "/nowhere.json cannot be read: No such file"),
        ('{"gb_per_s": [[1, 2]]}', "", 1, "a value of shape .1, 2., expected a number or a 4 x 4 matrix"),
        ('{"gb_per_s": "fast"}', "", 1, "holds numbers or square matrices"),
        ('{"cost": 1}', "", 1, 'expected an object with "gb_per_s"'),
        ('{"gb_per_s": 1}', "5", 1, "holds the latencies"),
    ],
)
def test_other_links_are_refused(tmp_path: Path, bandwidth: str, latency: str, nodes: int, message: str) -> None:
    if bandwidth.startswith("{"):
        (tmp_path / "links.json").write_text(bandwidth)
        bandwidth = str(tmp_path / "links.json")
    with pytest.raises(InputError, match=message):
        parse_links(bandwidth, latency, Topology(4, nodes))


def test_a_row_enters_a_node_once() -> None:
    # Rank 0 needs ranks 2 and 3 for the same token: one row to rank 2, which passes it on to rank
    # 3.
    rows_LRR = np.zeros((1, 4, 4))
    rows_LRR[0, 0, 2:] = 1
    rows_LRN = np.zeros((1, 4, 2))
    rows_LRN[0, 0, 1] = 1
    assert {tuple(pair): 1.0 for pair in np.argwhere(through_nodes(rows_LRR, rows_LRN, NODES)[0]).tolist()} == {
        (0, 2): 1.0,
        (2, 2): 1.0,  # stays there
        (2, 3): 1.0,
    }


def report(*words: object) -> dict:
    result = CliRunner().invoke(app, ["report", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cost")
    write_synthetic(root / "t", SyntheticWorld(num_layers=3, num_requests=60, tokens_per_request=30))
    for dispatch in ("per-rank", "per-node"):
        words = ["place", root / "t", "--ranks", 4, "--nodes", 2, "--no-refit", "--dispatch", dispatch]
        assert CliRunner().invoke(app, [*map(str, words), "-o", str(root / dispatch)]).exit_code == 0
    return root


def test_report_times_every_row_from_its_link(made: Path) -> None:
    asked = ["--hidden-size", 1000, "--batch-tokens", 400]
    found = report(made / "per-rank", made / "t", *asked, "--topology-bandwidth", "0.1", "--latency", "50")
    times = found["times"]
    assert [(r["placement"], r["schedule"]) for r in times["rows"]] == [
        (r["placement"], r["schedule"]) for r in found["rows"]
    ]
    for number, (timed, scored) in enumerate(zip(times["rows"], found["rows"], strict=True)):
        # 100 tokens per rank, 2,000 bytes each way, 3 latencies.
        assert timed["ms_per_layer"] == pytest.approx(0.15 + scored["link"] * 100 * 4000 / 1e8 * 1e3)
        assert timed["ms_layers"][2] == pytest.approx(0.15 + found["layers"][2]["rows"][number]["link"] * 4)


@pytest.mark.parametrize("dispatch", ["per-rank", "per-node"])
def test_links_that_differ_are_timed_from_rows_between_ranks(made: Path, tmp_path: Path, dispatch: str) -> None:
    asked = [made / dispatch, made / "t", "--hidden-size", 1000, "--topology-bandwidth"]
    alike = report(*asked, "0.1")["times"]["rows"]
    # All but alike: the same times within rounding, from counts of rows between all pairs.
    file = tmp_path / "links.json"
    rate_RR = np.full((4, 4), 0.1)
    rate_RR[0, 1] = 0.1 * (1 + 1e-9)
    file.write_text(json.dumps({"gb_per_s": rate_RR.tolist()}))
    pairs = {(r["placement"], r["schedule"]): r["ms_per_layer"] for r in report(*asked, file)["times"]["rows"]}
    assert ("plan", "tp-context") in pairs and ("plan", "dp-oracle") not in pairs
    slow = {(r["placement"], r["schedule"]): r["ms_per_layer"] for r in report(*asked, "1000:0.1")["times"]["rows"]}
    for row in alike:
        if (key := (row["placement"], row["schedule"])) in pairs:
            assert slow[key] <= pairs[key] * (1 + 1e-6)
            if dispatch == "per-rank":
                assert pairs[key] == pytest.approx(row["ms_per_layer"], rel=1e-6)
            elif key[1] == "random":  # LINK per node is the rows between nodes, spread over the ranks of the node
                assert slow[key] == pytest.approx(row["ms_per_layer"], rel=0.2)


def test_times_are_shown_and_latency_needs_a_bandwidth(made: Path) -> None:
    words = ["report", str(made / "per-rank"), str(made / "t"), "--hidden-size", "64"]
    shown = CliRunner().invoke(app, [*words, "--topology-bandwidth", "400:50", "--latency", "5:20"])
    assert re.search(r"400 GB/s inside a node, 50 GB/s between nodes, latency 5 us and 20 us", shown.stdout), (
        shown.stdout
    )
    assert re.search(r"contiguous +random +\S+ +\S+ +1\.00", shown.stdout), shown.stdout
    assert CliRunner().invoke(app, [*words, "--latency", "5"]).exit_code == 2
