"""Harmony, the chat format of gpt-oss: messages to tokens with loss weights in one pass, and generated ids back.

Text is the same as openai-harmony 0.0.8 writes, token for token (tests/parity/test_harmony.py). docs/harmony.md has
what carries loss and each difference from the chat template that was released with the model.

Why `Rendered.labels` exists: an answer of the model ends with `<|return|>`, but is kept in the history with `<|end|>`.
Where a turn of the history is trained, its last input token is `<|end|>` and the label there is `<|return|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ossia.errors import OssiaError
from ossia.template.base import LossWeights, TextStream, digest, plain_text
from ossia.template.harmony_tools import IDENTITY, KNOWLEDGE_CUTOFF, system_text, tools_section
from ossia.template.messages import (
    BUILTIN_CALLS,
    EFFORTS,
    Conversation,
    Message,
    Piece,
    Rendered,
    Reply,
    ToolCall,
    is_builtin,
)
from ossia.template.think import split_think

REQUIRED_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")

_CACHED = 256


def missing_tokens(tokenizer: Any) -> list[str]:
    """Harmony's special tokens that the tokenizer lacks."""
    return [token for token in REQUIRED_TOKENS if tokenizer.backend_tokenizer.token_to_id(token) is None]


class _Header(NamedTuple):
    """`ids` up to `<|message|>`; the first `supplied` of them are given by the prompt, not generated."""

    ids: list[int]
    supplied: int


class _Block(NamedTuple):
    """One harmony message: header, text, end token, and the weight of what is generated and of what is supplied."""

    header: _Header
    text: str
    end: int
    label: int
    channel: str
    weight: float
    supplied_weight: float


class HarmonyTemplate:
    """Renders and parses harmony with any tokenizer that has its special tokens."""

    name = "harmony"

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str | None = None,
        reasoning_effort: str = "medium",
        model_identity: str | None = None,
        knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
        current_date: str | None = None,
        loss: LossWeights = LossWeights(),  # noqa: B008  (frozen)
    ) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        self.tokenizer = tokenizer
        self.system = system or ""
        self.reasoning_effort = reasoning_effort
        self.loss = loss
        about = [model_identity or IDENTITY, f"Knowledge cutoff: {knowledge_cutoff}"]
        if current_date:
            about.append(f"Current date: {current_date}")
        self._about = "\n".join(about)

        required: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in REQUIRED_TOKENS]
        self._start, self._message, self._channel, self._end, self._return, self._call = required
        self._constrain: int | None = backend.token_to_id("<|constrain|>")
        end_of_text: int | None = backend.token_to_id("<|endoftext|>")
        self._end_of_text = self._return if end_of_text is None else end_of_text
        self.stop_ids = list(dict.fromkeys([self._return, self._call, self._end_of_text]))
        self.pad_id: int = next(token for token in (tokenizer.pad_token_id, self._end_of_text) if token is not None)
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}

        # The same model without its added tokens: "<|call|>" in a text is then text, whatever others set on `backend`.
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer
        self._plain.decoder = backend.decoder
        if not self._special.isdisjoint(self._encode(" ".join(REQUIRED_TOKENS))):
            raise OssiaError("this tokenizer writes special tokens for plain text; it cannot be used with harmony")

        self._cache: dict[Any, list[int]] = {}
        self._opener = [self._start, *self._encode("assistant")]
        self._user = self._supplied([self._start, *self._encode("user"), self._message])
        self._developer = self._supplied([self._start, *self._encode("developer"), self._message])
        self._said = {
            channel: (
                _Header([*self._opener, self._channel, *self._encode(channel), self._message], len(self._opener)),
                _Header([*self._opener, self._channel, *self._encode(channel), self._message], 0),
            )
            for channel in ("analysis", "commentary", "final")
        }

    def fingerprint(self) -> str:
        """See `Template`."""
        return digest(self.tokenizer, self.name, self._about, self.system, self.reasoning_effort, self.loss)

    def render(self, conversation: Conversation) -> Rendered:
        """Tokens of a training row. Raises OssiaError for a row that harmony cannot say."""
        if conversation.text is not None:
            return plain_text(self._encode(conversation.text), self._end_of_text)
        messages = conversation.messages
        everything = self.loss.base == "all"
        ids = self._opening(messages, conversation.tools, conversation.reasoning_effort)
        weights = [float(everything)] * len(ids)
        channels = [""] * len(ids)
        blocks = list(self._blocks(messages, training=True))
        labelled: list[tuple[int, int]] = []
        for block, body in zip(blocks, self._encode_all([block.text for block in blocks]), strict=True):
            header, supplied = block.header
            ids += header
            ids += body
            ids.append(block.end)
            if block.label != block.end:
                labelled.append((len(ids) - 1, block.label))
            size = len(header) + len(body) + 1
            weights += [block.supplied_weight] * supplied
            weights += [block.weight] * (size - supplied)
            channels += [block.channel] * size
        labels = ids.copy()
        for position, label in labelled:
            labels[position] = label
        return Rendered(ids, labels, weights, channels)

    def prompt(
        self, messages: list[Message], *, tools: Sequence[dict[str, Any]] = (), reasoning_effort: str | None = None
    ) -> list[int]:
        """Token ids up to and with `<|start|>assistant`, reasoning before the last final answer left out."""
        ids = self._opening(messages, tools, reasoning_effort)
        blocks = list(self._blocks(messages, training=False))
        for block, body in zip(blocks, self._encode_all([block.text for block in blocks]), strict=True):
            ids += block.header.ids
            ids += body
            ids.append(block.end)
        ids += self._opener
        return ids

    def parse(self, ids: list[int]) -> Reply:
        """The reply in `ids`, which follow `<|start|>assistant`. Text outside any message counts as content."""
        reader = _Reader(self)
        for token in ids:
            reader.feed(token)
            if reader.finished and token != self._call:
                break
        thinking: list[str] = []
        content: list[str] = []
        calls: list[ToolCall] = []
        for part in reader.parts:
            text = self._decode(part.ids)
            if part.call is not None:
                calls.append(ToolCall(part.call, text, part.builtin))
            elif text:
                (thinking if part.channel == "analysis" else content).append(text)
        return Reply("\n\n".join(content), "\n\n".join(thinking), tuple(calls), reader.finished)

    def stream(self) -> HarmonySplitter:
        """A fresh splitter for one reply."""
        return HarmonySplitter(self)

    def _opening(self, messages: list[Message], tools: Sequence[dict[str, Any]], effort: str | None) -> list[int]:
        """The system block and, with instructions or tools, the developer block; a list of the caller's own."""
        effort = effort or self.reasoning_effort
        if effort not in EFFORTS:
            raise OssiaError(f"reasoning_effort is {effort!r}; it takes {', '.join(EFFORTS)}")
        instructions = self.system
        if messages and messages[0].role in ("system", "developer") and messages[0].content.strip():
            instructions = messages[0].content
        elif any(m.role in ("system", "developer") and m.content.strip() for m in messages):
            instructions = ""
        sections = ["# Instructions", instructions] if instructions.strip() else []
        builtins = [tool for tool in tools if is_builtin(tool)]
        functions = [tool for tool in tools if not is_builtin(tool)]
        if functions:
            sections.append(tools_section(functions))
        developer = "\n\n".join(sections)
        system = system_text(self._about, effort, builtins, functions=bool(functions))
        key = (system, developer)
        if (ids := self._cache.get(key)) is None:
            ids = [self._start, *self._encode("system"), self._message, *self._encode(system), self._end]
            if developer:
                ids += [*self._developer.ids, *self._encode(developer), self._end]
            self._remember(key, ids)
        return ids.copy()

    def _blocks(self, messages: list[Message], *, training: bool) -> Iterator[_Block]:
        """The messages after the opening; in training the last turn keeps its reasoning and ends in `<|return|>`."""
        base, everything = self.loss.base, self.loss.base == "all"
        said = [_said(message) for message in messages]
        last = len(messages) - 1
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        dropped_until = self._dropped_until(messages, said, training)

        going_on = bare = speaking = False
        pending: list[ToolCall] = []
        for i, message in enumerate(messages):
            role = message.role
            if role != "assistant":
                going_on = speaking = False
                weight = float(everything) if message.loss is None else message.loss
                header_weight = weight if everything else 0.0
                body, header = message.content, self._user
                if role == "tool":
                    name, builtin = _answered(message, pending)
                    if builtin and i <= dropped_until:
                        continue
                    header = self._tool_header(name, builtin)
                elif role != "user":
                    if i == 0 or not body.strip():
                        continue
                    body, header = f"# Instructions\n\n{body}", self._developer
                yield _Block(header, body, self._end, self._end, "", weight, header_weight)
                continue

            thinking, text = said[i]
            calls = message.tool_calls
            if i <= dropped_until:
                if thinking is not None:
                    thinking, bare = None, True
                if _channel(message) != "final" and any(call.builtin for call in calls):
                    calls, bare = tuple(call for call in calls if not call.builtin), True
            weight = 1.0
            if (base == "last_round" and i <= last_user) or (bare and not everything):
                weight = 0.0
            reasoning = weight * self.loss.reasoning
            if message.loss is not None:
                weight = reasoning = message.loss
            if thinking is not None:
                header_weight = reasoning if everything else 0.0
                header = self._said["analysis"][going_on]
                yield _Block(header, thinking, self._end, self._end, "analysis", reasoning, header_weight)
                going_on = True
            header_weight = weight if everything else 0.0
            if text is not None:
                channel = _channel(message)
                end = label = self._end
                if channel == "final":
                    label = self._return
                    end = self._return if training and i == last and not message.tool_calls else self._end
                yield _Block(self._said[channel][going_on], text, end, label, channel, weight, header_weight)
                going_on = channel != "final"
                bare = bare and going_on
            for call in calls:
                header = self._call_header(call, going_on)
                yield _Block(header, call.arguments, self._call, self._call, "commentary", weight, header_weight)
                going_on = False
            if message.tool_calls:
                pending = [*pending, *message.tool_calls] if speaking else list(message.tool_calls)
            speaking = True

    @staticmethod
    def _dropped_until(messages: list[Message], said: list[tuple[str | None, str | None]], training: bool) -> int:
        """The last message whose analysis is left out: the last final answer, that which ends a row not counted."""
        finals = [i for i, (_, text) in enumerate(said) if text is not None and _channel(messages[i]) == "final"]
        if training and finals:
            closing = not messages[finals[-1]].tool_calls
            if closing and all(m.role != "assistant" for m in messages[finals[-1] + 1 :]):
                finals.pop()
        return finals[-1] if finals else -1

    def _call_header(self, call: ToolCall, going_on: bool) -> _Header:
        key = ("call", call.name, call.builtin)
        if (ids := self._cache.get(key)) is None:
            ids = [*self._opener, *self._encode(f" to={_recipient(call.name, call.builtin)}"), self._channel]
            if call.builtin:
                ids += [*self._encode("analysis"), *self._encode(" code")]
            elif self._constrain is None:
                ids += [*self._encode("commentary"), *self._encode(" json")]
            else:
                ids += [*self._encode("commentary"), *self._encode(" "), self._constrain, *self._encode("json")]
            ids.append(self._message)
            self._remember(key, ids)
        return _Header(ids, 0 if going_on else len(self._opener))

    def _tool_header(self, name: str, builtin: bool) -> _Header:
        key = ("result", name, builtin)
        if (ids := self._cache.get(key)) is None:
            ids = [self._start, *self._encode(_recipient(name, builtin)), *self._encode(" to=assistant"), self._channel]
            ids += [*self._encode("analysis" if builtin else "commentary"), self._message]
            self._remember(key, ids)
        return self._supplied(ids)

    @staticmethod
    def _supplied(ids: list[int]) -> _Header:
        return _Header(ids, len(ids))

    def _remember(self, key: Any, ids: list[int]) -> None:
        if len(self._cache) >= _CACHED:
            self._cache.clear()
        self._cache[key] = ids

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain text, special tokens in it included as text."""
        try:
            # The batch call skips the offsets, which cost a third of the time of `encode`.
            return [found.ids for found in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            for text in texts:
                if not isinstance(text, str):
                    raise OssiaError(f"a text is needed, got {type(text).__name__}: {text!r:.60}") from error
                if found := re.search("[\ud800-\udfff]", text):
                    raise OssiaError(
                        f"the text {text[max(found.start() - 20, 0) :][:40]!r} holds half of a character "
                        f"({found[0]!r}, a lone surrogate); write the whole character or remove it"
                    ) from error
            raise

    def _decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)


def _said(message: Message) -> tuple[str | None, str | None]:
    """(reasoning, answer or preamble) of an assistant message, None where it has none; nothing for other roles."""
    if message.role != "assistant":
        return None, None
    thinking, text = message.thinking, message.content
    if thinking is None:
        thinking, text = split_think(text)
    if thinking is not None and not thinking.strip():
        thinking = None
    if not text.strip() and (thinking is not None or message.tool_calls):
        return thinking, None
    return thinking, text


def _channel(message: Message) -> str:
    """The channel of an assistant's `content`."""
    return message.channel or ("commentary" if message.tool_calls else "final")


def _recipient(name: str, builtin: bool) -> str:
    return name if builtin or name.startswith("functions.") else f"functions.{name}"


def _answered(message: Message, pending: list[ToolCall]) -> tuple[str, bool]:
    """(name, whether built-in) of the tool that a tool message answers for; its call is taken off `pending`."""
    call = next((call for call in pending if message.name in (None, call.name)), None)
    if call is not None:
        pending.remove(call)
        return call.name, message.builtin or call.builtin
    if message.name is None:
        raise OssiaError("a tool message has no name and no call before it; give it the function's name")
    return message.name, message.builtin


class _Part:
    """One message of a reply: its channel, the function or built-in tool it calls if any, and the ids of its text."""

    def __init__(self, channel: str, call: str | None = None, builtin: bool = False) -> None:
        self.channel = channel
        self.call = call
        self.builtin = builtin
        self.ids: list[int] = []


_BUILTIN_NAMES = frozenset(name for names in BUILTIN_CALLS.values() for name in names)


class _Reader:
    """Generated ids, one at a time, into parts. The ids begin after `<|start|>assistant`."""

    # No header of gpt-oss is that long; a longer one is a model that never writes <|message|>.
    _LONGEST_HEADER = 96

    def __init__(self, template: HarmonyTemplate) -> None:
        self.template = template
        self.parts: list[_Part] = []
        self.part: _Part | None = None
        self.finished = False
        self._header: list[int] = []
        self._foreign = False

    def feed(self, token: int) -> list[int]:
        """Take one id; returns the ids that joined the text of `part`."""
        t = self.template
        if token in t.stop_ids or token == t._end:
            self.finished = token in t.stop_ids
            self.part, self._header, self._foreign = None, [], False
        elif token == t._start or (token == t._channel and (self.part is not None or self._foreign)):
            self.part, self._header, self._foreign = None, [token], False
        elif self._foreign:
            pass
        elif self.part is not None:
            if token not in t._special:
                self.part.ids.append(token)
                return [token]
        elif token == t._message:
            self._open()
        else:
            self._header.append(token)
            if not self._plausible():
                self.part = _Part("final")
                self.part.ids = [id for id in self._header if id not in t._special]
                self.parts.append(self.part)
                return list(self.part.ids)
        return []

    def _plausible(self) -> bool:
        """Whether `_header` can still become a header: it begins with a marker or with ` to=`, and is not too long."""
        t = self.template
        if len(self._header) > self._LONGEST_HEADER:
            return False
        if self._header[0] in (t._start, t._channel, t._constrain):
            return True
        text = t._decode([id for id in self._header if id not in t._special]).lstrip()
        return text.startswith("to=") or "to=".startswith(text)

    def _open(self) -> None:
        t = self.template
        channel_at = self._header.index(t._channel) if t._channel in self._header else len(self._header)
        author, channel = self._header[:channel_at], self._header[channel_at + 1 :]
        if t._constrain in channel:
            channel = channel[: channel.index(t._constrain)]
        about = t._decode([id for id in author if id not in t._special])
        words = t._decode([id for id in channel if id not in t._special])
        roles = about.split()
        self._header = []
        if roles and roles[0] != "assistant" and not roles[0].startswith("to="):
            # The model speaks for someone else: no part of its reply.
            self._foreign = True
            return
        to = re.search(r"(?:^|\s)to=(\S+)", about) or re.search(r"(?:^|\s)to=(\S+)", words)
        name = words.split()[0] if words.split() else ""
        if to is not None:
            # A call is none of the reasoning, whichever channel it is on.
            self.part = _Part("commentary", to[1].removeprefix("functions."), to[1] in _BUILTIN_NAMES)
        else:
            self.part = _Part(name if name in ("analysis", "commentary") else "final")
        self.parts.append(self.part)


class HarmonySplitter:
    """`Splitter` of harmony: a call prints as `name(arguments)` on the commentary channel."""

    def __init__(self, template: HarmonyTemplate) -> None:
        self._reader = _Reader(template)
        self._text = TextStream(template._decode)

    def push(self, token: int) -> list[tuple[str, str]]:
        """(channel, text) pieces that became printable with this token."""
        before, number = self._reader.part, len(self._reader.parts) - 1
        pieces = self.read(token)
        shown = [(piece.channel, piece.text if piece.text or piece.ids else f"{piece.call}(") for piece in pieces]
        if before is not None and before.call is not None and before is not self._reader.part:
            shown.insert(sum(piece.part == number for piece in pieces), (before.channel, ")"))
        return [piece for piece in shown if piece[1]]

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back when the reply ends."""
        return [(piece.channel, piece.text) for piece in self.rest()]

    def read(self, token: int) -> list[Piece]:
        """As `push`, with parts and calls told apart."""
        before = self._reader.part
        added = self._reader.feed(token)
        part = self._reader.part
        pieces: list[Piece] = []
        if part is not before:
            if before is not None and (held := self._text.flush()):
                number = len(self._reader.parts) - 1 - (part is not None)
                pieces.append(Piece(number, before.channel, held, before.call, builtin=before.builtin))
            if part is not None and part.call is not None:
                pieces.append(self._piece(""))
        return pieces + [self._piece(self._text.push(id), id) for id in added]

    def rest(self) -> list[Piece]:
        """As `flush`, for `read`."""
        held = self._text.flush()
        return [self._piece(held)] if self._reader.part is not None and held else []

    def _piece(self, text: str, *ids: int) -> Piece:
        part = self._reader.part
        assert part is not None
        return Piece(len(self._reader.parts) - 1, part.channel, text, part.call, ids, part.builtin)
