"""Ranks on one machine with a network between them: a namespace per rank, joined by a bridge.

`tc tbf` shapes every link in both directions. Needs root.
"""

import subprocess
from pathlib import Path

BRIDGE = "semmoe-br"


def sh(*words: str, check: bool = True) -> None:
    subprocess.run(words, check=check, capture_output=not check)


def open_network(num_ranks: int) -> None:
    """A bridge and one namespace per rank; rank r has the address 10.77.0.(r + 1)."""
    close_network(num_ranks)
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "link", "set", BRIDGE, "up")
    for rank in range(num_ranks):
        space, outer = f"semmoe{rank}", f"semmoe-v{rank}"
        sh("ip", "netns", "add", space)
        sh("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        sh("ip", "link", "set", outer, "master", BRIDGE, "up")
        for words in (
            ["addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
        ):
            sh("ip", "-n", space, *words)


def shape_network(num_ranks: int, rate: str) -> None:
    """Limit what every rank sends (inside its namespace) and receives (at the bridge)."""
    for rank in range(num_ranks):
        for prefix, device in ((["ip", "netns", "exec", f"semmoe{rank}"], "eth0"), ([], f"semmoe-v{rank}")):
            shape = ["tbf", "rate", rate, "burst", "128kb", "latency", "300ms"]
            sh(*prefix, "tc", "qdisc", "replace", "dev", device, "root", *shape)


def sent_bytes() -> int:
    """Bytes that this process's rank has put on its link so far, headers included."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def close_network(num_ranks: int) -> None:
    for rank in range(num_ranks):
        sh("ip", "netns", "del", f"semmoe{rank}", check=False)
    sh("ip", "link", "del", BRIDGE, check=False)
