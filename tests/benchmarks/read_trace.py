"""Write, stream and load one million tokens x 48 layers x top-8, against JSON lines and one npz a request.

python tests/benchmarks/read_trace.py [--tokens 1000000]; prints one JSON object. Rows are skewed draws of 128 experts,
so they compress like real routing does. The baselines run on a twentieth of the tokens; ratios and tokens a second are
of processor time.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from semmoe.profiles.trace import RoutingTrace, TraceInfo, hash_file
from semmoe.profiles.trace_writer import TraceWriter

NUM_LAYERS, NUM_EXPERTS, TOP_K, TOKENS_PER_REQUEST = 48, 128, 8, 1000


def requests(num_tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    """Ids uint8 [T, L, K] by request; a pool of rows is drawn once, so that drawing costs little of the time."""
    rng = np.random.default_rng(0)
    pool = np.argsort(rng.random((4 * TOKENS_PER_REQUEST, NUM_EXPERTS)) ** np.linspace(1, 3, NUM_EXPERTS), axis=1)[
        :, :TOP_K
    ]
    pool = pool.astype(np.uint8)
    for index in range(num_tokens // TOKENS_PER_REQUEST):
        yield f"r{index}", pool[rng.integers(0, len(pool), (TOKENS_PER_REQUEST, NUM_LAYERS))]


def timed(function: Callable[[], object], wall: dict[str, float]) -> float:
    """Seconds of processor time, of all threads: what others do on the machine counts little. Wall time goes
    into `wall`.
    """
    start, start_wall = time.process_time(), time.perf_counter()
    function()
    wall[function.__name__] = round(time.perf_counter() - start_wall, 2)
    return time.process_time() - start


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    num_tokens = parser.parse_args().tokens
    folder = Path(tempfile.mkdtemp())
    info = TraceInfo("bench", NUM_LAYERS, NUM_EXPERTS, TOP_K, tuple(range(NUM_LAYERS)))
    sums: list[int] = []
    wall: dict[str, float] = {}

    def write() -> None:
        with TraceWriter(folder / "trace", info) as writer:
            for name, ids_TLK in requests(num_tokens):
                writer.add(name, ids_TLK)

    def stream() -> None:
        sums.append(sum(int(batch.expert_ids_TLK.sum()) for batch in RoutingTrace.open(folder / "trace").batches()))

    def load() -> None:
        assert RoutingTrace.open(folder / "trace").load().num_tokens == num_tokens

    few = max(TOKENS_PER_REQUEST, num_tokens // 20)

    def write_lines() -> None:
        with open(folder / "rows.jsonl", "w") as file:
            for name, ids_TLK in requests(few):
                file.writelines(json.dumps({"id": name, "experts": row.tolist()}) + "\n" for row in ids_TLK)

    def read_lines() -> None:
        with open(folder / "rows.jsonl") as file:
            sums.append(sum(int(np.array(json.loads(line)["experts"], np.uint8).sum()) for line in file))

    def write_npz() -> None:
        (folder / "npz").mkdir()
        for name, ids_TLK in requests(few):
            np.savez_compressed(folder / "npz" / name, ids=ids_TLK)

    def read_npz() -> None:
        sums.append(sum(int(np.load(file)["ids"].sum()) for file in (folder / "npz").iterdir()))

    try:
        result: dict[str, object] = {"tokens": num_tokens, "layers": NUM_LAYERS, "top_k": TOP_K, "start_mb": peak_mb()}
        seconds = {"write": timed(write, wall)}
        result["peak_mb_write"] = peak_mb()
        seconds["stream"] = timed(stream, wall)
        result["peak_mb_stream"] = peak_mb()
        seconds["load"] = timed(load, wall)
        result["peak_mb_load"] = peak_mb()
        parts = sorted((folder / "trace").glob("*.parquet"))
        seconds["hash"] = timed(lambda: [hash_file(part) for part in parts], {})
        result["hash_share_of_stream"] = round(seconds["hash"] / seconds["stream"], 3)
        size = sum(f.stat().st_size for f in (folder / "trace").iterdir())
        result["cpu_seconds"] = {name: round(s, 2) for name, s in seconds.items()}
        result["seconds"] = dict(wall)
        result["tokens_per_second"] = {name: int(num_tokens / s) for name, s in seconds.items()}
        result["bytes_per_id"] = round(size / (num_tokens * NUM_LAYERS * TOP_K), 3)
        naive = {
            n: timed(f, wall) for n, f in (("w", write_lines), ("r", read_lines), ("wz", write_npz), ("rz", read_npz))
        }
        assert sums[1] == sums[2]  # both baselines read the same

        def times_faster(name: str, baseline: str) -> float:
            return round((num_tokens / seconds[name]) / (few / naive[baseline]), 1)

        result["times_faster_than_json_lines"] = {
            "write": times_faster("write", "w"),
            "stream": times_faster("stream", "r"),
        }
        result["times_faster_than_npz"] = {"write": times_faster("write", "wz"), "stream": times_faster("stream", "rz")}
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
