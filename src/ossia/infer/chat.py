"""A conversation in the terminal, or over a pipe: one line in, one reply out."""

from __future__ import annotations

import contextlib
import sys

from rich.console import Console
from rich.text import Text

from ossia.config import InferConfig
from ossia.errors import UsageError
from ossia.infer.engine import Engine, Sampling
from ossia.template.messages import Message

HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


def chat(engine: Engine, config: InferConfig) -> None:
    """Read lines until end of input; each is a turn."""
    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens)
    # A width for pipes wide enough that nothing is wrapped there.
    console = Console(highlight=False, soft_wrap=True)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing and history
        console.print(HELP, style="dim")
    messages: list[Message] = []
    while (line := _read(terminal)) is not None:
        word = line.strip()
        if not word:
            continue
        if word in ("/exit", "/quit", "exit", "quit"):
            return
        if word == "/reset":
            messages = []
        elif word.startswith("/"):
            console.print(f"unknown command {word.split()[0]}: {HELP}", style="dim")
        else:
            messages.append(Message("user", line))
            reply = _answer(engine, messages, sampling, console, config.stream)
            if reply is None:
                messages.pop()
            else:
                messages.append(reply)


def _read(terminal: bool) -> str | None:
    try:
        return input("\n> " if terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        if terminal:
            return None
        raise


def _answer(
    engine: Engine, messages: list[Message], sampling: Sampling, console: Console, stream: bool
) -> Message | None:
    prompt = engine.template.prompt(messages)
    printer = _Printer(console)
    splitter = engine.template.stream()

    def show(token: int) -> None:
        for channel, text in splitter.push(token):
            printer.write(channel, text)

    try:
        ids = engine.generate([prompt], sampling, show if stream else None)[0]
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
        return None
    if not stream:
        for token in ids:
            show(token)
    for channel, text in splitter.flush():
        printer.write(channel, text)
    console.print()
    reply = engine.template.parse(ids)
    if not reply.finished:
        console.print(f"(cut at --max_new_tokens {sampling.max_new_tokens})", style="dim")
    return Message("assistant", reply.content, reply.thinking or None, reply.tool_calls)


class _Printer:
    """Reasoning dim, the answer plain, a line break between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.channel: str | None = None

    def write(self, channel: str, text: str) -> None:
        if self.channel is not None and channel != self.channel:
            self.console.print()
        self.channel = channel
        self.console.print(Text(text, style="" if channel == "final" else "dim"), end="")
        self.console.file.flush()


def ask(engine: Engine, question: str, sampling: Sampling) -> str:
    """One question, one answer; reasoning in parentheses before it."""
    if not question.strip():
        raise UsageError("the question is empty")
    ids = engine.generate([engine.template.prompt([Message("user", question)])], sampling)[0]
    reply = engine.template.parse(ids)
    thinking = f"({reply.thinking.strip()}) " if reply.thinking.strip() else ""
    return thinking + reply.content.strip()
