"""The `ossia` command: finds the command, parses its options, runs it, turns errors into exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from ossia.config.base import Config
from ossia.console import is_main_process, world_size
from ossia.errors import OssiaError, UsageError, nearest
from ossia.threads import share_cores


class Command(NamedTuple):
    """Where a command's option class and its function live (`module:name`), and its line in the help."""

    config: str
    run: str
    help: str


COMMANDS = {
    "demo": Command(
        "ossia.config:DemoConfig",
        "ossia.demo.run:run",
        "the whole job on a small real model, on this machine",
    ),
    "data preview": Command(
        "ossia.config:PreviewConfig",
        "ossia.data.preview:run",
        "show rows, tokens and which of them carry loss",
    ),
    "data check": Command(
        "ossia.config:CheckConfig", "ossia.data.check:check", "find bad, long, repeated and untrained rows"
    ),
    "data stats": Command(
        "ossia.config:StatsConfig", "ossia.data.check:stats", "lengths, languages, trained tokens, packing"
    ),
    "plan": Command(
        "ossia.config:PlanConfig",
        "ossia.plan.run:run",
        "what a run of sft will need: memory, time, disk",
    ),
    "sft": Command("ossia.config:SftConfig", "ossia.train.run:run", "fine-tune with LoRA"),
    "board": Command("ossia.config:BoardConfig", "ossia.board.run:run", "a local page over all runs in a folder"),
    "infer": Command(
        "ossia.config:InferConfig", "ossia.infer.run:run", "talk to a model, or answer the rows of a file"
    ),
    "serve": Command(
        "ossia.config:ServeConfig", "ossia.serve.run:run", "serve models over HTTP, as OpenAI's API (also: deploy)"
    ),
    "export": Command(
        "ossia.config:ExportConfig",
        "ossia.export.run:run",
        "merge an adapter into a model that runs anywhere",
    ),
    "verify": Command(
        "ossia.config:VerifyConfig", "ossia.export.verify:run", "hold an exported model against what it was made from"
    ),
    "bench": Command("ossia.config:BenchConfig", "ossia.bench.run:run", "measure training on this GPU, random weights"),
}


ALIASES = {"deploy": "serve"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    share_cores()
    code = _exit_code(list(sys.argv[1:] if argv is None else argv))
    if world_size() > 1:
        # gloo's threads can abort a process at the interpreter's end, and closing its group can wait for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_code(args: list[str]) -> int:
    debug = "--debug" in args
    try:
        return _dispatch(args)
    except OssiaError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the last stop: people get one line, --debug gets the rest
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {message}\n(--debug shows where)", file=sys.stderr)
        return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        from ossia import __version__

        print(f"ossia {__version__}")
        return 0
    name, rest = _command(args)
    command = COMMANDS[name]
    config: Config = _load(command.config).from_args(rest, prog=f"ossia {name}", description=command.help)
    _load(command.run)(config)
    return 0


def _command(args: list[str]) -> tuple[str, list[str]]:
    args = [ALIASES.get(args[0], args[0]), *args[1:]]
    two = " ".join(args[:2])
    if two in COMMANDS:
        return two, args[2:]
    if args[0] in COMMANDS:
        return args[0], args[1:]
    inner = [name for name in COMMANDS if name.startswith(args[0] + " ")]
    if inner:
        raise UsageError(f"ossia {args[0]} needs a second word: {', '.join(inner)}")
    raise UsageError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)} (commands: {', '.join(COMMANDS)})")


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Ossia: LoRA fine-tuning for gpt-oss, from data to a merged model.",
            "",
            "ossia COMMAND [--flag value …]      ossia COMMAND --help lists its flags",
            "",
            *lines,
            "",
            "Start with: ossia demo",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
