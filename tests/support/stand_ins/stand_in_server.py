"""A small HTTP server in place of an engine that returns its routing: routes, fields and errors of
vLLM 0.30 and SGLang 0.5.23, and routing that is a formula of the token."""

import base64
import collections
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K, VOCABULARY = 3, 16, 4, 400


def write_config(folder: Path) -> Path:
    """config.json of the model that the server runs."""
    facts = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": VOCABULARY,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def ids_of(text: str) -> list[int]:
    return [sum(word.encode()) % VOCABULARY for word in text.split()]


def routing(tokens: list[int]) -> np.ndarray:
    """uint8 [T - 1, L, K]: the last token is never routed."""
    tokens_T = np.array(tokens[:-1])[:, None, None]
    layer, slot = np.arange(LAYERS)[:, None], np.arange(TOP_K)
    return ((tokens_T + 3 * layer + 5 * slot) % EXPERTS).astype(np.uint8)


class StandIn(ThreadingHTTPServer):
    """What it should do wrong, and what it saw."""

    daemon_threads = True

    def __init__(self, model: Path, api: str, ranks: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.api, self.ranks = model, api, ranks
        self.records = True  # routed experts are returned
        self.reads_pins = True
        self.busy = 0  # how many requests get 503 and 429 first
        self.cut_off = 0  # how many connections are closed without an answer
        self.refused: set[str] = set()  # texts that get a 400
        self.die_after = 1 << 30  # answers
        self.seen: list[dict[str, Any]] = []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def stand_in(model: Path, *, api: str = "vllm", ranks: int = 2) -> Iterator[StandIn]:
    server = StandIn(model, api, ranks)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        server = self.server
        lines = [f'vllm:num_requests_running{{engine="{rank}",model_name="m"}} 0.0' for rank in range(server.ranks)]
        pages: dict[str, Any] = {"/v1/models": {"data": [{"id": "served", "root": str(server.model)}]}}
        if server.api == "vllm":
            pages |= {"/version": {"version": "0.30.0"}, "/metrics": "\n".join(lines).encode()}
        else:
            pages |= {"/get_model_info": {"model_path": str(server.model)}, "/server_info": {"dp_size": server.ranks}}
        if self.path in pages:
            self.reply(200, pages[self.path])
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body["prompt"] if "prompt" in body else " ".join(m["content"] for m in body["messages"])
            self.reply(200, {"tokens": ids_of(text)})
            return
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            fault = ""
            if server.cut_off:
                server.cut_off, fault = server.cut_off - 1, "cut"
            elif server.busy:
                server.busy, fault = server.busy - 1, "busy"
            elif len(server.seen) >= server.die_after:
                fault = "cut"
        try:
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
            elif fault == "busy":
                self.reply(503 if server.busy % 2 else 429, {"error": {"message": "busy"}}, Retry_After="0")
            else:
                self.answer(body)
        finally:
            with server.lock:
                server.at_once -= 1

    def answer(self, body: dict[str, Any]) -> None:
        server = self.server
        header = self.headers.get("X-data-parallel-rank")
        pin = body.get("routed_dp_rank") if server.api == "sglang" else int(header) if header else None
        if not server.reads_pins:
            pin = None
        if pin is not None and pin >= server.ranks:
            self.reply(400, {"error": {"message": f"data_parallel_rank {pin} is out of range"}})
            return
        prompt = body.get("prompt", body.get("input_ids", body.get("text")))
        if "messages" in body:
            prompt = " ".join(m["content"] for m in body["messages"])
        if isinstance(prompt, str) and prompt in server.refused:
            self.reply(400, {"error": {"message": "prompt is too long"}})
            return
        ids = ids_of(prompt) if isinstance(prompt, str) else prompt
        count = body.get("max_tokens", body.get("sampling_params", {}).get("max_new_tokens"))
        output = [(ids[-1] + 1 + i) % VOCABULARY for i in range(count)]
        time.sleep(0.02)  # so that several are under way
        with server.lock:
            server.seen.append({"prompt": prompt, "ids": ids, "pin": pin, "path": self.path})
        ids_TLK = routing(ids + output)
        self.reply(
            200, self.sglang(ids, output, ids_TLK, pin) if server.api == "sglang" else self.vllm(ids, output, ids_TLK)
        )

    def vllm(self, ids: list[int], output: list[int], ids_TLK: np.ndarray) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, ids_TLK)
        choice = {"index": 0, "token_ids": output, "prompt_token_ids": ids, "finish_reason": "length", "text": "?"}
        if self.server.records:
            choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(output)}
        return {"id": f"cmpl-{len(self.server.seen)}", "object": "text_completion", "choices": [choice], "usage": usage}

    def sglang(self, ids: list[int], output: list[int], ids_TLK: np.ndarray, pin: int | None) -> dict[str, Any]:
        meta: dict[str, Any] = {"id": "x", "prompt_tokens": len(ids), "completion_tokens": len(output)}
        meta |= {"finish_reason": {"type": "length"}, "dp_rank": 0 if pin is None else pin}
        if self.server.records:
            meta["routed_experts"] = base64.b64encode(ids_TLK.astype("<i4").tobytes()).decode()
        return {"text": "?", "output_ids": output, "meta_info": meta}


def pins_of(server: StandIn) -> collections.Counter:
    return collections.Counter(one["pin"] for one in server.seen)
