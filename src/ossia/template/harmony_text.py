"""Harmony that is text already, read back into messages: what `apply_chat_template` or openai-harmony wrote.

Rendered again, what was read gives the tokens of the text with its special tokens on, except for the layout that
docs/harmony.md lists (it is written in openai-harmony's form) and for what `dropped` names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ossia.errors import OssiaError
from ossia.template.harmony_tools import BUILTIN_SECTIONS, IDENTITY, KNOWLEDGE_CUTOFF, system_text
from ossia.template.harmony_types import CLOSER, OPENER, read_tools_section
from ossia.template.messages import BUILTIN_CALLS, EFFORTS, Message, Role, ToolCall
from ossia.template.think import split_think

NO_SYSTEM = "the lack of a system block (the usual one is written)"
"""What `dropped` says of a text without one."""
_INSTRUCTIONS = "# Instructions\n\n"
_CUTOFF, _DATE = "Knowledge cutoff: ", "Current date: "
_BETWEEN = re.compile(r"\s*(?:<\|endoftext\|>\s*)?(?:<\|start\|>|\Z)")
_INSIDE = re.compile(r"<\|(?:channel|message)\|>|(?:assistant\b\s*)?(?:to=[^<]*)?<\|channel\|>")
_HEADER = r"[^<\n]{0,200}"
_STRUCTURE = re.compile(
    rf"(?:<\|start\|>{_HEADER}(?:<\|channel\|>{_HEADER})?|<\|channel\|>{_HEADER})"
    rf"(?:<\|constrain\|>{_HEADER})?<\|message\|>"
)
_CONTROL = re.compile(r"<\|(start|message|channel|constrain|end|return|call)\|>")
_OTHER_CONTROL = re.compile(r"<\|(?:startoftext|endoftext|endofprompt|constrain|reserved_\d+)\|>")
_SECTION = re.compile(r"\n\n(?=Reasoning: |# Tools\n\n|# Valid channels: )")
_EFFORT = re.compile(r"^Reasoning: (.*)$", re.MULTILINE)
_BUILTIN = re.compile(r"^## (\w+)\n", re.MULTILINE)
_ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
_NOBODY = ("all", "user", "assistant")
_KINDS = {None, "json", "code"}


@dataclass(slots=True)
class ParsedConversation:
    """The conversation in a harmony text.

    `tools` holds functions in OpenAI's form and `{"type": "python"}`, `{"type": "browser"}` for built-in tools.
    `dropped` names, in words for a person, what of the text the messages cannot hold.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    reasoning_effort: str | None = None
    dropped: list[str] = field(default_factory=list)


class _Part(NamedTuple):
    """One harmony message. `call` is its recipient where the assistant calls a tool."""

    role: Role
    name: str | None
    channel: str | None
    call: ToolCall | None
    quoted: bool
    text: str
    place: str


def looks_like_harmony(text: str) -> bool:
    """Whether `text` holds harmony's structure: the header of a message, from `<|start|>` or a channel to its text."""
    return "<|message|>" in text and _STRUCTURE.search(text) is not None


def parse_conversation(text: str) -> ParsedConversation:
    """The conversation that a whole harmony text holds.

    The last message may lack its end token, and an `<|start|>assistant` at the end, as in a prompt, is no message.
    A text that begins inside a message (`<|channel|>…`) begins in the assistant's.

    Raises OssiaError, with the place, for text outside messages, an unknown role or channel, and tools whose types
    cannot be read back.
    """
    dropped: list[str] = []
    parts = _parts(text, dropped)
    effort: str | None = None
    tools: list[dict[str, Any]] = []
    messages: list[Message] = []
    if parts and parts[0].role == "system":
        system = parts.pop(0)
        following = parts[0].text if parts and parts[0].role == "developer" else ""
        instructions, tools, effort = _system(system.text, OPENER in following, dropped)
        if instructions is not None:
            messages.append(Message("system", instructions))
    else:
        dropped.append(NO_SYSTEM)
    if parts and parts[0].role == "developer":
        instructions, functions = _developer(parts.pop(0), dropped)
        tools += functions
        if instructions is not None:
            messages.append(Message("developer", instructions))
        elif parts and parts[0].role == "developer":
            dropped.append("the order of two developer blocks: instructions are written before tools")
    for part in parts:
        if part.role == "system":
            raise OssiaError(f"{part.place}: a second system block; harmony has one, at the start")
        if part.role == "developer" and OPENER in part.text:
            raise OssiaError(f"{part.place}: a later developer block declares tools; they belong into the first")
    messages += _messages(parts, dropped)
    return ParsedConversation(messages, tools, effort, list(dict.fromkeys(dropped)))


def parse_turn(text: str) -> list[Message]:
    """The assistant's messages that a fragment holds, and the tool results between them.

    It begins in the assistant's turn: with `<|channel|>…`, ` to=…`, or `<|start|>assistant` before that. The end token
    of the last message may be missing. Raises OssiaError as `parse_conversation`, and for a message of another role
    and for what the messages cannot hold.
    """
    dropped: list[str] = []
    parts = _parts(text, dropped)
    for part in parts:
        if part.role not in ("assistant", "tool"):
            raise OssiaError(f"{part.place}: a message of the {part.role} in an answer; give the row as harmony text")
    if not parts:
        raise OssiaError(f"the harmony text {text!r:.80} holds no message")
    messages = _messages(parts, dropped)
    if dropped:
        raise OssiaError(f"harmony text in an answer has what a message cannot hold: {'; '.join(dropped)}")
    return messages


def _parts(text: str, dropped: list[str]) -> list[_Part]:
    """The harmony messages of a text, in order."""
    parts: list[_Part] = []
    position = len(text) - len(text.lstrip().removeprefix("<|startoftext|>").lstrip())
    if not _INSIDE.match(text, position):
        position = _start(text, position)
    while position < len(text):
        opened = _next(text, position, "channel", "constrain")
        if opened is None and text[position:].strip() == "assistant":
            break
        if opened is None or opened[1] != "message":
            raise OssiaError(f"{_place(text, position)}: a header that no <|message|> ends")
        header, place = text[position : opened.start()], _place(text, position)
        closed = _next(text, opened.end(), "constrain")
        if closed is None:
            body, position = text[opened.end() :].removesuffix("<|endoftext|>"), len(text)
        elif closed[1] in ("end", "return", "call"):
            body, position = text[opened.end() : closed.start()], closed.end()
        else:
            raise OssiaError(
                f"{_place(text, closed.start())}: a message begins before <|end|> has ended the one before"
            )
        dropped += [
            f"the control token {token} in a message (it is text now)" for token in _OTHER_CONTROL.findall(body)
        ]
        part = _part(header, body, place, dropped)
        if closed is not None and closed[1] == "call" and part.call is None:
            dropped.append(f"<|call|> after a message of the {part.role} that calls nothing (another end is written)")
        parts.append(part)
        if position < len(text):
            position = _start(text, position)
    return parts


def _start(text: str, position: int) -> int:
    """Behind the next `<|start|>`, or at the end; between messages nothing but white space may stand."""
    found = _BETWEEN.match(text, position)
    if found is None:
        raise OssiaError(f"{_place(text, position)}: text outside a message; harmony goes on with <|start|>")
    return found.end()


def _next(text: str, position: int, *within: str) -> re.Match[str] | None:
    """The first control token from `position` on that is none of those that may stand `within`."""
    return next((found for found in _CONTROL.finditer(text, position) if found[1] not in within), None)


def _place(text: str, position: int) -> str:
    return f"harmony text at character {position + 1} ({text[position : position + 40]!r})"


def _part(header: str, body: str, place: str, dropped: list[str]) -> _Part:
    header_, constrained, kind = header.partition("<|constrain|>")
    about, _, behind = header_.partition("<|channel|>")
    words, after = about.split(), behind.split()
    speaker = "assistant" if not words or words[0].startswith("to=") else words.pop(0)
    before = any(word.startswith("to=") for word in words)
    channel = after.pop(0) if after else None
    recipients = [word.removeprefix("to=") for word in [*words, *after] if word.startswith("to=")]
    kinds = [*(word for word in [*words, *after] if not word.startswith("to=")), *kind.split()]
    if len(kinds) > 1 or len(recipients) > 1:
        raise OssiaError(f"{place}: the header {header!r:.120} has words that harmony does not know")
    if channel not in (None, "analysis", "commentary", "final"):
        raise OssiaError(f"{place}: channel {channel!r} is unknown; it is analysis, commentary or final")
    role, _, author = speaker.partition(":")
    recipient = recipients[0] if recipients else None
    known = next((known for known in _ROLES if known == role), None)
    if known is None:
        if recipient != "assistant" and not _is_tool(speaker):
            raise OssiaError(f"{place}: role {speaker!r} is unknown; it is one of {', '.join(_ROLES)} or a tool's name")
        return _Part("tool", speaker, channel, None, False, body, place)
    if author:
        dropped.append(f"the name {author!r} of a {role}")
    kind_ = kinds[0] if kinds else None
    if known == "assistant":
        call = None
        if recipient is not None and recipient not in _NOBODY:
            call = _call(recipient, body, channel, kind_, dropped)
        elif recipient is not None:
            dropped.append(f"the recipient {recipient!r} of an answer")
        if call is None and kind_ is not None:
            dropped.append(f"the content type {kind_!r} of an answer")
        if call is None and channel is None:
            dropped.append("the lack of a channel in an answer (final is written)")
        return _Part(known, None, channel, call, before and kind_ == "json" and not constrained, body, place)
    if recipient not in (None, *_NOBODY) or kind_ is not None:
        raise OssiaError(f"{place}: the header {header!r:.120} has words that harmony does not know")
    if channel is not None and known != "tool":
        dropped.append(f"the channel {channel} of a {known} message")
    return _Part(known, None, channel, None, False, body, place)


def _is_tool(name: str) -> bool:
    return name.startswith("functions.") or any(name in names for names in BUILTIN_CALLS.values())


def _call(recipient: str, body: str, channel: str | None, kind: str | None, dropped: list[str]) -> ToolCall:
    builtin = any(recipient in names for names in BUILTIN_CALLS.values())
    name = recipient if builtin else recipient.removeprefix("functions.")
    if not builtin and name == recipient:
        dropped.append(f"the recipient {recipient} of a call (functions.{recipient} is written)")
    usual = "analysis" if builtin else "commentary"
    if channel not in (None, usual):
        dropped.append(f"the channel {channel} of a call to {recipient} ({usual} is written)")
    if kind not in _KINDS:
        dropped.append(f"the content type {kind!r} of a call to {recipient}")
    return ToolCall(name, body, builtin)


def _system(text: str, functions: bool, dropped: list[str]) -> tuple[str | None, list[dict[str, Any]], str | None]:
    """(instructions, built-in tools, effort) of a system block; instructions where it is none of harmony's own."""
    effort = found[1] if (found := _EFFORT.search(text)) else None
    if effort is None and IDENTITY not in text and "# Valid channels:" not in text and "Knowledge cutoff:" not in text:
        dropped.append("the place of instructions in the system block (they are written into the developer block)")
        return text, [], None
    about = _SECTION.split(text)[0]
    lines = about.split("\n")
    date = lines.pop().removeprefix(_DATE) if lines[-1].startswith(_DATE) else None
    cutoff = lines.pop().removeprefix(_CUTOFF) if lines[-1].startswith(_CUTOFF) else None
    identity = "\n".join(lines)
    if identity != IDENTITY:
        dropped.append(f"the model identity {identity!r:.200} (--model_identity keeps it)")
    if cutoff not in (None, KNOWLEDGE_CUTOFF):
        dropped.append(f"the knowledge cutoff {cutoff} ({KNOWLEDGE_CUTOFF} is written)")
    if date is not None:
        dropped.append(f"the date {date} (--current_date keeps it)")
    names = _BUILTIN.findall(text) if "# Tools\n\n" in text else []
    tools = [{"type": name} for name in BUILTIN_SECTIONS if name in names]
    others = [name for name in names if BUILTIN_SECTIONS.get(name, text + name) not in text]
    dropped += [f"the words that declare the tool {name} in the system block" for name in others]
    if not others and (cutoff is None or text != system_text(about, effort or "", tools, functions=functions)):
        dropped.append("the words of a system block that are not harmony's usual ones, which are written")
    if effort is not None and effort not in EFFORTS:
        dropped.append(f"Reasoning: {effort} (it is one of {', '.join(EFFORTS)})")
        effort = None
    return None, tools, effort


def _developer(part: _Part, dropped: list[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """(instructions, functions) of the first developer block."""
    text, opener, declared = part.text.rpartition(OPENER)
    tools: list[dict[str, Any]] = []
    if opener:
        end = declared.rfind(CLOSER)
        if end < 0 or declared[end + len(CLOSER) :].strip():
            raise OssiaError(f"{part.place}: text behind the tools of a developer block; put it into the instructions")
        try:
            tools = read_tools_section(OPENER + declared[: end + len(CLOSER)])
        except OssiaError as error:
            raise OssiaError(f"{part.place}: {error}") from None
        text = text.removesuffix("\n\n")
    else:
        text = declared
    return (_instructions(text, dropped) if text else None), tools


def _instructions(text: str, dropped: list[str]) -> str:
    if not text.startswith(_INSTRUCTIONS):
        dropped.append("the lack of '# Instructions' in a developer block (it is written)")
    return text.removeprefix(_INSTRUCTIONS)


def _messages(parts: list[_Part], dropped: list[str]) -> list[Message]:
    """The parts after the opening as messages: reasoning with what it led to, a preamble with the calls behind it."""
    messages: list[Message] = []
    takes: str | None = None
    quoted = False
    for part in parts:
        if part.role != "assistant":
            text = _instructions(part.text, dropped) if part.role == "developer" else part.text
            text = _unquoted(text) if part.role == "tool" and quoted else text
            builtin = part.name is not None and not part.name.startswith("functions.")
            name = None if part.name is None else part.name.removeprefix("functions.")
            if part.role == "tool":
                _check_result(part, builtin, dropped)
            messages.append(Message(part.role, text, name=name, builtin=builtin))
            takes = None
        elif part.call is not None:
            quoted = part.quoted and not part.call.builtin
            call = replace(part.call, arguments=_unquoted(part.call.arguments)) if quoted else part.call
            if takes is None:
                messages.append(Message("assistant"))
            last = messages[-1]
            last.tool_calls, last.channel, takes = (*last.tool_calls, call), None, "calls"
        elif part.channel == "analysis":
            # Blank reasoning is none; nothing is rendered for it.
            if part.text.strip():
                messages.append(Message("assistant", thinking=part.text))
                takes = "thinking"
        else:
            if takes != "thinking" or not part.text.strip():
                messages.append(Message("assistant"))
            last = messages[-1]
            last.content = part.text
            if last.thinking is None and split_think(part.text)[0] is not None:
                # Said to be no reasoning, so that the tags stay text as they are.
                last.thinking = ""
            takes = None
            if part.channel == "commentary":
                last.channel, takes = "commentary", "preamble" if part.text.strip() else None
    return messages


def _check_result(part: _Part, builtin: bool, dropped: list[str]) -> None:
    usual = "analysis" if builtin else "commentary"
    if builtin and not _is_tool(part.name or ""):
        dropped.append(f"the name {part.name} of a tool result (functions.{part.name} is written)")
    elif part.channel not in (None, usual):
        dropped.append(f"the channel {part.channel} of a result of {part.name} ({usual} is written)")


def _unquoted(text: str) -> str:
    """The text in a JSON string: the released chat template quotes arguments and results that are texts."""
    if text[:1] != '"':
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, str) else text
