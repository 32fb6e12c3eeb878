"""A Hugging Face Hub of one process: the calls that pushing and reading data sets make, on a port
of this machine. `HF_ENDPOINT` leads to it; nothing goes over a network."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_StandInTokenOfATest0123"


class StandInHub:
    """Data sets by OWNER/NAME: content by path. `calls`: method, path and authorization of every
    request."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.calls: list[tuple[str, str, str]] = []
        self.refuse = 0  # status of every answer, where not 0

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(len(self.messages)).encode()).hexdigest()


@contextmanager
def stand_in_hub() -> Iterator[tuple[StandInHub, str]]:
    """A hub that serves until the block ends, and its address."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append((self.command, path, self.headers.get("Authorization", "")))
        if self.hub.refuse:
            return self._json({"error": f"no, {self.headers.get('Authorization', '')}"}, self.hub.refuse)
        words = path.strip("/").split("/")
        if words == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if words == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self._json({"url": f"http://{self.headers['Host']}/datasets/{name}"})
        if words[:2] == ["api", "datasets"]:
            return self._of_data_set("/".join(words[2:4]), words[4:], body)
        if words[0] == "datasets" and words[3] == "resolve":
            return self._file("/".join(words[1:3]), "/".join(words[5:]))
        self._json({"error": f"no such path: {path}"}, 404)

    def _of_data_set(self, name: str, rest: list[str], body: bytes) -> None:
        files = self.hub.repos.get(name)
        if files is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        kind = rest[0] if rest else "revision"
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "sha": self.hub.commit, "siblings": siblings, "tags": []})
        if kind == "tree":
            folder = "/".join(rest[2:])
            return self._json([self._entry(path, files) for path in files if path.startswith(folder)])
        if kind == "paths-info":
            form = body.decode()
            asked = json.loads(form)["paths"] if form.startswith("{") else [unquote(form.partition("paths=")[2])]
            return self._json([self._entry(path, files) for path in asked if path in files])
        if kind == "preupload":
            asked = json.loads(body)["files"]
            return self._json({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        assert kind == "commit", rest
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        address = f"http://{self.headers['Host']}/datasets/{name}/commit/{self.hub.commit}"
        self._json({"success": True, "commitOid": self.hub.commit, "commitUrl": address})

    def _entry(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}

    def _file(self, name: str, path: str) -> None:
        content = self.hub.repos.get(name, {}).get(path)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        status, asked = 200, self.headers.get("Range")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, content = len(content), content[int(first) : int(last) + 1 if last else None]
            status, headers["Content-Range"] = 206, f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
        self._answer(content, status, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
