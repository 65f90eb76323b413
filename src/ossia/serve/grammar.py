"""Answers that must have a form: JSON of a schema in the final channel, or a call of a function (llguidance)."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ossia.serve.errors import bad
from ossia.template.base import Template

# Free white space would let a weak model write blanks for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": r",[ \n]?", "key_separator": ": ?"}
_TEXT = r"TEXT: /(.|\n)*/"


class Vocabulary:
    """Bytes of tokens, and grammars over them.

    Args:
        template: with its tokenizer.
        size: of the model's vocabulary, which may be larger than the tokenizer's.
    """

    def __init__(self, template: Template, size: int) -> None:
        self.template = template
        self.size = size

    @cached_property
    def _words(self) -> LLTokenizer:
        tokenizer = self.template.tokenizer
        size = max(self.size, len(tokenizer))
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=self.template.stop_ids[0])

    def bytes(self, id: int) -> bytes:
        """What the token writes; a special token writes its name."""
        return self._words.decode_bytes([id])

    def text(self, id: int) -> str:
        """The same, as far as it is text."""
        return self.bytes(id).decode("utf-8", errors="replace")

    def grammar(
        self,
        schema: dict[str, Any] | None,
        tools: list[dict[str, Any]],
        call: str | None,
    ) -> LLMatcher:
        """The grammar of a whole answer, reasoning included; takes up to a second.

        Args:
            schema: of the final text; None where it is free.
            tools: functions that may be called.
            call: None: calls are optional; "" : one must be called; else: this one must be.

        Raises:
            ApiError: 400 for a schema that cannot be followed.
        """
        harmony = self.template.name == "harmony"
        if call is not None and not harmony:
            raise bad("tool_choice: this model's chat format allows only none and auto", "tool_choice")
        final = "TEXT" if schema is None else _json(schema)
        if not harmony:
            opener = 'TEXT "</think>" ' if getattr(self.template, "opens_thinking", False) else ""
            return self._compiled(f"%llguidance {{}}\nstart: {opener}final\nfinal: {final}\n{_TEXT}\n")
        functions = [tool["function"] for tool in tools if not call or tool["function"]["name"] == call]
        ends = (["final"] if call is None else []) + [f"call_{index}" for index in range(len(functions))]
        lines = [
            "%llguidance {}",
            f"start: analysis* ({' | '.join(ends)})",
            'analysis: <|channel|> "analysis" <|message|> TEXT <|end|> <|start|> "assistant"',
            f'final: <|channel|> "final" <|message|> {final}',
            _TEXT,
        ]
        constrain = "<|constrain|>" if "<|constrain|>" in self.template.tokenizer.get_vocab() else ""
        for index, function in enumerate(functions):
            name = json.dumps(f" to=functions.{function['name']}")
            arguments = _json(function.get("parameters") or {"type": "object"})
            lines.append(
                f'call_{index}: {name} <|channel|> "commentary " {constrain} "json" <|message|> {arguments} <|call|>'
            )
        return self._compiled("\n".join(lines) + "\n")

    def follow(self, grammar: LLMatcher) -> Mask:
        """A fresh mask that makes one answer follow the grammar, for `Engine.submit`."""
        return Mask(grammar.deep_copy(), self.size, self.template.stop_ids[0])

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0][:300]
            raise bad(f"this schema cannot be followed: {reason}", "response_format", "unsupported_schema")
        return matcher


class Mask:
    """Which ids may come next, bool [V], from the answer's ids so far. `failed` says why the grammar could not go on;
    the answer then ends at once."""

    def __init__(self, matcher: LLMatcher, size: int, end: int) -> None:
        self.failed = ""
        self._matcher = matcher
        self._size = size
        self._end = end
        self._read = 0

    def __call__(self, ids: list[int]) -> Tensor:
        self._matcher.consume_tokens(ids[self._read :])
        self._read = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(self._size, dtype=bool)
        words = np.unpackbits(bits, bitorder="little")[: self._size]
        allowed[: len(words)] = words
        if self._matcher.is_error():
            self.failed = self._matcher.get_error().splitlines()[0]
            allowed[:] = False
            allowed[self._end] = True
        return torch.from_numpy(allowed)


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _SPACING})
