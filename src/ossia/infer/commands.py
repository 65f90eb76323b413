"""What a line that starts with `/` does in a conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ossia.data.readers import decode, read_records
from ossia.errors import UsageError, nearest
from ossia.infer.batch import row_message
from ossia.infer.display import THINK
from ossia.infer.session import Session
from ossia.template.messages import EFFORTS

NONE = "-"
PARAMS = ("temperature", "top_p", "max_new_tokens", "seed")


_INPUT = """
//…  sends a text that starts with /
\\    at the end of a line goes on in the next; lines between two of \"\"\" are one text"""


class Command(NamedTuple):
    """`argument` as the help shows it; empty: it takes none."""

    argument: str
    help: str
    run: Callable[[Session, str], None]


def run_command(session: Session, line: str) -> None:
    """Run `/name argument`.

    Raises:
        OssiaError: an unknown command or a wrong argument; the conversation is as before.
        EOFError: the command to leave.
    """
    word, *rest = line.strip().split(None, 1)
    name, argument = word.removeprefix("/"), rest[0] if rest else ""
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS).replace("'", "'/", 1)
        raise UsageError(f"unknown command {word}{hint} (/help lists all; //… sends a text that starts with /)")
    command = COMMANDS[name]
    if argument and not command.argument:
        raise UsageError(f"{word} takes nothing behind it; got {argument!r}")
    command.run(session, argument)


def _help(session: Session, argument: str) -> None:
    width = max(len(f"/{name} {command.argument}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        session.note(f"{f'/{name} {command.argument}':<{width}}  {command.help}")
    session.note(_INPUT)


def _system(session: Session, argument: str) -> None:
    if argument:
        session.config = dataclasses.replace(session.config, system=None if argument == NONE else argument)
    session.note(f"system: {session.config.system or '(none)'}")


def _effort(session: Session, argument: str) -> None:
    if argument:
        session.config = dataclasses.replace(session.config, reasoning_effort=argument)
    session.note(f"reasoning_effort: {session.config.reasoning_effort}")


def _think(session: Session, argument: str) -> None:
    if argument and argument not in THINK:
        raise UsageError(f"/think got {argument!r}; it takes one of: {', '.join(THINK)}{nearest(argument, THINK)}")
    session.think = argument or session.think
    session.note(f"think: {session.think}")


def _params(session: Session, argument: str) -> None:
    if argument:
        name, _, value = argument.partition(" ")
        if name not in PARAMS:
            raise UsageError(f"/params: unknown name {name!r}{nearest(name, PARAMS)} (it has {', '.join(PARAMS)})")
        if not value.strip():
            raise UsageError(f"/params {name} needs a value")
        changed: dict[str, Any] = {name: value.strip()}
        session.config = dataclasses.replace(session.config, **changed)
        if name == "seed":
            session.reseed()
    session.note(", ".join(f"{name} {getattr(session.config, name)}" for name in PARAMS))


def _reset(session: Session, argument: str) -> None:
    session.messages.clear()
    session.note("a new conversation")


def _undo(session: Session, argument: str) -> None:
    del session.messages[_last_question(session) :]
    left = sum(message.role == "user" for message in session.messages)
    session.note(f"taken back; {left} exchanges are left")


def _last_question(session: Session) -> int:
    found = [index for index, message in enumerate(session.messages) if message.role == "user"]
    if not found:
        raise UsageError("nothing was asked yet")
    return found[-1]


def _save(session: Session, argument: str) -> None:
    path = Path(argument).expanduser()
    if path.suffix != ".jsonl":
        raise UsageError(f"/save got {argument!r}; it takes the name of a .jsonl file")
    _last_question(session)
    messages = list(map(row_message, session.conversation))
    row = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        if path.exists():
            for record in read_records(path):
                if not isinstance(decode(record), dict):
                    raise UsageError(f"/save: {record.source} is no row; name another file")
            if not (b"\n" + path.read_bytes()).endswith(b"\n"):
                row = "\n" + row
        with path.open("a", encoding="utf-8") as file:
            file.write(row)
    except OSError as error:
        raise UsageError(f"/save {path}: cannot be written ({error.strerror})") from error
    session.note(f"saved in {path}")


def _compare(session: Session, argument: str) -> None:
    until = _last_question(session) + 1
    without = session.engine.without_adapter()
    messages = session.conversation[: until + len(session.conversation) - len(session.messages)]
    for heading, context in (("with the adapter", nullcontext()), ("without the adapter", without)):
        session.console.print(f"\n{heading}:", style="bold")
        # Both draw the same random numbers.
        session.reseed()
        with context:
            session.reply(messages)


def _exit(session: Session, argument: str) -> None:
    raise EOFError


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("TEXT", f"instructions from now on; {NONE}: none; without TEXT: show them", _system),
    "effort": Command("|".join(EFFORTS), "how long the model reasons", _effort),
    "think": Command("|".join(THINK), "print reasoning, nothing of it, or one line about it", _think),
    "params": Command("NAME VALUE", f"set {', '.join(PARAMS)}; without NAME: show them", _params),
    "compare": Command("", "answer the last question with and without the adapter", _compare),
    "undo": Command("", "take back the last question and its answer", _undo),
    "reset": Command("", "start anew; settings stay", _reset),
    "save": Command("FILE.jsonl", "append the conversation as a row for ossia sft --dataset", _save),
    "exit": Command("", "leave, as Ctrl-D does", _exit),
}
