"""Answers to the rows of a file, one JSON object a line, in the file's order.

While rows are answered, those that are done are appended to `<result>.part`, in the order they end; the result itself
is written from there in one step when all are. A run that was killed goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ossia.adapters.files import CONFIG, WEIGHTS, check_adapter
from ossia.adapters.origin import fingerprint
from ossia.config import InferConfig
from ossia.console import counted, progress, say
from ossia.data.render import Counts, read_rows, refuse_bad, spoiled
from ossia.errors import OssiaError, UsageError
from ossia.infer.metrics import calls_lines, metrics_line
from ossia.infer.sampling import Sampling, Token
from ossia.template.base import Template
from ossia.template.history import readable, reply_messages, split_answer
from ossia.template.messages import Conversation, Message, ToolCall

if TYPE_CHECKING:
    from ossia.infer.engine import Engine, Request

_NOT_OF_ANSWERS = {"config", "debug", "device", "stream", "markdown", "max_batch_size", "resume", "result_path"}
"""Options that change no answer."""


@dataclass
class Answers:
    """The rows of `--val_dataset`, their prompts, and what is answered already."""

    config: InferConfig
    template: Template
    path: Path
    rows: list[Conversation]
    prompts: list[list[int]]
    done: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: InferConfig, base: Path, template: Template) -> Answers:
        """Read the rows, and what a run that was killed has left. Loads no model.

        Raises:
            UsageError: rows that cannot be read, a result that cannot be written, a rest of other rows or settings.
        """
        rows, prompts = _read(config, template)
        answers = cls(config, template, Path(str(config.result_path)).expanduser(), rows, prompts)
        answers._take_up(_identity(config, base, template, rows, prompts))
        return answers

    @property
    def part(self) -> Path:
        """Where rows that are done wait for the others."""
        return self.path.with_name(self.path.name + ".part")

    def answer(self, engine: Engine) -> None:
        """Answer what is left, longest prompts first.

        Raises:
            UsageError: a prompt that the model cannot take; nothing was answered then.
        """
        left = sorted(set(range(len(self.rows))) - self.done.keys(), key=lambda row: -len(self.prompts[row]))
        for row in left:
            if len(self.prompts[row]) >= engine.max_length:
                raise UsageError(
                    f"--val_dataset: {self.rows[row].source} has {len(self.prompts[row]):,} tokens; with room for an "
                    f"answer a prompt may have {engine.max_length - 1:,}"
                )
        running: dict[Request, int] = {}
        for row in left:
            running[engine.submit(self.prompts[row], _sampling(self.config, row))] = row
        started, tokens = time.monotonic(), 0

        def rate() -> str:
            return f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"

        with self.part.open("ab") as part, progress("answering", len(left), "rows", rate) as advance:
            while running:
                came = engine.step()
                tokens += len(came)
                for request in dict.fromkeys(request for request, _ in came):
                    if request.finish_reason is None:
                        continue
                    row = running.pop(request)
                    self.done[row] = self._answered(row, request)
                    part.write(_line({"row": row, "answer": self.done[row]}))
                    part.flush()
                    os.fsync(part.fileno())
                    advance(1)
        seconds = time.monotonic() - started
        say(f"{counted(len(left), 'row')} answered in {seconds:.1f} s ({len(left) / seconds:.2f} rows/s, {rate()})")

    def finish(self) -> None:
        """Write the result in the rows' order, and say how good it is where rows have answers of their own."""
        whole = self.path.with_name(self.path.name + ".whole")
        with whole.open("wb") as file:
            for row in range(len(self.rows)):
                file.write(_line(self.done[row]))
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.path)
        self.part.unlink(missing_ok=True)
        say(f"{counted(len(self.rows), 'answer')} in {self.path}")
        for line in self._figures():
            say(line)

    def _figures(self) -> list[str]:
        """How near the answers are to those that rows have: texts to texts, calls to calls."""
        texts: list[tuple[str, str]] = []
        calls: list[tuple[list[ToolCall], list[ToolCall]]] = []
        for row, conversation in enumerate(self.rows):
            done = self.done[row]
            asked, answer = split_answer(conversation.messages)
            labels = [call for message in answer for call in message.tool_calls]
            if not labels and done["labels"]:
                texts.append((done["response"], done["labels"]))
            if answer:
                calls.append((_calls_of(done["messages"][len(asked) :]), labels))
        lines = [metrics_line(*map(list, zip(*texts, strict=True)))] if texts else []
        return [*lines, *calls_lines(calls)]

    def _take_up(self, identity: str) -> None:
        """Start the file of finished rows, or read it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            lines = (
                self.part.read_bytes().splitlines(keepends=True) if self.config.resume and self.part.exists() else []
            )
            # A line without its end was being written when the run was killed.
            lines = [line for line in lines if line.endswith(b"\n")]
            if not lines:
                self.part.write_bytes(_line({"rows": len(self.rows), "identity": identity}))
                return
            if json.loads(lines[0]).get("identity") != identity:
                raise UsageError(
                    f"{self.part} has answers to other rows, of another model or by other settings; --resume false "
                    "drops them, another --result_path keeps them"
                )
            self.done = {entry["row"]: entry["answer"] for entry in map(json.loads, lines[1:])}
            with self.part.open("r+b") as file:
                file.truncate(sum(map(len, lines)))
        except OSError as error:
            raise UsageError(f"--result_path {self.path}: cannot be written ({error.strerror})") from error
        if self.done:
            say(f"going on: {len(self.done):,} of {len(self.rows):,} rows are answered in {self.part}")

    def _answered(self, row: int, request: Request) -> dict[str, Any]:
        conversation = self.rows[row]
        asked, _ = split_answer(conversation.messages)
        reply = self.template.parse(request.ids)
        return {
            "response": readable(reply.content, reply.tool_calls),
            "labels": _label(conversation),
            "logprobs": openai_logprobs(self.template, request.tokens) if self.config.logprobs else None,
            "messages": list(map(row_message, [*asked, *reply_messages(self.template, request.ids)])),
            "tools": conversation.tools or None,
            "reasoning_effort": conversation.reasoning_effort,
            "reasoning": reply.thinking or None,
            "finish_reason": request.finish_reason,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(request.tokens),
        }


def openai_logprobs(template: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """Tokens' log-probabilities as OpenAI's API and ms-swift shape them; `bytes` is null for part of a character."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        text = template.tokenizer.decode([id])
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ]
    }


def _sampling(config: InferConfig, row: int) -> Sampling:
    """Every row draws by itself, so that neither the batch nor a new start changes it."""
    asked = config.top_logprobs if config.logprobs else None
    return Sampling(config.temperature, config.top_p, config.max_new_tokens, (config.seed << 32) + row, asked)


def _identity(
    config: InferConfig, base: Path, template: Template, rows: list[Conversation], prompts: list[list[int]]
) -> str:
    """A text that differs where an answer may: weights, settings, prompts and labels."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_ANSWERS}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    found.update((template.fingerprint() + fingerprint(base)).encode())
    for name in config.adapters:
        for file in (CONFIG, WEIGHTS):
            with (check_adapter(name) / file).open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
    for row, prompt in zip(rows, prompts, strict=True):
        found.update(json.dumps([prompt, _label(row)]).encode())
    return found.hexdigest()


def _line(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _read(config: InferConfig, template: Template) -> tuple[list[Conversation], list[list[int]]]:
    """The rows that can be answered, and their prompts; says how many cannot, or stops, as the options want it."""
    rows: list[Conversation] = []
    prompts: list[list[int]] = []
    counts = Counts()
    for outcome in read_rows(config.val_dataset, config, config.seed, "--val_dataset"):
        if (row := outcome.conversation) is not None:
            try:
                prompts.append(_prompt(row, template))
                rows.append(row)
            except (OssiaError, RecursionError) as error:
                outcome = spoiled(outcome.source, error)
        refuse_bad(outcome, config)
        counts.add(outcome)
    for line in counts.remarks(config):
        say(f"--val_dataset: {line}")
    if not rows:
        raise UsageError(f"--val_dataset {' '.join(config.val_dataset)}: no row to answer")
    return rows, prompts


def _prompt(row: Conversation, template: Template) -> list[int]:
    messages, _ = split_answer(row.messages)
    if not messages:
        raise OssiaError("nothing is asked in this row; it needs a message before the answer")
    return template.prompt(messages, tools=row.tools, reasoning_effort=row.reasoning_effort)


def _label(row: Conversation) -> str | None:
    """A row's own answer, for people; None where it has none."""
    _, answer = split_answer(row.messages)
    if not answer:
        return None
    content = "\n\n".join(message.content for message in answer if message.content.strip())
    return readable(content, (call for message in answer for call in message.tool_calls))


def row_message(message: Message) -> dict[str, Any]:
    """A message as rows have it."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("thinking", "name", "channel"):
        if value := getattr(message, name):
            row[name] = value
    if message.loss is not None:
        row["loss"] = message.loss
    if message.tool_calls:
        row["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return row


def _calls_of(messages: list[dict[str, Any]]) -> list[ToolCall]:
    """The calls in messages of `row_message`."""
    return [ToolCall(**call["function"]) for message in messages for call in message.get("tool_calls", ())]
