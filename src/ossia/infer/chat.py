"""A conversation in the terminal, or over a pipe: one line in, one reply out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ossia.cache import cache_dir
from ossia.config import InferConfig
from ossia.errors import OssiaError, UsageError
from ossia.infer.commands import run_command
from ossia.infer.engine import Engine, Sampling
from ossia.infer.session import Session
from ossia.template.history import readable
from ossia.template.messages import Message

HINT = "/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves"
PROMPT, MORE = "> ", ". "
BLOCK = '"""'
HISTORY_LINES = 1000


def chat(engine: Engine, config: InferConfig) -> None:
    """Read lines until end of input; each is a question or a command.

    Raises:
        OssiaError: at the end of a pipe in which something failed; each failure was said when it happened.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    # A width for pipes wide enough that nothing is wrapped there.
    console = Console(highlight=False, soft_wrap=True, force_terminal=sys.stdout.isatty())
    session = Session(engine, config, console)
    read = _terminal_reader(session) if interactive else lambda prompt: input()
    if interactive:
        session.note(HINT)
    failures = 0
    leaving = False
    while True:
        try:
            if interactive:
                console.print()
            entry = read_entry(read)
            leaving = False
            if entry.command:
                run_command(session, entry.text)
            elif entry.text.strip():
                session.ask(entry.text)
        except OssiaError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print()
            if leaving:
                break
            leaving = True
            session.note("(Ctrl-C again or Ctrl-D leaves)")
    if failures and not interactive:
        raise OssiaError(f"{failures} of the lines failed; what was wrong is said above")


class Entry(NamedTuple):
    """What was entered: a question, or a command with its `/`."""

    text: str
    command: bool = False


def read_entry(read: Callable[[str], str]) -> Entry:
    r"""One line, lines that end in `\` and the next, or a block between two lines of three quotes.

    Args:
        read: returns a line for a prompt; EOFError at the end of input.
    """
    line = read(PROMPT)
    if line.strip() == BLOCK:
        lines = []
        try:
            while (line := read(MORE)).strip() != BLOCK:
                lines.append(line)
        except EOFError:
            raise UsageError(f"a block that began with {BLOCK} has no end; close it with a line of {BLOCK}") from None
        return Entry("\n".join(lines))
    while line.endswith("\\"):
        line = line[:-1]
        try:
            line += "\n" + read(MORE)
        except EOFError:
            break
    word = line.strip()
    if word.startswith("//"):
        return Entry(word[1:])
    if word in ("exit", "quit", "/quit"):
        return Entry("/exit", command=True)
    return Entry(line, command=word.startswith("/"))


def _terminal_reader(session: Session) -> Callable[[str], str]:
    """`input` with line editing, and a history that lasts unless `--debug` is on."""
    try:
        import readline
    except ImportError:
        return input
    if session.config.debug:
        return input
    path = cache_dir() / "infer_history"
    try:
        _private(path)
        readline.read_history_file(path)
    except OSError as error:
        session.note(f"no history is kept: {path}: {error.strerror}")
        return input
    readline.set_history_length(HISTORY_LINES)

    def read(prompt: str) -> str:
        line = input(prompt)
        readline.write_history_file(path)
        _private(path)
        return line

    return read


def _private(path: Path) -> None:
    """Make the file where it is missing; its owner alone may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)


def ask(engine: Engine, question: str, sampling: Sampling) -> str:
    """One question, one answer; reasoning in parentheses before it, calls after it."""
    if not question.strip():
        raise UsageError("the question is empty")
    ids = engine.generate([engine.template.prompt([Message("user", question)])], sampling)[0]
    reply = engine.template.parse(ids)
    thinking = f"({reply.thinking.strip()}) " if reply.thinking.strip() else ""
    return thinking + readable(reply.content, reply.tool_calls).strip()
