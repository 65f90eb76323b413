"""Answers that must have a form: JSON of a schema, a choice or a regular expression in the final channel, or a call
(llguidance)."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any, NamedTuple

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ossia.serve.errors import bad
from ossia.template.base import Template
from ossia.template.messages import BUILTIN_CALLS, is_builtin

# Free white space would let a weak model write blanks for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": r",[ \n]?", "key_separator": ": ?"}
_TEXT = r"TEXT: /(.|\n)*/"


class Form(NamedTuple):
    """What the final text must be: JSON of a schema, one of some texts, or what a regular expression matches whole.

    `field` is the field of the request that asks for it.
    """

    field: str
    schema: dict[str, Any] | None = None
    choice: list[str] | None = None
    regex: str | None = None

    def rule(self) -> str:
        """The form as the right side of a rule of llguidance's Lark dialect."""
        if self.schema is not None:
            return _json(self.schema)
        if self.choice is not None:
            return " | ".join(json.dumps(text) for text in self.choice)
        assert self.regex is not None
        # A slash ends the expression in the grammar.
        pattern = re.sub(r"\\.|/", lambda found: found[0] if found[0] != "/" else r"\/", self.regex, flags=re.DOTALL)
        return f"/{pattern}/".replace("\n", r"\n")


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

    def grammar(self, form: Form | None, tools: list[dict[str, Any]], call: str | None) -> LLMatcher:
        """The grammar of a whole answer, reasoning included; takes up to a second.

        Args:
            form: of the final text; None where it is free.
            tools: functions and built-in tools that may be called.
            call: None: calls are optional; "": one must be called; else: this one must be.

        Raises:
            ApiError: 400 for a form that cannot be followed.
        """
        harmony = self.template.name == "harmony"
        if call is not None and not harmony:
            raise bad("tool_choice: this model's chat format allows only none and auto", "tool_choice")
        field = "tools" if form is None else form.field
        final = "TEXT" if form is None else form.rule()
        if not harmony:
            opener = 'TEXT "</think>" ' if getattr(self.template, "opens_thinking", False) else ""
            return self._compiled(f"%llguidance {{}}\nstart: {opener}final\nfinal: {final}\n{_TEXT}\n", field)
        calls = [rule for tool in tools if not call or tool_name(tool) == call for rule in self._calls(tool)]
        ends = (["final"] if call is None else []) + [f"call_{index}" for index in range(len(calls))]
        lines = [
            "%llguidance {}",
            f"start: analysis* ({' | '.join(ends)})",
            'analysis: <|channel|> "analysis" <|message|> TEXT <|end|> <|start|> "assistant"',
            'final: <|channel|> "final" <|message|> form',
            f"form: {final}",
            _TEXT,
            *(f"call_{index}: {rule}" for index, rule in enumerate(calls)),
        ]
        return self._compiled("\n".join(lines) + "\n", field)

    def _calls(self, tool: dict[str, Any]) -> list[str]:
        """The calls of a tool, each as the right side of a rule."""
        if is_builtin(tool):
            return [
                f'" to={name}" <|channel|> "analysis code" <|message|> TEXT <|call|>'
                for name in BUILTIN_CALLS[tool["type"]]
            ]
        name = json.dumps(f" to=functions.{tool['function']['name']}")
        arguments = _json(tool["function"].get("parameters") or {"type": "object"})
        constrain = "<|constrain|>" if "<|constrain|>" in self.template.tokenizer.get_vocab() else ""
        return [f'{name} <|channel|> "commentary " {constrain} "json" <|message|> {arguments} <|call|>']

    def follow(self, grammar: LLMatcher) -> Mask:
        """A fresh mask that makes one answer follow the grammar, for `Engine.submit`."""
        return Mask(grammar.deep_copy(), self.size, self.template.stop_ids[0])

    def _compiled(self, grammar: str, field: str) -> LLMatcher:
        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0][:300]
            raise bad(f"the form that {field} asks for cannot be followed: {reason}", field, "unsupported_schema")
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


def tool_name(tool: dict[str, Any]) -> str:
    """The name that `tool_choice` gives a tool: its function's, or the type of a built-in one."""
    name: str = tool["type"] if is_builtin(tool) else tool["function"]["name"]
    return name


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _SPACING})
