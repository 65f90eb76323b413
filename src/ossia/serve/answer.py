"""Tokens of one answer into what a client sees: reasoning, text, calls, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ossia.infer.engine import Token
from ossia.serve.grammar import Vocabulary
from ossia.template.base import Template, TextStream
from ossia.template.messages import Piece

BREAK = "\n\n"
"""Stands between two parts of one kind, as in `Template.parse`."""


class Delta(NamedTuple):
    """More of an answer. `call` counts its calls from 0; a call's first delta has its name, later ones arguments.

    `part` and `channel` are those of the reply (`Piece`). The first `joint` characters of `text` only join it to an
    earlier part of its kind.
    """

    kind: Literal["reasoning", "content", "call"]
    text: str
    part: int
    channel: str
    call: int = 0
    name: str | None = None
    tokens: tuple[Token, ...] = ()
    joint: int = 0


class Splitter(Protocol):
    """The part of `ossia.template.base.Splitter` that is used here."""

    def read(self, token: int) -> list[Piece]: ...

    def rest(self) -> list[Piece]: ...


class PlainSplitter:
    """A reply that is all text, for completions without a chat format."""

    def __init__(self, template: Template) -> None:
        self._ends = set(template.stop_ids)
        tokenizer = template.tokenizer
        self._text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))

    def read(self, token: int) -> list[Piece]:
        return [] if token in self._ends else [Piece(0, "final", self._text.push(token), ids=(token,))]

    def rest(self) -> list[Piece]:
        return [Piece(0, "final", self._text.flush())]


class _Stops:
    """Text up to the first stop text; what may be the beginning of one is held back."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            shown, self._held = self._held[: min(starts)], ""
            return shown
        keep = next(
            (
                size
                for size in range(min(len(self._held), self._longest - 1), 0, -1)
                if any(stop.startswith(self._held[-size:]) for stop in self._stops)
            ),
            0,
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


@dataclass
class Call:
    """A call with its arguments as far as they came."""

    name: str
    arguments: str = ""


@dataclass
class Answer:
    """One answer while it comes.

    Args:
        splitter: a fresh one.
        stops: texts at which the content ends; they are no part of it.
        vocabulary: needed where the log-probabilities of content tokens go with their text.
    """

    splitter: Splitter
    stops: list[str] = field(default_factory=list)
    vocabulary: Vocabulary | None = None

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    """Of the content, where `vocabulary` is given."""
    generated: int = 0
    reasoned: int = 0
    reason: str | None = None
    """None while it runs, then stop, length or tool_calls."""

    def __post_init__(self) -> None:
        self._stop = _Stops(self.stops)
        self._part: int | None = None
        self._spoken = Piece(0, "final", "")
        self._last: dict[str, int] = {}
        self._seen: list[Token] = []
        self._pending: list[Token] = []
        self._owed = 0

    @property
    def stopped(self) -> bool:
        """A stop text was found: nothing more is needed."""
        return self._stop.found

    def push(self, token: Token) -> list[Delta]:
        """Take one token."""
        if self.stopped:
            return []
        self.generated += 1
        self._seen.append(token)
        return self._take(self.splitter.read(token.id))

    def end(self, reason: str) -> list[Delta]:
        """The answer is over; `reason` is the engine's."""
        deltas: list[Delta] = []
        if not self.stopped:
            deltas = self._take(self.splitter.rest())
            if not self.stopped:
                deltas += self._said(self._stop.flush(), self._spoken, everything=True)
        called = bool(self.calls) and reason == "stop" and not self.stopped
        self.reason = "tool_calls" if called else reason
        return deltas

    def _take(self, pieces: list[Piece]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            if self.stopped:
                break
            if piece.call is not None:
                deltas += self._called(piece)
            elif piece.channel == "analysis":
                self.reasoned += len(piece.ids)
                joint = self._joint("reasoning", piece, self.reasoning)
                text = joint + piece.text
                self.reasoning += text
                if text:
                    deltas.append(Delta("reasoning", text, piece.part, piece.channel, joint=len(joint)))
            else:
                self._hold(piece.ids)
                self._spoken = piece
                joint = self._joint("content", piece, self.content + self._stop._held)
                text = self._stop.push(joint + piece.text)
                deltas += self._said(text, piece, len(joint) if text.startswith(joint) else 0)
        return deltas

    def _called(self, piece: Piece) -> list[Delta]:
        deltas = []
        if piece.part != self._part:
            self._part = piece.part
            self.calls.append(Call(str(piece.call)))
            deltas.append(Delta("call", "", piece.part, piece.channel, len(self.calls) - 1, piece.call))
        if piece.text:
            self.calls[-1].arguments += piece.text
            deltas.append(Delta("call", piece.text, piece.part, piece.channel, len(self.calls) - 1))
        return deltas

    def _joint(self, kind: str, piece: Piece, before: str) -> str:
        """What stands between `before` and the piece."""
        if not piece.text:
            return ""
        new = before and self._last.get(kind, piece.part) != piece.part
        self._last[kind] = piece.part
        return BREAK if new else ""

    def _hold(self, ids: tuple[int, ...]) -> None:
        """Move the tokens of `ids`, which are in order among those seen, to the ones that wait for their text."""
        if self.vocabulary is None:
            self._seen.clear()
            return
        for id in ids:
            while self._seen and (token := self._seen.pop(0)).id != id:
                pass
            self._pending.append(token)

    def _said(self, text: str, piece: Piece, joint: int = 0, everything: bool = False) -> list[Delta]:
        self.content += text
        tokens: list[Token] = []
        if self.vocabulary is not None:
            # A token goes out with the text that completes it.
            self._owed += len(text[joint:].encode())
            while self._pending and (everything or len(self.vocabulary.bytes(self._pending[0].id)) <= self._owed):
                token = self._pending.pop(0)
                self._owed -= len(self.vocabulary.bytes(token.id))
                tokens.append(token)
            self.tokens += tokens
        if not (text or tokens):
            return []
        return [Delta("content", text, piece.part, piece.channel, tokens=tuple(tokens), joint=joint)]


def usage(prompt_tokens: int, answers: list[Answer]) -> dict[str, Any]:
    """Token counts of one request, as chats and completions have them."""
    generated = sum(answer.generated for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoned for answer in answers)},
    }
