"""`ossia serve`: checks what is asked for, takes the port, loads the models, answers until it is stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ossia.adapters.files import check_adapter
from ossia.config import InferConfig
from ossia.config.serve import ServeConfig
from ossia.console import counted, say
from ossia.errors import OssiaError, UsageError
from ossia.infer.run import model_of, template_of
from ossia.template.base import Template
from ossia.train.folder import run_of

if TYPE_CHECKING:
    from ossia.infer.engine import Engine

KEY = "OSSIA_API_KEY"
LAST_STEP = 2.0
"""Seconds that the engine has to come to the end of its step."""
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    key = _key(config)
    if config.backend == "vllm":
        from ossia.serve.vllm import run_vllm

        run_vllm(config, key)
        return
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise OssiaError(f"ossia serve needs {', '.join(missing)}; pip install 'ossia[serve]'")
    names = named_adapters(config.adapters)
    with listen(config) as opened:
        base, templates, load = prepare(config, names)
        if config.dry_run:
            say(config.to_yaml().rstrip())
            say(f"would serve {', '.join([*names, base])} at {url(config.host, opened)}")
            return
        serve(load(), templates, config, base, opened, key)


def _key(config: ServeConfig) -> str | None:
    """The API key, from the options or the environment; UsageError where one is needed and missing."""
    key = config.api_key or os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY} must be printable ASCII")
    if key is None and not _is_local(config.host):
        raise UsageError(
            f"--host {config.host} can be reached from other machines, so a key is needed: set {KEY}, or give --api_key"
        )
    return key


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(config: ServeConfig) -> socket.socket:
    """A socket that holds the port; clients are refused until it is listened on.

    Raises:
        UsageError: an address that is not this machine's.
        OssiaError: a port in use, or not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {config.host}: no such address ({error})") from error
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise OssiaError(f"--port {config.port} is in use; stop what listens there, or take another") from error
        raise OssiaError(f"cannot listen on {config.host} port {config.port} ({error.strerror})") from error
    return opened


def url(host: str, opened: socket.socket) -> str:
    """Where clients find the server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}"


def named_adapters(words: list[str]) -> dict[str, Path]:
    """Model name → folder of each of `--adapters`; UsageError where a folder is none, or two have one name."""
    found: dict[str, Path] = {}
    for word in words:
        given, equals, rest = word.partition("=")
        named = bool(equals) and NAME.fullmatch(given) is not None and not Path(word).is_dir()
        folder = check_adapter(rest if named else word)
        # checkpoint-42 says little without its run.
        own = f"{folder.parent.name}/{folder.name}" if run_of(folder) else folder.name
        name = given if named else own
        if name in found:
            raise UsageError(f"--adapters: two are called {name}; name them, as in --adapters one=DIR two=DIR")
        found[name] = folder
    return found


def prepare(
    config: ServeConfig, adapters: dict[str, Path]
) -> tuple[str, dict[str | None, Template], Callable[[], Engine]]:
    """(name of the base, template of each model, what loads the engine); what is wrong with names and files is said
    here."""
    from ossia.adapters.origin import check_origin

    shared = {field.name for field in dataclasses.fields(InferConfig)} & set(config.to_dict())
    options = {name: value for name, value in config.to_dict().items() if name in shared}
    # Each adapter's run settles its template, as in ossia infer; the base is asked as the first adapter is.
    templates: dict[str | None, Template] = {}
    for name, path in adapters.items():
        _, templates[name] = template_of(InferConfig(**{**options, "adapters": [str(path)]}))
    infer = InferConfig(**{**options, "adapters": [str(path) for path in adapters.values()]})
    folder, template = template_of(infer)
    templates[None] = template
    for path in adapters.values():
        check_origin(path, folder)
    base = config.base_name(folder)
    if base in adapters:
        raise UsageError(f"--adapters: {base} is the base model's name; name the adapter, as in --adapters mine=DIR")

    def load() -> Engine:
        from ossia.adapters.io import load_adapters
        from ossia.infer.engine import Engine

        infer.adapters = []
        model = model_of(infer, folder)
        peft = {name: f"adapter_{place}" for place, name in enumerate(adapters)}
        if adapters:
            model = load_adapters(model, {peft[name]: path for name, path in adapters.items()})
        return Engine(
            model, template, adapters=peft, max_batch_size=config.max_batch_size, max_length=config.max_length
        )

    return base, templates, load


def serve(
    engine: Engine,
    templates: dict[str | None, Template],
    config: ServeConfig,
    base: str,
    opened: socket.socket,
    key: str | None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; a second one leaves at once.

    Args:
        engine: with every model.
        templates: by adapter, and None for the base.
        config: the limits.
        base: name of the base model.
        opened: what `listen` gave.
        key: see `build_app`.

    Raises:
        OssiaError: the engine broke down.
    """
    import uvicorn

    from ossia.serve.app import build_app
    from ossia.serve.errors import ApiError
    from ossia.serve.service import Service

    service = Service(engine, templates, config, base)
    where = url(config.host, opened)

    class Server(uvicorn.Server):
        """Lets running answers finish before it closes its doors, and says 503 meanwhile."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            loop = asyncio.get_running_loop()
            service.worker.on_broken = lambda: setattr(self, "should_exit", True)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.leave)
            say(f"models: {', '.join(service.models)}")
            say(f"ready: {where}/v1 (chat page: {where}/)")

        def leave(self) -> None:
            if service.stopping:
                self.should_exit = True
                service.worker.abandon(ApiError(503, "the server was stopped", code="stopping"))
                return
            service.stopping = True
            say(f"stopping: {counted(service.worker.unfinished, 'answer')} running (again: at once)")
            self.drain = asyncio.create_task(self.finish())

        async def finish(self) -> None:
            loop = asyncio.get_running_loop()
            until = loop.time() + config.shutdown_timeout
            while service.worker.unfinished and loop.time() < until:
                await asyncio.sleep(0.05)
            service.worker.abandon(ApiError(503, "the server was stopped", code="stopping"))
            self.should_exit = True

    options = uvicorn.Config(
        build_app(service, key),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )
    # What is loaded by now stays: collections while serving, and at the end, need not walk through it.
    gc.freeze()
    Server(options).run(sockets=[opened])
    if service.worker.broken:
        raise OssiaError(f"the engine has failed: {service.worker.broken}")
    say("stopped")
    if not service.worker.stop(LAST_STEP):
        # A thread of torch that is still at work would abort the process at the interpreter's end.
        os._exit(0)
