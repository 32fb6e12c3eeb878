"""Refused: an answer that the router itself gives in place of the engine's, in the shape of the
OpenAI routes; and which heads of requests are refused before anything reads their body.

Two readers of one request must not disagree on where it ends, or a second request can hide in the
first one's body (request smuggling, RFC 9112 section 11.2). The router sends a body of its own
length whatever it was given, so nothing hides behind it; what is ambiguous is refused all the same.
"""

import json

Headers = list[tuple[bytes, bytes]]


class Refused(Exception):
    """An error of HTTP.

    Fields:
        status: of the answer.
        message: for the client.
        kind: `error.type` of the answer, and the label of the counter.
        retry_after: seconds, 0 for no such header.
        close: whether the connection must end: what follows on it cannot be trusted.
    """

    def __init__(self, status: int, kind: str, message: str, *, retry_after: int = 0, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.kind, self.retry_after, self.close = status, kind, retry_after, close

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]
        if self.retry_after:
            found.append((b"retry-after", b"%d" % self.retry_after))
        return [*found, (b"connection", b"close")] if self.close else found

    @property
    def body(self) -> bytes:
        return json.dumps({"error": {"message": str(self), "type": self.kind, "code": self.status}}).encode()


def stated_length(headers: Headers, raw_path: bytes) -> int:
    """Bytes of the body that a head states, 0 where it does not. Raises Refused (400) where it does
    not say in one way where the request ends or where it goes."""
    named = dict(headers)
    if len(named) < len(headers):
        names = [name for name, _ in headers]
        for name in (b"content-length", b"transfer-encoding", b"host"):
            if names.count(name) > 1:
                raise _malformed(f"{name.decode().title()} stands twice")
    length, encoding = named.get(b"content-length"), named.get(b"transfer-encoding")
    if length is not None and not length.isdigit():
        raise _malformed("Content-Length is no number")
    if encoding is not None and (length is not None or encoding != b"chunked"):
        raise _malformed("Transfer-Encoding must be chunked, once, and without Content-Length")
    if not raw_path.startswith(b"/"):
        raise _malformed("the request target is not a path")
    return int(length or 0)


def _malformed(message: str) -> Refused:
    return Refused(400, "malformed", message, close=True)


# Of one connection, not of the message (RFC 9110 section 7.6.1); the last three are ours to write.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
REWRITTEN = HOP_BY_HOP | {b"host", b"content-length", b"expect"}


def end_to_end(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    """Headers without those in `dropped` and those that Connection names. All names are in small
    letters."""
    if named := [value for name, value in headers if name == b"connection"]:
        dropped = dropped | {word.strip().lower() for value in named for word in value.split(b",")}
    return [header for header in headers if header[0] not in dropped]
