"""The HTTP side: paths, who may ask, how much, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ossia import __version__
from ossia.config.base import parse_bytes
from ossia.serve.chat import answer_chat, chat_ask, stream_chat
from ossia.serve.completions import answer_completion, completion_ask, stream_completion
from ossia.serve.errors import ApiError
from ossia.serve.fields import WRONG_FIELD
from ossia.serve.metrics import CONTENT_TYPE
from ossia.serve.responses import answer_response, response_ask, stream_response
from ossia.serve.schema import ChatRequest, CompletionRequest, ResponsesRequest
from ossia.serve.service import Ask, Run, Service

OPEN_PATHS = ("/", "/health")
PATHS = (*OPEN_PATHS, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses")
BODY_SECONDS = 60
"""A body that takes longer to arrive is refused."""
SEND_SECONDS = 60
"""A client that takes nothing for so long is given up."""

_LOCAL_NAME = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


def build_app(service: Service, key: str | None) -> FastAPI:
    """The application.

    Args:
        service: the models.
        key: what clients must show; None: only programs and pages of this machine may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield

    app = FastAPI(title="Ossia", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, service=service, key=key)
    page, policy = _page()

    async def reply(
        request: Request, body: Any, ask: Ask, whole: Callable[..., Any], events: Callable[..., Any]
    ) -> Response:
        run = Run(service, ask)
        return EventStream(run, events(body, run)) if body.stream else await _whole(request, run, whole(body, run))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await reply(request, body, await chat_ask(service, body), answer_chat, stream_chat)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await reply(request, body, await completion_ask(service, body), answer_completion, stream_completion)

    @app.post("/v1/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await reply(request, body, await response_ask(service, body), answer_response, stream_response)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(service, service.model(name)[0])

    @app.get("/health")
    async def health() -> Response:
        if service.worker.broken or service.stopping:
            return JSONResponse({"status": "stopping" if service.stopping else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=policy)

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return app


class Guard:
    """Stands before everything: host, key, stop, size and form of bodies; counts answers."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None) -> None:
        self._app = app
        self._service = service
        self._key = None if key is None else key.encode()
        self._most = parse_bytes(service.config.max_body_size, "--max_body_size")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        endpoint = path if path in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            self._admit(path, headers)
            if scope["method"] == "POST":
                receive = await self._read(headers, receive)
        except ApiError as error:
            await _as_json(error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _admit(self, path: str, headers: dict[str, bytes]) -> None:
        if self._key is None:
            # A page of another site can name this machine as its own host, or post to it without being let in.
            if not _LOCAL_NAME.fullmatch(headers.get("host", b"").decode("latin-1")):
                raise ApiError(403, "without --api_key only localhost is served; the Host header names another")
        elif path not in OPEN_PATHS:
            shown = headers.get("authorization", b"")
            if not hmac.compare_digest(shown, b"Bearer " + self._key):
                wrong = "a wrong API key" if shown else "an API key is needed: Authorization: Bearer KEY"
                raise ApiError(401, wrong, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._service.stopping and path not in OPEN_PATHS:
            raise ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})

    async def _read(self, headers: dict[str, bytes], receive: Receive) -> Receive:
        """The body, whole and looked at; returns what gives it again, then what comes after it."""
        if headers.get("content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "the body must be JSON: Content-Type: application/json")
        length = headers.get("content-length", b"0")
        too_large = ApiError(413, f"the body is larger than {self._service.config.max_body_size}", code="too_large")
        if not length.isdigit() or int(length[:18]) > self._most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left")
                    body += message.get("body", b"")
                    if len(body) > self._most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_SECONDS} s to arrive") from None
        try:
            # Stricter than json.loads: bounds the depth, takes no NaN and no half characters.
            pydantic_core.from_json(bytes(body), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return again


class EventStream(Response):
    """Server-sent events for as long as the client takes them."""

    def __init__(self, run: Run, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._run = run
        self._events = events
        self._sending = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first_of(self._send(send), _leaves(receive), self._stalls())
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        async def marked(message: Message) -> None:
            self._sending = time.monotonic()
            await send(message)
            self._sending = math.inf

        await marked({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for text in events:
                await marked({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await marked({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalls(self) -> None:
        """Until the client has taken nothing for too long; a timer for each piece would cost as much as its writing."""
        while (left := self._sending + SEND_SECONDS - time.monotonic()) > 0:
            await asyncio.sleep(min(left, SEND_SECONDS))


async def _whole(request: Request, run: Run, answer: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    try:
        found = await _first_of(answer, _leaves(request.receive))
    finally:
        run.close()
    return Response(status_code=499) if found is None else JSONResponse(found)


async def _leaves(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: Coroutine[Any, Any, Any], *ends: Coroutine[Any, Any, None]) -> Any:
    """The result of `work`; None where one of `ends` came before it."""
    tasks = [asyncio.create_task(each) for each in (work, *ends)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.models[-1]
    parent = {} if name == base else {"parent": base}
    room = {"max_model_len": service.engine.max_length}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "ossia", **room, **parent}


def _page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that let it run its own script and style and nothing else."""
    page = (Path(__file__).parent / "page" / "index.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        hashes = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        ]
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _as_json(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _as_json(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Of a field that may be of several types, the one that it is of says more than those that it is not.
    first = min(error.errors(), key=lambda each: (each["type"] != WRONG_FIELD, each["type"].endswith("_type")))
    ours = first["ctx"] if first["type"] == WRONG_FIELD else {"field": "", "code": None}
    param = ""
    for step in (*filter(_is_field, first["loc"][1:]), *filter(None, [ours["field"]])):
        param += f"[{step}]" if isinstance(step, int) else f".{step}" if param else str(step)
    # pydantic's messages name what was expected and never repeat what was sent.
    between = " " if first["type"] == WRONG_FIELD else ": "
    message = f"{param}{between}{first['msg']}" if param else first["msg"]
    return _as_json(ApiError(400, message[:500], param=param[:200] or None, code=ours["code"]))


def _is_field(step: int | str) -> bool:
    """Whether a step of pydantic's path is an index or a field; others name the branch of a union."""
    return isinstance(step, int) or (re.fullmatch("[a-z_]+", step) is not None and step not in ("str", "int"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = {
        404: f"nothing at {path}; there is {', '.join(PATHS)}",
        405: f"{request.method[:20]} is not for {path}",
    }.get(error.status_code, str(error.detail))
    return _as_json(ApiError(error.status_code, message, headers=error.headers))


async def _bug(request: Request, error: Exception) -> Response:
    return _as_json(ApiError(500, "the server failed on this request; its log has the reason"))
