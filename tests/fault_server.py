"""A web server on this machine whose faults are chosen: over files of its own, or in front of a real server of another kind."""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOPS = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Answer:
    """What an honest server would send."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Rule:
    """A fault, for so many matching requests."""

    kind: str
    times: int
    number: int
    matches: Callable[[str, str], bool]


class FaultServer:
    """Serves `files` (path to bytes) or forwards to `upstream`; `fail` adds faults.

    Kinds: a status such as "503"; "reset" closes without an answer; "cut" sends `number` bytes of the body that it announced;
    "short" does not announce and sends `number` bytes; "whole" ignores ranges; "slow" sends `number` bytes a second; "stall"
    sends nothing after the headers until the server is closed; "late" answers after `number` milliseconds.
    """

    def __init__(self, files: dict[str, bytes] | None = None, upstream: str | None = None) -> None:
        self.files, self.upstream = files or {}, upstream
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.etag_salt = ""
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20
            disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's delayed acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                server.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # clients that give up are what these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "FaultServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def release(self) -> None:
        """End the answers that are stalled now."""
        self.closing.set()
        self.closing = threading.Event()

    def fail(self, kind: str, *, times: int = 10**9, number: int = 0, path: str = ".tar", methods: str = "GET") -> None:
        """The next `times` requests of these methods, for paths that end so, meet this fault."""
        self.rules.append(Rule(kind, times, number, lambda method, at: method in methods.split() and at.endswith(path)))

    def count(self, method: str = "GET", path: str = ".tar") -> int:
        """Requests so far."""
        return sum(made == method and at.endswith(path) for made, at, _ in self.requests)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        content = self.receive(request)
        self.requests.append((request.command, path, request.headers.get("Range")))
        self.headers.append(dict(request.headers))
        rule = next((rule for rule in self.rules if rule.times > 0 and rule.matches(request.command, path)), None)
        if rule is not None:
            rule.times -= 1
        kind = rule.kind if rule else ""
        if kind == "whole":
            del request.headers["Range"]
        if kind == "reset":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind == "late":
            self.closing.wait((rule.number if rule else 0) / 1000)
        if kind.isdigit():
            answer = Answer(int(kind))
        else:
            answer = self.forward(request, content) if self.upstream else self.serve(request, path)
        try:
            self.send(request, answer, kind, rule.number if rule else 0)
        except OSError:
            request.close_connection = True  # the client gave up

    def receive(self, request: BaseHTTPRequestHandler) -> bytes:
        """The body of a request, which may come in chunks."""
        if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = []
        while size := int(request.rfile.readline().split(b";")[0], 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        while request.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def serve(self, request: BaseHTTPRequestHandler, path: str) -> Answer:
        data = self.files.get(path)
        if data is None:
            return Answer(404)
        headers = {"ETag": f'"{hash((data, self.etag_salt)):x}"', "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if asked is None:
            return Answer(200, headers, data)
        start, stop = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1)
        return Answer(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])

    def forward(self, request: BaseHTTPRequestHandler, content: bytes) -> Answer:
        with closing(http.client.HTTPConnection(self.upstream or "", timeout=20)) as connection:
            headers = {key: value for key, value in request.headers.items() if key.lower() not in {*HOPS, "expect"}}
            connection.request(request.command, request.path, content or None, headers)
            response = connection.getresponse()
            body = response.read()
        headers = {key: value for key, value in response.getheaders() if key.lower() not in HOPS}
        if request.command == "HEAD":
            body = bytes(int(response.getheader("Content-Length") or 0))
        return Answer(response.status, headers, body)

    def send(self, request: BaseHTTPRequestHandler, answer: Answer, kind: str, number: int) -> None:
        request.send_response(answer.status)
        for key, value in answer.headers.items():
            request.send_header(key, value)
        if kind == "short" and request.command != "HEAD":
            request.send_header("Connection", "close")
            request.close_connection = True
        else:
            request.send_header("Content-Length", str(len(answer.body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if kind in {"cut", "short"}:
            request.wfile.write(answer.body[:number])
            request.close_connection = True
        elif kind == "stall":
            self.closing.wait(20)
            request.close_connection = True
        elif kind == "slow":
            for start in range(0, len(answer.body), max(1, number // 20)):
                request.wfile.write(answer.body[start : start + max(1, number // 20)])
                request.wfile.flush()
                time.sleep(0.05)
        else:
            request.wfile.write(answer.body)
