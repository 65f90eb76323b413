"""Lists of messages: OpenAI's `role` and `content`, ShareGPT's `from` and `value`, and their relatives.

`names.py` has what each thing may be called. A content may be a text or a list of parts: of OpenAI's chats and
responses, of Anthropic's messages, of LLaMA-Factory's rows (`{"type": "text", "value": …}`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ossia.data.formats import names
from ossia.data.formats.calls import Called, read_calls
from ossia.data.formats.fields import as_json, first, has, listed, only, shown, text
from ossia.data.formats.notes import Place
from ossia.errors import OssiaError, nearest
from ossia.template.harmony_text import looks_like_harmony, parse_turn
from ossia.template.messages import Conversation, Message, Role, ToolCall
from ossia.template.think import split_think

NEEDS = (("messages",),)
ALSO = names.SYSTEM

_TEXT_WITHOUT_TYPE = ("text", "value")
_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning|reflection)>|<\|(?:begin|end)_of_(?:thought|solution)\|>")
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>")
_FLAT = re.compile(r"\s*(?:assistant)?analysis\S.*assistant(?:final|commentary)", re.DOTALL)
_JSON_PARTS = re.compile(r'\s*\[\s*\{\s*"type"\s*:\s*"(?:text|input_text|output_text|image|image_url)"')
_NOTHING = re.compile(r"\s*(?:nan|none|null)\s*", re.IGNORECASE)
_EFFORT = re.compile(r"^\s*Reasoning:\s*(?:low|medium|high)\b", re.IGNORECASE | re.MULTILINE)
_THOUGHT = re.compile(r"\s*(?:<think>)?(?:(?!</?think>).)*</think>", re.DOTALL)
_CALL_TAGS = re.compile(
    r"<(?:tool_calls?|function_calls?|functioncall|tool_response|invoke)\b[^>]*>|<\|(?:python_tag|tool▁call)"
)
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|eom_id"
    r"|start|end|message|channel|return|call|constrain|user|assistant|system|observation)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>|<s>"
)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation of a row."""
    return Conversation(with_system(read_messages(row["messages"], place.key("messages")), row, place))


def with_system(messages: list[Message], row: dict[str, Any], place: Place) -> list[Message]:
    """With the row's instructions before them; BadRow where they begin with others."""
    key = only(row, names.SYSTEM, place)
    if key is not None and isinstance(row[key], list):
        system = "".join(part.text for part in _parts(row[key], place.key(key)))
    else:
        system = text(row, key, place)
    if not system.strip():
        return messages
    _note_instructions(system, place)
    if messages and messages[0].role in ("system", "developer"):
        if messages[0].content.strip() != system.strip():
            raise place.bad(f"{key} and the first message are two different instructions; keep one")
        return messages
    return [Message("system", system), *messages]


def read_messages(value: Any, place: Place) -> list[Message]:
    """The messages of a list of objects; each says who speaks and what."""
    reader = _Reader()
    for index, entry in enumerate(listed(value, place)):
        reader.add(entry, place.at(index))
    mark_preambles(reader.messages)
    return reader.messages


def answer(said: str, thinking: str | None, place: Place, loss: float | None = None) -> list[Message]:
    """An assistant's text as messages: one, or those of a text that is written in harmony."""
    if looks_like_harmony(said):
        try:
            found = parse_turn(said)
        except OssiaError as error:
            raise place.bad(
                f" is harmony that cannot be read ({error}); give its messages as role and content"
            ) from None
        if thinking and thinking.strip():
            raise place.bad(" is harmony, which has its own reasoning; remove the reasoning beside it")
        for message in found:
            message.loss = loss
        return found
    if thinking and (inner := split_think(thinking))[1] == "" and inner[0]:
        # Reasoning that is wrapped into its tags once more.
        thinking = inner[0]
    if "<" in said or (thinking and "<" in thinking):
        thought = None if thinking else _THOUGHT.match(said)
        if _TAGS.search(said, thought.end() if thought else 0) or _TAGS.search(thinking or ""):
            place.note("think_tags")
    if thinking is None and _EMPTY_THINK.match(said):
        place.note("empty_reasoning")
    if _FLAT.match(said):
        place.note("flat_harmony")
    note_nothing(said, place)
    if "<" in said and _CALL_TAGS.search(said):
        place.note("call_tags")
    note_control_text(said, place)
    note_control_text(thinking or "", place)
    return [Message("assistant", said, thinking, loss=loss)]


def note_control_text(trained: str, place: Place) -> None:
    """Note control tokens of a chat format in a text that is trained."""
    if ("<" in trained or "[" in trained) and _CONTROL.search(trained):
        place.note("control_text")


def note_nothing(said: str, place: Place) -> None:
    """Note a text that a table's empty cell may have become."""
    if len(said) < 16 and _NOTHING.fullmatch(said):
        place.note("nothing")


def _note_instructions(said: str, place: Place) -> None:
    if _EFFORT.search(said):
        place.note("effort_text")
    note_nothing(said, place)


def reasoning_of(row: dict[str, Any], place: Place) -> str | None:
    """The column with the reasoning before an answer."""
    key = only(row, names.REASONING_COLUMNS, place)
    thinking = text(row, key, place)
    if key is not None and not thinking.strip():
        place.note("empty_reasoning")
    return thinking or None


def mark_preambles(messages: list[Message]) -> None:
    """Give a text of the assistant the commentary channel where calls follow before anyone else speaks."""
    calls = False
    for message in reversed(messages):
        if message.role != "assistant":
            calls = False
        elif message.tool_calls:
            calls = True
        elif calls and message.content.strip() and message.channel is None:
            message.channel = "commentary"


class _Part(NamedTuple):
    """A piece of a message: `text`, `reasoning`, `call`, or a `result` of the call that `id` names."""

    kind: str
    text: str = ""
    calls: tuple[Called, ...] = ()
    id: str = ""


class _Reader:
    """Entries of a list, one after another, into messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}
        self._pending: list[Called] = []

    def add(self, entry: Any, place: Place) -> None:
        """Take one entry."""
        if not isinstance(entry, dict):
            raise place.bad(f" is {shown(entry)}; an object with role and content is needed")
        role = _role(entry, place)
        key = only(entry, names.RESULT if role == "tool" else names.CONTENT, place)
        value, said = (None, place) if key is None else (entry[key], place.key(key))
        if role not in names.CALLERS or key is not None:
            kind = "call" if role in names.CALLERS else role if role in ("assistant", "tool") else "other"
            reasons = kind == "assistant" and entry.get("type") == "reasoning"
            place.check_keys(entry, names.MESSAGE_KEYS["reasoning" if reasons else kind])
        if role in ("user", "assistant", "system", "developer") and has(entry, "name"):
            place.note("names")
        if isinstance(value, str) and _JSON_PARTS.match(value):
            place.note("json_parts")
        if role in names.CALLERS:
            self._call(entry, value, said, place)
            return
        speaks = has(entry, *names.CALLS, "refusal", "summary", *names.REASONING) if role == "assistant" else False
        if key is None and not speaks:
            raise place.bad(f": no content (keys: {', '.join(map(repr, entry)):.200})")
        if role == "tool":
            self._result(entry, _result_text(value, said), place)
        elif role == "assistant":
            self._assistant(entry, value, said, place)
        else:
            self._other(role, entry, value, said, place)

    def _call(self, entry: dict[str, Any], value: Any, said: Place, place: Place) -> None:
        """A message that is a call itself, or whose content is one."""
        thinking = None
        if value is None:
            value = {k: v for k, v in entry.items() if k not in (*names.ROLE, *names.LOSS)}
        elif isinstance(value, str):
            # LLaMA-Factory writes reasoning before a call into the same text.
            thinking, value = split_think(value)
        calls = read_calls(value, said)
        if not calls:
            raise said.bad(": no call in it")
        key = first(entry, (*names.CALL_ID, "id"))
        if len(calls) == 1 and not calls[0].id and key is not None:
            calls = (calls[0]._replace(id=str(entry[key])),)
        made = tuple(called.call for called in calls)
        self._join(Message("assistant", "", thinking or None, made, loss=_loss(entry, place)), calls, place)

    def _assistant(self, entry: dict[str, Any], value: Any, said: Place, place: Place) -> None:
        parts = _parts(value, said)
        if has(entry, "refusal"):
            parts.append(_Part("text", text(entry, "refusal", place)))
        thinking = _reasoning(entry, place)
        if thinking is not None and not thinking.strip():
            place.note("empty_reasoning")
        written = "".join(part.text for part in parts if part.kind == "reasoning").strip()
        if thinking and written and thinking.strip() != written:
            raise place.bad(": reasoning stands in the content and beside it, and differs; keep one")
        if thinking and not written:
            parts.insert(0, _Part("reasoning", thinking))
        if calls := _calls(entry, place):
            parts.append(_Part("call", calls=calls))
        channel, recipient = text(entry, "channel", place), text(entry, "recipient", place)
        if recipient and recipient not in ("all", "assistant"):
            body = "".join(part.text for part in parts if part.kind == "text")
            call = Called(ToolCall(recipient.removeprefix("functions."), body), "")
            parts = [*(part for part in parts if part.kind != "text"), _Part("call", calls=(call,))]
        elif channel == "analysis":
            parts = [part._replace(kind="reasoning") if part.kind == "text" else part for part in parts]
        elif channel not in ("", "commentary", "final"):
            raise place.bad(f".channel is {channel!r:.60}; it takes analysis, commentary, final")
        made = _assembled(parts, said, _loss(entry, place))
        if not any(message.content.strip() or message.thinking or message.tool_calls for message, _ in made):
            raise said.bad(": the assistant says nothing; content, thinking or tool_calls is needed")
        name = text(entry, "name", place) or None
        for message, calls in made:
            message.name = name
            if channel == "commentary" and not message.tool_calls:
                message.channel = "commentary"
            self._join(message, calls, place)

    def _join(self, message: Message, calls: tuple[Called, ...], place: Place) -> None:
        """Add an assistant's message; bare calls join the assistant's message before them."""
        bare = message.tool_calls and not message.content.strip() and not message.thinking
        before = self.messages[-1] if self.messages else None
        if bare and before is not None and before.role == "assistant" and before.loss == message.loss:
            before.tool_calls += message.tool_calls
        else:
            if not message.tool_calls and message.channel is None and message.content.strip():
                self._go_on(place)
            self.messages.append(message)
        self._pending += calls
        for called in calls:
            note_control_text(called.call.arguments, place)
        self._names |= {called.id: called.call.name for called in calls if called.id}

    def _go_on(self, place: Place) -> None:
        """Someone else speaks: note calls that are left without a result."""
        if self._pending:
            place.note("unanswered")
            self._pending = []

    def _result(self, entry: dict[str, Any], content: str, place: Place, id: str = "") -> None:
        """Add a tool's result, matched by the call's id, then by the function's name, then to the oldest open call."""
        name = text(entry, only(entry, names.RESULT_NAME, place), place).removeprefix("functions.")
        given = first(entry, names.CALL_ID)
        if not id and given is not None:
            id = str(entry[given])
        answered = next((called for called in self._pending if id and called.id == id), None)
        if answered is None and not (id and id in self._names):
            answered = next((called for called in self._pending if not name or called.call.name == name), None)
        asked = answered.call.name if answered else self._names.get(id, "")
        if not (name or asked):
            raise place.bad(
                ": a result with no function_call before it; put the call into tool_calls, or name the function here"
            )
        if answered is None or (name and name != asked) or (id and answered.id and answered.id != id):
            place.note("orphan_result")
        if answered is not None:
            self._pending.remove(answered)
        name = name or asked
        self.messages.append(Message("tool", content, name=name, loss=_loss(entry, place)))

    def _other(self, role: Role, entry: dict[str, Any], value: Any, said: Place, place: Place) -> None:
        if _calls(entry, place):
            raise place.bad(f": tool_calls in a message of the {role}; only the assistant calls tools")
        parts = _parts(value, said)
        if (_reasoning(entry, place) or "").strip() or any(part.kind == "reasoning" for part in parts):
            key = first(entry, names.REASONING) or "reasoning"
            raise place.bad(f": {key} in a message of the {role}; only the assistant reasons")
        if any(part.kind == "call" for part in parts):
            raise said.bad(f": a call in a message of the {role}; only the assistant calls tools")
        for part in parts:
            if part.kind == "result":
                self._result(entry, part.text, place, part.id)
        texts = [part.text for part in parts if part.kind == "text"]
        if role != "user":
            _note_instructions("".join(texts), place)
        if texts or not parts:
            if role == "user":
                self._go_on(place)
            name = text(entry, "name", place) or None
            self.messages.append(Message(role, "".join(texts), name=name, loss=_loss(entry, place)))


def _role(entry: dict[str, Any], place: Place) -> Any:
    """A role of ours, or one of `names.CALLERS`; items of OpenAI's responses have a type in its place."""
    key = only(entry, names.ROLE, place)
    given = entry.get("type") if key is None else entry[key]
    word = given.strip().lower() if isinstance(given, str) else given
    if key is None and word == "reasoning":
        return "assistant"
    if isinstance(word, str) and (word in names.ROLES or word in names.CALLERS):
        return word if word in names.CALLERS else names.ROLES[word]
    if given is None:
        raise place.bad(f": no role (keys: {', '.join(map(repr, entry)):.200})")
    known = [*names.ROLES, *names.CALLERS]
    close = nearest(word, known) if isinstance(word, str) else ""
    takes = "system, developer, user, assistant, tool, tool_call"
    raise place.bad(f".{key or 'type'} is {given!r:.60}; it takes {takes}{close}")


def _calls(entry: dict[str, Any], place: Place) -> tuple[Called, ...]:
    """`tool_calls`, and OpenAI's older `function_call`, which may say the same once more."""
    calls = read_calls(entry["tool_calls"], place.key("tool_calls")) if has(entry, "tool_calls") else ()
    old = read_calls(entry["function_call"], place.key("function_call")) if has(entry, "function_call") else ()
    if calls and old and old != calls[: len(old)]:
        raise place.bad(": function_call and tool_calls are different calls; keep tool_calls")
    return calls or old


def _reasoning(entry: dict[str, Any], place: Place) -> str | None:
    """The reasoning beside a content; lists of parts (`reasoning_details`) are joined."""
    texts = {}
    for key in names.REASONING:
        if (value := entry.get(key)) is None:
            continue
        if isinstance(value, list | dict):
            parts = _parts(value if isinstance(value, list) else [value], place.key(key), inside="reasoning")
            texts[key] = "\n".join(part.text for part in parts)
        elif isinstance(value, str):
            texts[key] = value
        else:
            raise place.key(key).bad(f" is {shown(value)}; a text is needed")
    if entry.get("type") == "reasoning" and has(entry, "summary"):
        parts = _parts(entry["summary"], place.key("summary"), inside="reasoning")
        texts["summary"] = "\n".join(part.text for part in parts)
    found = only(texts, texts, place)
    return None if found is None else texts[found]


def _parts(value: Any, place: Place, inside: str = "text") -> list[_Part]:
    """The pieces of a content; `inside` is what a part without a type is."""
    if value is None:
        return []
    if isinstance(value, str):
        return [_Part(inside, value)]
    if isinstance(value, dict) and (value.get("type") or has(value, *_TEXT_WITHOUT_TYPE)):
        value = [value]
    if not isinstance(value, list):
        raise place.bad(f" is {shown(value)}; a text is needed")
    return [part for index, item in enumerate(value) for part in _part(item, place.at(index), inside)]


def _part(part: Any, place: Place, inside: str) -> list[_Part]:
    if isinstance(part, str):
        return [_Part(inside, part)]
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not (kind is None or isinstance(kind, str)):
        raise place.bad(f" is {shown(part)!r}; gpt-oss takes text parts only")
    if kind in ("reasoning.encrypted", "redacted_thinking"):
        place.note("encrypted")
        return []
    if kind in names.CALL_PARTS:
        held = first(part, ("value", "tool_call", "function_call", "text", "content"))
        calls = read_calls(part, place) if held is None else read_calls(part[held], place.key(held))
        return [_Part("call", calls=calls)]
    if kind in names.RESULT_PARTS:
        place.check_keys(part, names.MESSAGE_KEYS["tool"] | {"text"})
        said, called = only(part, (*names.RESULT, "text"), place), first(part, names.CALL_ID)
        content = _result_text(None if said is None else part[said], place)
        return [_Part("result", content, id="" if called is None else str(part[called]))]
    made = inside
    known: tuple[str, ...] = names.PART_TEXT
    if kind in names.REASONING_PARTS:
        made, known = "reasoning", names.PART_REASONING
    elif kind == "refusal":
        made, known = "text", ("refusal", "text")
    elif kind not in names.TEXT_PARTS and not (kind is None and has(part, *_TEXT_WITHOUT_TYPE)):
        raise place.bad(f" is {kind or shown(part)!r:.60}; gpt-oss takes text parts only")
    place.check_keys(part, names.HARMLESS.union(known, ("type", "signature", "format")))
    key = only(part, known, place)
    value = None if key is None else part[key]
    if isinstance(value, list) and made == "reasoning":
        return _parts(value, place.key(str(key)), inside="reasoning")
    if not isinstance(value, str):
        raise place.bad(f": a {kind or 'text'} part has no text")
    return [_Part(made, value)]


def _result_text(value: Any, place: Place) -> str:
    """What a tool said: a text, text parts, or any value as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    parts = value if isinstance(value, list) else [value]
    kinds = {str(part.get("type")) if isinstance(part, dict) else "" for part in parts}
    if parts and kinds.issubset(names.TEXT_PARTS):
        return "".join(part.text for part in _parts(parts, place))
    if any(kind.removeprefix("input_").startswith(("image", "audio", "video", "file")) for kind in kinds):
        raise place.bad(" holds other parts than text; gpt-oss takes text parts only")
    return as_json(value, place)


def _assembled(parts: list[_Part], place: Place, loss: float | None) -> list[tuple[Message, tuple[Called, ...]]]:
    """Parts in their order as messages, each with its calls; a message has reasoning, then text, then calls."""
    made: list[tuple[Message, tuple[Called, ...]]] = []
    held: dict[str, list[_Part]] = {"reasoning": [], "text": [], "call": []}

    def flush() -> None:
        if any(held.values()):
            thinking = "\n\n".join(part.text for part in held["reasoning"]) or None
            calls = tuple(called for part in held["call"] for called in part.calls)
            *earlier, last = answer("".join(part.text for part in held["text"]), thinking, place, loss)
            last.tool_calls += tuple(called.call for called in calls)
            made.extend((message, ()) for message in earlier)
            made.append((last, calls))
        for kept in held.values():
            kept.clear()

    order = list(held)
    for part in parts:
        if part.kind == "result":
            raise place.bad(": a tool's result in a message of the assistant; it belongs to role tool")
        if any(held[later] for later in order[order.index(part.kind) + 1 :]):
            flush()
        held[part.kind].append(part)
    flush()
    return made


def _loss(entry: dict[str, Any], place: Place) -> float | None:
    key = only(entry, names.LOSS, place)
    if key is None:
        return None
    value = entry[key]
    if not isinstance(value, bool | int | float) or not 0 <= value < 1e6:
        raise place.bad(f".{key} is {value!r:.60}; true, false or a weight of at least 0 is needed")
    return float(value)
