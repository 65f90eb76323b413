"""Any chat template of Hugging Face, with loss weights found from the template itself.

Where the template marks answers with `{% generation %}`, those marks are the mask. Elsewhere the conversation is
rendered up to each answer with the generation prompt and up to its end, and both must be prefixes of the whole row,
token for token: then an answer is what a model would have had to generate there. The token that ends the answer is
trained too, what the template writes after it is not.

The name of a control token in a message stays text (see `control`) where the template leaves messages as they are.
Where it does not, `unguarded` says so. The tags of reasoning that an answer begins with are control tokens where the
tokenizer has them as such, and so is a `<think>` elsewhere in what the assistant says.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ossia.errors import OssiaError
from ossia.template.base import LossWeights, TextStream, digest, plain_text
from ossia.template.control import ControlNames, mark_for
from ossia.template.messages import Conversation, Message, Piece, Rendered, Reply, is_builtin
from ossia.template.think import CLOSE, OPEN, split_think

_THINK_TAGS = (OPEN, CLOSE)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK = re.compile(r"\s*(<think>)?(.*?)</think>\s*", re.DOTALL)
_PROBE = "ossia"
_PROBED = 8


class _Span(NamedTuple):
    """The tokens [start, end) that a model generates for one answer."""

    start: int
    end: int
    message: Message | None
    weight: float


class GenericTemplate:
    """Renders through `tokenizer.apply_chat_template`."""

    name = "generic"

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str | None = None,
        reasoning_effort: str = "medium",
        model_identity: str | None = None,
        loss: LossWeights = LossWeights(),  # noqa: B008  (frozen)
    ) -> None:
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise OssiaError(
                f"the tokenizer in {tokenizer.name_or_path or 'memory'} has no chat template: chat_template.jinja is "
                "missing; copy it from the instruction-tuned model of this family into the folder"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.reasoning_effort = reasoning_effort
        self.model_identity = model_identity
        self.loss = loss
        self._source: str = source
        self._marked = bool(_GENERATION.search(source))
        added = tokenizer.added_tokens_decoder.items()
        self._special = {id for id, token in added if token.special and token.content not in _THINK_TAGS}

        self.opens_thinking = False
        turn_end: int | None = None
        # A template may refuse the probe, for example for want of a system message; the end token is then eos alone.
        with contextlib.suppress(OssiaError):
            question, answer = Message("user", "a"), Message("assistant", _PROBE)
            self.opens_thinking = self._text([question], prompt=True).rstrip().endswith(OPEN)
            tail = self._text([question, answer]).rpartition(_PROBE)[2]
            turn_end = next((id for id in self._encode(tail) if id in self._special), None)
        found = (turn_end, tokenizer.eos_token_id)
        self.stop_ids = list(dict.fromkeys(id for id in found if id is not None))
        if not self.stop_ids:
            raise OssiaError(
                f"the tokenizer in {tokenizer.name_or_path or 'memory'} has no eos_token and its template ends an "
                "answer with no special token; set eos_token in tokenizer_config.json"
            )
        self._names = ControlNames(tokenizer, source)
        self.unguarded = self._unguarded()
        self._rewrites = self.unguarded is not None and not self._names.unsafe
        self.pad_id: int = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def fingerprint(self) -> str:
        """See `Template`."""
        settings = (self.name, self._source, self.system, self.reasoning_effort, self.model_identity, self.loss)
        return digest(self.tokenizer, *settings)

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable such as `tools`."""
        return variable in self._source

    def render(self, conversation: Conversation) -> Rendered:
        """Tokens of a training row.

        Raises OssiaError where the template refuses the row or changes earlier tokens as the conversation goes on.
        """
        if conversation.text is not None:
            eos = self.tokenizer.eos_token_id
            return plain_text(self._encode(conversation.text), self.stop_ids[0] if eos is None else eos)
        messages = self._with_system(conversation.messages)
        ids, spans = self._spans(messages, conversation)
        everything = self.loss.base == "all"
        weights = [float(everything)] * len(ids)
        channels = [""] * len(ids)
        for span in spans:
            size = span.end - span.start
            thought, blank = self._reasoning(ids, span)
            reasoning = span.weight * self.loss.reasoning
            if blank and self.loss.ignore_empty_think:
                reasoning = 0.0
            elif span.message is not None and span.message.loss is not None:
                reasoning = span.weight
            weights[span.start : span.end] = [reasoning] * thought + [span.weight] * (size - thought)
            channels[span.start : span.end] = ["analysis"] * thought + ["final"] * (size - thought)
        return Rendered(ids, ids.copy(), weights, channels)

    def prompt(
        self, messages: list[Message], *, tools: Sequence[dict[str, Any]] = (), reasoning_effort: str | None = None
    ) -> list[int]:
        """Token ids with the template's generation prompt at the end."""
        return self._ids(self._with_system(messages), tools, reasoning_effort, prompt=True)

    def parse(self, ids: list[int]) -> Reply:
        """The reply: `<think>` apart, special tokens left out; calls stay in the text as the model wrote them."""
        splitter = self.stream()
        pieces: list[tuple[str, str]] = []
        finished = False
        for token in ids:
            if token in self.stop_ids:
                finished = True
                break
            pieces += splitter.push(token)
        pieces += splitter.flush()
        content = "".join(text for channel, text in pieces if channel == "final")
        thinking = "".join(text for channel, text in pieces if channel == "analysis")
        return Reply(content, thinking, (), finished)

    def stream(self) -> ThinkSplitter:
        """A fresh splitter for one reply."""
        return ThinkSplitter(self)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system and not any(m.role in ("system", "developer") and m.content.strip() for m in messages):
            return [Message("system", self.system), *messages]
        return messages

    def _spans(self, messages: list[Message], row: Conversation) -> tuple[list[int], list[_Span]]:
        base = self.loss.base
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        weights: dict[int, float] = {}
        for i, message in enumerate(messages):
            if message.role == "assistant":
                default = 0.0 if base == "last_round" and i <= last_user else 1.0
                weights[i] = default if message.loss is None else message.loss
            elif message.loss:
                raise OssiaError(f"messages[{i}] ({message.role}) has loss {message.loss}; only harmony trains it")
        if self._marked:
            return self._marked_spans(messages, row, weights)
        ids = self._ids(messages, row.tools, row.reasoning_effort)
        modified = self.loss.reasoning != 1 or self.loss.ignore_empty_think
        if base == "all" and not modified and all(message.loss is None for message in messages):
            return ids, []
        spans = []
        for i, weight in weights.items():
            if not weight and base != "all":
                continue
            start = self._prefix(ids, messages[:i], row, i, prompt=True)
            end = len(ids) if i == len(messages) - 1 else self._prefix(ids, messages[: i + 1], row, i, prompt=False)
            spans.append(_Span(start, self._turn_end(ids, start, end), messages[i], weight))
        return ids, spans

    def _prefix(self, ids: list[int], messages: list[Message], row: Conversation, index: int, *, prompt: bool) -> int:
        """How many of `ids` the messages fill; OssiaError where they are not the first of `ids`."""
        part = self._ids(messages, row.tools, row.reasoning_effort, prompt=prompt)
        if ids[: len(part)] != part:
            other = (
                "" if self.loss.base == "last_round" else "train the last answers only with --loss_scale last_round, "
            )
            raise OssiaError(
                f"the chat template writes the tokens {'before' if prompt else 'of'} messages[{index}] otherwise once "
                f"the conversation goes on, so what to train cannot be told from it; {other}put {{% generation %}} … "
                "{% endgeneration %} around the answers in chat_template.jinja, or split the row after each answer"
            )
        return len(part)

    def _marked_spans(
        self, messages: list[Message], row: Conversation, weights: dict[int, float]
    ) -> tuple[list[int], list[_Span]]:
        ids, offsets, mask = self._masked(messages, row)
        runs: list[tuple[int, int]] = []
        position = 0
        for marked, group in groupby(mask):
            size = len(list(group))
            if marked:
                end = position + size
                # transformers 5.23 marks only the first token of the last character, which may have several.
                while end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
                    end += 1
                runs.append((position, self._turn_end(ids, position, end)))
            position += size
        if len(runs) == len(weights):
            pairs = zip(runs, weights.items(), strict=True)
            return ids, [_Span(start, end, messages[i], weight) for (start, end), (i, weight) in pairs]
        if len(set(weights.values())) > 1:
            raise OssiaError(
                f"the chat template marks {len(runs)} answers of {len(weights)}, so loss by message "
                "(loss in the row, --loss_scale last_round) cannot be told; join consecutive assistant messages"
            )
        weight = next(iter(weights.values()), 0.0)
        return ids, [_Span(start, end, None, weight) for start, end in runs]

    def _masked(self, messages: list[Message], row: Conversation) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """(ids, places in the text, 1 where the template marks an answer) of a row."""
        text, mark = self._written(messages, row.tools, row.reasoning_effort)
        found = self._apply(
            messages,
            row.tools,
            row.reasoning_effort,
            mark,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        places, mask = found["offset_mapping"], found["assistant_masks"]
        if mark is None:
            return list(found["input_ids"]), places, mask
        runs = [list(run) for inside, run in groupby(zip(mask, places, strict=True), lambda m: m[0]) if inside]
        answers = [(run[0][1][0], run[-1][1][1]) for run in runs]
        ids, places = self._names.encode(text, mark)
        return ids, places, [int(any(low <= place[0] < high for low, high in answers)) for place in places]

    def _turn_end(self, ids: list[int], start: int, end: int) -> int:
        """`end` moved behind the special token that ends the answer: back over white space, or forward by one."""
        back = end
        while back > start and ids[back - 1] not in self._special and not self._decode([ids[back - 1]]).strip():
            back -= 1
        if back > start and ids[back - 1] in self._special:
            return back
        return end + 1 if end < len(ids) and ids[end] in self._special else end

    def _reasoning(self, ids: list[int], span: _Span) -> tuple[int, bool]:
        """(tokens of reasoning the answer begins with, whether it is blank)."""
        answer = ids[span.start : span.end]
        found = _THINK.match(self._decode(answer))
        if not found or not (found[1] or self.opens_thinking):
            return 0, False
        count = bisect.bisect_left(range(len(answer)), found.end(), key=lambda n: len(self._decode(answer[:n])))
        return count, not found[2].strip()

    def _unguarded(self) -> str | None:
        """Why names of control tokens in messages can become control tokens; None where they cannot."""
        if self._names.unsafe:
            return f"its tokenizer writes {', '.join(self._names.unsafe[:4])} for the letters of the name too"
        names = sorted(self._names.names, key=lambda name: name not in self._source)[:_PROBED]
        text = " ".join(["a", *(name for name in names if name not in _THINK_TAGS), "b"])
        with contextlib.suppress(OssiaError):
            for messages in ([Message("user", text)], [Message("user", text), Message("assistant", text)]):
                mark = mark_for(text)
                if self._text(messages, mark=mark).replace(mark, "") != self._text(messages):
                    return "its chat template rewrites the text of messages"
        return None

    def _written(
        self,
        messages: list[Message],
        tools: Sequence[dict[str, Any]],
        effort: str | None,
        *,
        prompt: bool = False,
    ) -> tuple[str, str | None]:
        """(text, mark): names of control tokens in the messages have the mark in them; None where there are none."""
        text = self._text(messages, tools, effort, prompt=prompt)
        guarded = [(self._plain(message), _kept(message)) for message in messages] + [(list(tools), ())]
        if self._rewrites or not any(self._names.within(value, kept) for value, kept in guarded):
            return text, None
        mark = mark_for([text, *(value for value, _ in guarded)])
        marked = self._text(messages, tools, effort, mark=mark, prompt=prompt)
        if marked.replace(mark, "") != text:
            raise OssiaError(
                "a message names a control token of this tokenizer, and the chat template does with that text what it "
                f"does not do with others; take the name out ({', '.join(self._names.names[:6])} …)"
            )
        return marked, mark

    def _ids(
        self,
        messages: list[Message],
        tools: Sequence[dict[str, Any]],
        effort: str | None,
        *,
        prompt: bool = False,
    ) -> list[int]:
        text, mark = self._written(messages, tools, effort, prompt=prompt)
        return self._encode(text) if mark is None else self._names.encode(text, mark)[0]

    def _text(
        self,
        messages: list[Message],
        tools: Sequence[dict[str, Any]] = (),
        effort: str | None = None,
        *,
        mark: str | None = None,
        prompt: bool = False,
    ) -> str:
        if not messages:
            return ""
        return self._apply(messages, tools, effort, mark, tokenize=False, add_generation_prompt=prompt)

    def _apply(
        self,
        messages: list[Message],
        tools: Sequence[dict[str, Any]],
        effort: str | None,
        mark: str | None = None,
        **options: Any,
    ) -> Any:
        variables = {"reasoning_effort": effort or self.reasoning_effort, "model_identity": self.model_identity}
        options |= {name: value for name, value in variables.items() if value is not None and name in self._source}
        if builtin := [tool["type"] for tool in tools if is_builtin(tool)]:
            raise OssiaError(
                f"{' and '.join(builtin)} {'is a built-in tool' if len(builtin) == 1 else 'are built-in tools'} of "
                "gpt-oss, which this model's chat template cannot declare; declare a function"
            )
        plain, declared = [self._plain(message) for message in messages], list(tools)
        if mark is not None:
            plain = [self._names.marked(p, mark, _kept(m)) for p, m in zip(plain, messages, strict=True)]
            declared = self._names.marked(declared, mark)
        try:
            return self.tokenizer.apply_chat_template(plain, tools=declared or None, **options)
        except (TemplateError, TypeError) as error:
            raise OssiaError(f"the chat template refuses this conversation: {error}") from error

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as chat templates take it; arguments of calls as an object where they are one."""
        role = message.role
        if role == "developer" and "developer" not in self._source:
            role = "system"
        thinking, content = message.thinking, message.content
        if role == "assistant" and thinking is None and not content.lstrip().startswith(OPEN):
            # Tags that are whole are the template's to read.
            thinking, content = split_think(content)
        plain: dict[str, Any] = {"role": role, "content": content}
        if thinking and thinking.strip():
            if "reasoning_content" in self._source:
                plain["reasoning_content"] = thinking
            else:
                plain["content"] = f"{OPEN}\n{thinking}\n{CLOSE}\n\n{content}"
        if message.tool_calls:
            plain["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
                for call in message.tool_calls
            ]
        if message.name:
            plain["name"] = message.name
        return plain

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _kept(message: Message) -> tuple[str, ...]:
    """The names that stay control tokens in a message: the assistant's own tags of reasoning."""
    return _THINK_TAGS if message.role == "assistant" else ()


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text


_PARTS = {"start": (1, "final"), "analysis": (0, "analysis"), "final": (1, "final")}


class ThinkSplitter:
    """`Splitter` of replies with `<think>…</think>` at their start; white space around the two parts is left out."""

    def __init__(self, template: GenericTemplate) -> None:
        self._skip = template._special | set(template.stop_ids)
        self._stream = TextStream(template._decode)
        self._held = ""
        self._part = "analysis" if template.opens_thinking else "start"
        self._leading = True

    def push(self, token: int) -> list[tuple[str, str]]:
        """(channel, text) pieces that became printable with this token."""
        if token in self._skip:
            return []
        self._held += self._stream.push(token)
        return self._take()

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back when the reply ends."""
        self._held += self._stream.flush()
        pieces = self._take()
        rest, self._held = self._held.rstrip() if self._part == "analysis" else self._held, ""
        if rest:
            pieces.append(("analysis" if self._part == "analysis" else "final", rest))
        return pieces

    def read(self, token: int) -> list[Piece]:
        """As `push`, in two parts: reasoning and answer."""
        pieces = self._pieces(self.push(token))
        if token in self._skip:
            return pieces
        if not pieces:
            return [Piece(*_PARTS[self._part], "", ids=(token,))]
        return [*pieces[:-1], pieces[-1]._replace(ids=(token,))]

    def rest(self) -> list[Piece]:
        """As `flush`, for `read`."""
        return self._pieces(self.flush())

    @staticmethod
    def _pieces(shown: list[tuple[str, str]]) -> list[Piece]:
        return [Piece(*_PARTS[channel], text) for channel, text in shown]

    def _take(self) -> list[tuple[str, str]]:
        pieces: list[tuple[str, str]] = []
        while True:
            if self._leading:
                self._held = self._held.lstrip()
            if not self._held:
                return pieces
            if self._part == "start":
                if self._held.startswith(OPEN):
                    self._held, self._part = self._held[len(OPEN) :], "analysis"
                    continue
                if OPEN.startswith(self._held):
                    return pieces
                self._part = "final"
            if self._part == "final":
                pieces.append(("final", self._held))
                self._held, self._leading = "", False
                return pieces
            thought, closed, rest = self._held.partition(CLOSE)
            if not closed:
                thought = _before_tag(thought)
                rest = self._held[len(thought.rstrip()) :]
            if shown := thought.rstrip():
                pieces.append(("analysis", shown))
            self._leading = bool(closed) or (self._leading and not shown)
            self._held = rest
            if not closed:
                return pieces
            self._part = "final"


def _before_tag(text: str) -> str:
    """`text` without an end that could become `</think>`."""
    for size in range(min(len(text), len(CLOSE) - 1), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return text[:-size]
    return text
