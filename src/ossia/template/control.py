"""Keep names of control tokens in messages text: a chat template would turn them into control tokens.

A tokenizer finds its control tokens in the rendered text, so `<|im_end|>` in a user's message would end the turn. Here
such a name gets a mark, a character no message has, behind its first letter before the template renders it. The text
between two control tokens of the template is then cut out, freed of marks, and tokenised without added tokens: as the
tokenizer would, were the name an ordinary word. Text without such names is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer

_MARKS = range(0xF0000, 0xFFFFE)
_SENTINEL = "\U0010fffd"
_TAG = re.compile(r"[<\[].+[>\]]", re.DOTALL)


class ControlNames:
    """The control tokens of a tokenizer: special tokens, and added ones that look like tags or stand in the template.

    `unsafe` are those that the tokenizer gives for the plain letters too; they cannot be guarded.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        backend: Tokenizer = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = set(added)
        names = {
            token.content: id
            for id, token in added.items()
            if len(token.content) > 1
            and not token.content.isspace()
            and (token.special or token.content in source or _TAG.fullmatch(token.content))
        }
        # The same model without its added tokens; the sentinel stands for the control token before a piece.
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        self._plain.add_special_tokens([AddedToken(_SENTINEL, special=True, normalized=False)])
        ids = set(names.values())
        self.unsafe = (
            [] if ids.isdisjoint(self._ids(" ".join(names))) else [n for n in names if names[n] in self._ids(n)]
        )
        self.names = sorted(names.keys() - set(self.unsafe), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    def within(self, value: Any, kept: tuple[str, ...] = ()) -> bool:
        """Whether a text in `value` names a control token other than those `kept`."""
        return any(found[0] not in kept for text in _texts(value) for found in self._pattern.finditer(text))

    def marked(self, value: Any, mark: str, kept: tuple[str, ...] = ()) -> Any:
        """`value` with a mark in every name of a control token but those `kept`, in all texts of lists and objects."""
        if isinstance(value, str):
            return self._pattern.sub(lambda m: m[0] if m[0] in kept else f"{m[0][0]}{mark}{m[0][1:]}", value)
        if isinstance(value, dict):
            return {self.marked(key, mark, kept): self.marked(item, mark, kept) for key, item in value.items()}
        if isinstance(value, list):
            return [self.marked(item, mark, kept) for item in value]
        return value

    def encode(self, text: str, mark: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text with marks, which are left out, and the place of each token in `text`."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
        runs = [list(run) for _, run in groupby(tokens, lambda token: token[0] in self._added)]
        out: list[tuple[int, tuple[int, int]]] = []
        end = 0
        for index, run in enumerate(runs):
            if run[0][0] in self._added:
                out += run
                end = run[-1][1][1]
                continue
            stop = runs[index + 1][0][1][0] if index + 1 < len(runs) else len(text)
            out += self._piece(text[end:stop], end, mark) if mark in text[end:stop] else run
        return [id for id, _ in out], [place for _, place in out]

    def _piece(self, text: str, start: int, mark: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """The tokens of the piece of a text that begins at `start`, without its marks."""
        places = [start + i for i, letter in enumerate(text) if letter != mark]
        before = _SENTINEL if start else ""
        found = self._plain.encode(before + text.replace(mark, ""), add_special_tokens=False)
        for id, (low, high) in list(zip(found.ids, found.offsets, strict=True))[len(before) :]:
            low, high = low - len(before), high - len(before)
            first = places[min(low, len(places) - 1)]
            yield id, (first, places[high - 1] + 1 if high > low else first)

    def _ids(self, text: str) -> set[int]:
        return set(self._plain.encode(text, add_special_tokens=False).ids)


def mark_for(value: Any) -> str:
    """A character that no text in `value` has."""
    used = set().union(*_texts(value))
    return next(mark for mark in map(chr, _MARKS) if mark not in used)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
