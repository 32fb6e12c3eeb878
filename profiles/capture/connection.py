"""A server that is asked over HTTP: JSON out, JSON back, with patience for one that is busy.

Standard library only; one connection per thread is kept open.
"""

import http.client
import json
import os
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from semmoe.profiles.errors import InputError

API_KEY = "SEMMOE_API_KEY"  # sent as Bearer, where it is set
TRIES = 8  # of a request that the server is too busy for
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
TIMEOUT_S = 600.0  # without a byte
BUSY = (429, 503)
MOST_ANSWER_BYTES = 1 << 30


class GoneError(InputError):
    """The server cannot be reached, also after waiting."""


class Refusal(InputError):
    """The server answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Connection:
    """Where a server is. `stop` is set to end all waiting."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"--server {self.url}: expected an address such as http://127.0.0.1:8000")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._local = threading.local()

    def get(self, path: str) -> bytes:
        """The body of a page. Raises as `post` does."""
        return self._ask("GET", path, None, {})

    def get_json(self, path: str) -> Any:
        """The value of a page, None where it is not JSON. Raises as `post` does."""
        try:
            return json.loads(self.get(path))
        except ValueError:
            return None

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The answer to a JSON body. Raises GoneError where nobody answers, and Refusal for a
        status that is no success, or what is no JSON object."""
        data = json.dumps(body).encode()
        answer = self._ask("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            value = json.loads(answer)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(f"{self.url}{path} answered what is no JSON object: {answer[:80]!r}", 200)
        return value

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> bytes:
        wait, problem = FIRST_WAIT_S, ""
        for attempt in range(TRIES):
            asked_to_wait = 0.0
            try:
                status, reply, answer = self._once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                self._local.connection = None
                problem = str(error) or type(error).__name__
                if isinstance(error, ssl.SSLError):
                    break
            else:
                if status < 300:
                    return answer
                if status not in BUSY:
                    raise Refusal(f"{self.url}{path} answered {status}: {_said(answer)}", status)
                problem, asked_to_wait = f"it answers {status}: {_said(answer)}", _seconds(reply)
            if attempt + 1 < TRIES and self.stop.wait(min(max(wait, asked_to_wait), LONGEST_WAIT_S)):
                break
            wait *= 2
        raise GoneError(f"{self.url} cannot be used: {problem}")

    def _once(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Status, Retry-After and body."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = self._local.connection = kind(self._host, self._port, timeout=self.timeout_s)
        key = os.environ.get(API_KEY)
        headers = {**headers, **({"Authorization": f"Bearer {key}"} if key else {})}
        connection.request(method, self._path + path, body, headers)
        response = connection.getresponse()
        answer = response.read(MOST_ANSWER_BYTES)
        if response.will_close:
            self._local.connection = None
        return response.status, response.getheader("Retry-After", ""), answer


def _seconds(text: str) -> float:
    """Of a Retry-After header; 0 for none, or a date."""
    return float(text) if text.isdigit() else 0.0


def _said(answer: bytes) -> str:
    """What an error says, on one line."""
    try:
        value = json.loads(answer)
        error = value.get("error", value) if isinstance(value, dict) else value
        said = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    except ValueError:
        said = answer.decode(errors="replace")
    return " ".join(str(said).split())[:200]
