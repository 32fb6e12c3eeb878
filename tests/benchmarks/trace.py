"""Speed and memory of recording, as one JSON object: python tests/benchmarks/trace.py --model MODEL --texts TEXTS
[--requests N]

overhead_percent     recording against the same batched forward passes without it; each batch is run both ways in turn,
best of repeats naive_speedup        tokens/s of `semmoe trace`'s loop over one prompt at a time with
output_router_logits=True and top-k of the logits rss_growth_mib       peak memory of the whole command over 8 times as
many requests, less its peak over the base number

MODEL and TEXTS: a model with experts and a source of texts, such as the shared models' moe-16m and texts.jsonl.gz.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from semmoe.profiles.capture.batches import TokenRequest, length_batches, pad_batch
from semmoe.profiles.capture.hooks import read_batch, record_prefill, start_recording
from semmoe.profiles.capture.requests import encode_requests, read_requests
from semmoe.profiles.capture.run import TraceProgress, add_recorded, trace_info
from semmoe.profiles.capture.sources import open_source
from semmoe.profiles.trace_writer import TraceWriter


def load_requests(texts: str, tokenizer, count: int, mixed: bool) -> list[TokenRequest]:
    """The first texts; `mixed` cuts them to lengths that are log-uniform from 4 tokens to the whole."""
    texts_read = [r for r, _ in zip(read_requests(open_source(texts)), range(count), strict=False)]
    rng = np.random.default_rng(0)
    encoded = encode_requests(texts_read, tokenizer)
    lengths = [int(4 * (len(ids) / 4) ** (rng.random() if mixed else 1)) for ids in encoded]
    return [
        TokenRequest(r.request_id, r.domain, ids[:n]) for r, ids, n in zip(texts_read, encoded, lengths, strict=True)
    ]


@torch.inference_mode()
def read_plain(model, batch: list[TokenRequest]) -> None:
    ids, _ = pad_batch(batch, left=False)
    read_batch(model, torch.from_numpy(ids), None)


@torch.inference_mode()
def read_naive(model, requests: list[TokenRequest], top_k: int) -> None:
    for request in requests:
        logits = model(torch.from_numpy(request.token_ids)[None].long(), output_router_logits=True).router_logits
        [layer.topk(top_k, dim=-1).indices.numpy() for layer in logits]


def measure_overhead(
    model, requests: list[TokenRequest], batch_tokens: int, repeats: int, out: Path
) -> dict[str, float]:
    """Seconds over all batches, per batch the best of `repeats` with both ways in turn; writing parts is in the
    recorded time.
    """
    recording = start_recording(model, "model")
    info = trace_info(model, list(recording.layers), recording.top_k, name="model", embedding=None, made_by="benchmark")
    batches = list(length_batches(requests, batch_tokens))
    plain, recorded = np.full((2, len(batches)), np.inf)
    for repeat in range(repeats):
        progress = TraceProgress()
        with TraceWriter(out / f"t{repeat}", info) as writer:
            for b, batch in enumerate(batches):
                for way in (0, 1) if (b + repeat) % 2 else (1, 0):
                    start = time.perf_counter()
                    if way:
                        add_recorded(writer, record_prefill(model, recording, batch), progress)
                    else:
                        read_plain(model, batch)
                    seconds = time.perf_counter() - start
                    (recorded if way else plain)[b] = min((recorded if way else plain)[b], seconds)
            start = time.perf_counter()
            writer.flush()
            flush = time.perf_counter() - start
    return {"plain_s": plain.sum(), "recorded_s": recorded.sum(), "write_s": flush}


def peak_mib(model: str, texts: Path, out: Path) -> float:
    """Peak resident memory of the whole command in MiB."""
    code = "from semmoe.main import main; main()"
    arguments = ["trace", model, "--data", str(texts), "--dtype", "float32", "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"tracing {texts} failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        requests = load_requests(options.texts, tokenizer, options.requests, mixed=False)
        times = measure_overhead(model, requests, options.batch_tokens, options.repeats, out)
        tokens = sum(len(r.token_ids) for r in requests)
        total = times["recorded_s"] + times["write_s"]

        mixed = load_requests(options.texts, tokenizer, options.requests, mixed=True)
        recording = start_recording(model, "model")
        naive_s = batched_s = np.inf
        for _ in range(max(2, options.repeats // 2)):
            start = time.perf_counter()
            read_naive(model, mixed, recording.top_k)
            naive_s = min(naive_s, time.perf_counter() - start)
            start = time.perf_counter()
            for batch in length_batches(mixed, options.batch_tokens):
                record_prefill(model, recording, batch)
            batched_s = min(batched_s, time.perf_counter() - start)
        mixed_tokens = sum(len(r.token_ids) for r in mixed)

        peaks = []
        for copies in (8, 24):
            rows = [{"text": tokenizer.decode(r.token_ids)} for r in requests] * copies
            (out / f"{copies}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            peaks.append(peak_mib(options.model, out / f"{copies}.jsonl", out / f"m{copies}"))
    report = {
        "model": Path(options.model).name,
        "requests": len(requests),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "plain_tokens_per_s": round(tokens / times["plain_s"]),
        "recorded_tokens_per_s": round(tokens / total),
        "overhead_percent": round(100 * (total / times["plain_s"] - 1), 2),
        "mixed_tokens": mixed_tokens,
        "mixed_length_median": int(np.median([len(r.token_ids) for r in mixed])),
        "naive_tokens_per_s": round(mixed_tokens / naive_s),
        "batched_tokens_per_s": round(mixed_tokens / batched_s),
        "naive_speedup": round(naive_s / batched_s, 2),
        "peak_mib": [round(p) for p in peaks],
        "rss_growth_mib": round(peaks[1] - peaks[0]),
        "own_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
