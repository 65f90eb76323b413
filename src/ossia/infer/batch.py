"""Answers to the rows of a file, one JSON object a line, in the file's order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TextIO

from ossia.config import InferConfig
from ossia.config.parts import DataOptions
from ossia.console import progress, say
from ossia.data.render import Counts, conversations
from ossia.errors import UsageError
from ossia.infer.engine import Engine, Sampling
from ossia.template.messages import Conversation, Message


def answer_file(engine: Engine, config: InferConfig) -> None:
    """Write `response`, `labels`, `logprobs`, `messages` (as ms-swift names them), `reasoning` and `finish_reason`."""
    rows = list(conversations(config.val_dataset, DataOptions(), Counts(), "--val_dataset"))
    path = Path(str(config.result_path)).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens)
    started, tokens = time.monotonic(), 0
    try:
        out = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--result_path {path}: cannot be written ({error.strerror})") from error
    with out, progress("answering", len(rows), "rows") as advance:
        for start in range(0, len(rows), config.max_batch_size):
            part = rows[start : start + config.max_batch_size]
            tokens += _answer(engine, part, sampling, out)
            advance(len(part))
    seconds = time.monotonic() - started
    say(
        f"{len(rows):,} answers in {path} ({seconds:.1f} s, {len(rows) / seconds:.2f} rows/s, "
        f"{tokens / seconds:.0f} tokens/s)"
    )


def _answer(engine: Engine, rows: list[Conversation], sampling: Sampling, out: TextIO) -> int:
    asked = [_question(row) for row in rows]
    prompts = [
        engine.template.prompt(messages, tools=row.tools, reasoning_effort=row.reasoning_effort)
        for row, (messages, _) in zip(rows, asked, strict=True)
    ]
    replies = engine.generate(prompts, sampling)
    for (messages, label), ids in zip(asked, replies, strict=True):
        reply = engine.template.parse(ids)
        answer = {"role": "assistant", "content": reply.content}
        row = {
            "response": reply.content,
            "labels": label,
            "logprobs": None,
            "messages": [*map(plain_message, messages), answer],
            "reasoning": reply.thinking or None,
            "finish_reason": "stop" if reply.finished else "length",
        }
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
    out.flush()
    return sum(map(len, replies))


def _question(row: Conversation) -> tuple[list[Message], str | None]:
    """A row without its last answer, and that answer."""
    if row.messages[-1].role == "assistant":
        return row.messages[:-1], row.messages[-1].content
    return row.messages, None


def plain_message(message: Message) -> dict[str, Any]:
    """A message as rows have it, without its reasoning."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return plain
