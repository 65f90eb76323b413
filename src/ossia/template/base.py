"""What every template offers, and the loss weights that a user asks for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from ossia.errors import UsageError, nearest
from ossia.template.messages import Conversation, Message, Piece, Rendered, Reply

Base = Literal["default", "last_round", "all"]
BASES: tuple[Base, ...] = ("default", "last_round", "all")
MODIFIERS = ("ignore_empty_think", "reasoning:W", "final_only")


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Which tokens carry loss.

    `base`: `default` trains every assistant turn, `last_round` those after the last user message, `all` every token.
    `reasoning` is the weight of reasoning. `ignore_empty_think` takes the loss off an empty `<think></think>`.
    """

    base: Base = "default"
    reasoning: float = 1.0
    ignore_empty_think: bool = False


class Splitter(Protocol):
    """Takes a reply apart while it is generated."""

    def push(self, token: int) -> list[tuple[str, str]]:
        """(channel, text) pieces that became printable with this token; a character is never split."""
        ...

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back when the reply ends."""
        ...

    def read(self, token: int) -> list[Piece]:
        """As `push`, with parts and calls told apart; a reply is taken by one of the two."""
        ...

    def rest(self) -> list[Piece]:
        """As `flush`, for `read`."""
        ...


class Template(Protocol):
    """A chat format: messages to token ids with loss weights, and generated ids back to a reply."""

    name: str
    tokenizer: Any
    stop_ids: list[int]
    pad_id: int

    def fingerprint(self) -> str:
        """A text that differs where tokens or weights of a row would: tokenizer, settings, loss weights."""
        ...

    def render(self, conversation: Conversation) -> Rendered:
        """Tokens of a training row; all weights are 0 where nothing in it is trained."""
        ...

    def prompt(
        self, messages: list[Message], *, tools: Sequence[dict[str, Any]] = (), reasoning_effort: str | None = None
    ) -> list[int]:
        """Token ids after which the model answers `messages`."""
        ...

    def parse(self, ids: list[int]) -> Reply:
        """The reply in generated ids; takes any ids, whole or cut off."""
        ...

    def stream(self) -> Splitter:
        """A fresh splitter for one reply."""
        ...


def parse_loss_scale(text: str) -> LossWeights:
    """`--loss_scale` as weights: a base and modifiers joined by `+` or `,`, for example `last_round+reasoning:0.3`.

    Raises UsageError for an unknown, repeated or contradicting word.
    """
    weights = LossWeights()
    seen: dict[str, str] = {}
    for word in re.split(r"[+,]", text):
        name, _, value = word.strip().partition(":")
        if name in BASES and not value:
            topic, weights = "base", replace(weights, base=name)
        elif name == "ignore_empty_think" and not value:
            topic, weights = name, replace(weights, ignore_empty_think=True)
        elif name == "final_only" and not value:
            topic, weights = "reasoning", replace(weights, reasoning=0.0)
        elif name == "reasoning":
            topic, weights = "reasoning", replace(weights, reasoning=_weight(value, text))
        else:
            hint = nearest(word.strip(), (*BASES, *MODIFIERS))
            raise UsageError(f"--loss_scale {text}: unknown word '{word.strip()}'{hint or ';'} it takes {_ALLOWED}")
        if topic in seen:
            raise UsageError(f"--loss_scale {text}: '{seen[topic]}' and '{word.strip()}' exclude each other")
        seen[topic] = word.strip()
    return weights


_ALLOWED = f"one of {', '.join(BASES)}, then any of {', '.join(MODIFIERS)}, joined by +"


def _weight(value: str, text: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UsageError(f"--loss_scale {text}: reasoning:{value} is no weight; write for example reasoning:0.3")
    return weight


def digest(tokenizer: Any, *settings: object) -> str:
    """`Template.fingerprint` of a tokenizer and the settings beside it."""
    words = tokenizer.backend_tokenizer.to_str().encode()
    return hashlib.sha256(words + repr((tokenizer.eos_token_id, *settings)).encode()).hexdigest()


def plain_text(ids: list[int], end: int) -> Rendered:
    """A row of plain text: every token is trained, and so is the token that ends it."""
    ids = [*ids, end]
    return Rendered(ids, ids.copy(), [1.0] * len(ids), ["text"] * len(ids))


class TextStream:
    """Token ids to text as it grows. An unfinished UTF-8 sequence is held back until the tokens that end it come."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Decoders write U+FFFD for a sequence that has begun and not ended, some of them one for each byte.
        certain = len(text.rstrip("\ufffd"))
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text):
            # The last token stays as left context: some decoders strip the space of a first word.
            self._ids = self._ids[-1:]
            self._shown = len(self._decode(self._ids))
        return piece

    def flush(self) -> str:
        """What was held back."""
        piece = self._decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return piece
