"""An object store on this machine, moto's S3, and a proxy before it that fails now and then."""

import http.client
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Lock, Thread
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_KEPT_HEADERS = {"content-length", "content-type", "etag", "last-modified", "content-range", "accept-ranges"}


@contextmanager
def serve_s3() -> Iterator[str]:
    """Run one; yields the URL of its endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class Flaky(ThreadingHTTPServer):
    """Passes requests on; one in twenty fails, each time in another way, and one in ten takes its time.

    Attributes:
        url: of it.
        served, failed: how many requests there were, and how many of them were failed.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.served = self.failed = 0
        self.lock, self.number = Lock(), count(1)

    def handle_error(self, request, client_address) -> None:
        """Say nothing of connections that were cut."""


@contextmanager
def serve_flaky(endpoint: str) -> Iterator[Flaky]:
    """Run the proxy."""
    with Flaky(endpoint) as proxy:
        thread = Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def _pass_on(self) -> None:
        body = self._read_body()
        with self.server.lock:
            number = next(self.server.number)
            self.server.served += 1
            kind = number // 20 % 4 if number % 20 == 0 else None
            self.server.failed += kind is not None
        if number % 10 == 5:
            time.sleep(0.05)
        if kind in (0, 1):  # an error of the server, or one that asks for patience
            self._answer(500 if kind == 0 else 503, {}, b"")
            return
        if kind == 2:  # hangs up
            self.close_connection = True
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(self.server.target)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = {name: value for name, value in answer.getheaders() if self._is_kept(name)}
        finally:
            connection.close()
        if kind == 3 and self.command == "GET":  # hangs up in the middle
            content = content[: len(content) // 2]
            self.close_connection = True
        self._answer(answer.status, kept, content)

    def _is_kept(self, name: str) -> bool:
        return name.lower() in _KEPT_HEADERS or name.lower().startswith("x-amz")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
