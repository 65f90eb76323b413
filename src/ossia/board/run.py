"""`ossia board`: the server. It reads, never writes, and asks nothing of any other host."""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ossia.board.runs import Runs
from ossia.config import BoardConfig
from ossia.console import counted, say
from ossia.errors import UsageError
from ossia.track.report import CHARTS
from ossia.web import render, to_json

_MOST_POINTS = 4000
_MOST_RUNS = 200


def run(config: BoardConfig) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: no such folder, or the address is taken.
    """
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"ossia board {config.folder}: no such folder")
    with serve(root.resolve(), config.host, config.port) as server:
        try:
            say(f"{counted(len(server.runs.changes()['ids']), 'run')} in {root}")
            say(f"board: http://{config.host}:{server.server_port}   (Ctrl-C ends it)")
            if not server.local:
                say("every machine that reaches this address can read these runs")
            server.serve_forever()
        except KeyboardInterrupt:
            say()


def serve(root: Path, host: str, port: int) -> BoardServer:
    """The server, bound but not yet serving. UsageError: the address cannot be had."""
    try:
        return BoardServer(root, host, port)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror}; name another, or --port 0") from error


class BoardServer(ThreadingHTTPServer):
    """`local`: listens on this machine alone, and then answers only to its own names."""

    daemon_threads = True

    def __init__(self, root: Path, host: str, port: int) -> None:
        super().__init__((host, port), _Handler)
        self.runs = Runs(root)
        self.local = ipaddress.ip_address(str(self.server_address[0])).is_loopback
        charts = [{"title": chart.title, "names": chart.names} for chart in CHARTS]
        self.page = render("ossia.board", "board.html.jinja", "board.js.jinja", root=str(root), charts=to_json(charts))

    def knows(self, host: str) -> bool:
        """Whether a request means this server: a page elsewhere could point its own name here."""
        return not self.local or urlsplit(f"//{host}").hostname in ("127.0.0.1", "localhost", "::1")


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self.server.knows(self.headers.get("Host", "")):
            self._text(HTTPStatus.FORBIDDEN, "this board answers to 127.0.0.1 and localhost only\n")
            return
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        try:
            if url.path == "/":
                self._send(self.server.page.encode(), "text/html; charset=utf-8")
            elif url.path.startswith("/report/"):
                body = self.server.runs.report(unquote(url.path.removeprefix("/report/"))).read_bytes()
                self._send(body, "text/html; charset=utf-8", {"Content-Security-Policy": "sandbox allow-scripts"})
            elif url.path == "/api/csv":
                text = self.server.runs.csv(asked.get("run", []), asked.get("metric", []))
                self._send(text.encode(), "text/csv; charset=utf-8")
            else:
                self._send(to_json(self._answer(url.path, asked)).encode(), "application/json")
        except KeyError as error:
            self._text(HTTPStatus.NOT_FOUND, f"there is no {error.args[0]} here\n")
        except ValueError as error:
            self._text(HTTPStatus.BAD_REQUEST, f"{error}\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, path: str, asked: dict[str, list[str]]) -> dict[str, Any]:
        runs, names = self.server.runs, asked.get("run", [])[:_MOST_RUNS]
        if path == "/api/runs":
            return runs.changes(int(asked.get("since", ["0"])[0]))
        if path == "/api/options":
            return {name: runs.options(name) for name in names}
        if path == "/api/metrics":
            return {name: runs.metrics(name) for name in names}
        if path == "/api/curves":
            most = min(int(asked.get("most", ["1000"])[0]), _MOST_POINTS)
            window = (float(asked["from"][0]), float(asked["to"][0])) if "from" in asked and "to" in asked else None
            return runs.curves(names, asked.get("metric", []), most, asked.get("x") == ["time"], window)
        raise KeyError(path)

    def _send(self, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _text(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""
