"""`ossia verify`: does an exported model say what base + adapter say? Both read the same tokens and answer the same
questions, one after the other, so that memory is that of one model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from ossia.adapters.files import CONFIG as ADAPTER_CONFIG
from ossia.config import InferConfig, VerifyConfig
from ossia.config.parts import ModelOptions, TemplateOptions
from ossia.console import progress, say
from ossia.errors import OssiaError, UsageError
from ossia.export.card import put_verification
from ossia.export.folder import write_json
from ossia.export.rows import conversations_of
from ossia.model.folder import holds_mxfp4, weight_files
from ossia.template.history import readable, split_answer
from ossia.template.messages import Conversation, Message

RESULT = "verification.json"

_SHOWN = "What is the capital of Japan?"
"""Asked first, and told with its answers: a row may be nobody's business."""
_QUESTIONS = (
    "A train leaves at 14:35 and arrives at 17:10. How long does it take?",
    "用一句话解释什么是光合作用。",
    "Write a haiku about the sea.",
)
_TOKENS = 2048
"""Of a pass over the rows, all of whose logits exist at a time."""
_POSITIONS = 512
"""Positions whose whole logits are compared; the likeliest token is at all of them."""


@dataclass(frozen=True)
class Verification:
    """What `verification.json` holds. `logit_error` is ‖difference‖ / ‖original's logits‖; `same_token` the share of
    positions at which both find the same token likeliest; `greedy_agreement` the share of the original's answers,
    chosen greedily, that the export gives token for token up to the first difference; `stopped` of `answers` ended by
    themselves within `max_new_tokens`, and `original_stopped` of the original's."""

    verified: bool
    reason: str
    logit_error: float
    max_logit_error: float
    same_token: float
    min_agreement: float
    positions: int
    greedy_agreement: float
    answers: int
    stopped: int
    original_stopped: int
    max_new_tokens: int
    question: str
    original_answer: str
    exported_answer: str


def run(config: VerifyConfig) -> Verification:
    """Compare, print, and write `verification.json` into the exported folder.

    Raises:
        UsageError: folders or rows that are not there.
        OssiaError: further apart than the limits; the result is written all the same.
    """
    exported = _folder(str(config.exported))
    original = _original(config)
    texts = _rows(config)
    if not texts:
        raise UsageError("--dataset has no conversations, only texts")
    options = {name: getattr(config, name) for name in ModelOptions.__dataclass_fields__ if name != "model"}
    say(f"verifying {exported}")
    first = _read(InferConfig(**original, **options), texts, config)
    # What the adapter's run says of the template, `first` has taken over by now.
    template = {name: getattr(first.config, name) for name in TemplateOptions.__dataclass_fields__}
    second = _read(InferConfig(model=str(exported), **template, **options), texts, config, first)
    result = _compare(config, exported, first, second)
    write_json(exported / RESULT, asdict(result))
    told = lines(result)
    put_verification(exported, told)
    for line in told:
        say(line)
    if not result.verified:
        raise OssiaError(f"{exported}: not verified, {result.reason}; {exported / RESULT} has the figures")
    return result


def lines(result: Verification) -> list[str]:
    """A result for people."""
    return [
        f"logits: {result.logit_error:.4f} relative error (limit {result.max_logit_error:g})",
        f"likeliest token: the same at {result.same_token:.2%} of {result.positions:,} positions (limit "
        f"{result.min_agreement:.0%})",
        f"greedy answers: {result.greedy_agreement:.1%} of their tokens the same up to the first difference; "
        f"{result.stopped} of {result.answers} ended by themselves, {result.original_stopped} of the original's",
        f"asked: {result.question}",
        f"original: {result.original_answer}",
        f"exported: {result.exported_answer}",
        "verified" if result.verified else f"NOT verified: {result.reason}",
    ]


def _original(config: VerifyConfig) -> dict[str, Any]:
    """Options of `ossia infer` that load the original."""
    folder = _folder(str(config.original), ADAPTER_CONFIG)
    kind = "adapters" if (folder / ADAPTER_CONFIG).is_file() else "model"
    if kind == "model" and config.model is not None:
        raise UsageError(f"--model is the base of an adapter, and {folder} is none")
    return {
        kind: [str(folder)] if kind == "adapters" else str(folder),
        **({} if config.model is None else {"model": config.model}),
    }


def _folder(name: str, *instead: str) -> Path:
    """The absolute folder of a model, or of what a file marks instead."""
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder")
    if not any((folder / file).is_file() for file in ("config.json", *instead)):
        raise UsageError(f"{name}: neither a model nor an adapter (no {' or '.join(('config.json', *instead))})")
    return folder


def _rows(config: VerifyConfig) -> list[Conversation]:
    """The rows that are asked for; else those held out of the run, else questions."""
    adapter = Path(str(config.original)).expanduser().resolve()
    found = conversations_of(adapter, config.dataset, "val_dataset", config)
    if found is None:
        return [_question(question) for question in _QUESTIONS[: config.rows]]
    return list(islice(found, config.rows))


def _question(text: str) -> Conversation:
    return Conversation([Message("user", text)])


@dataclass
class _Reading:
    """What a model makes of the rows: its own settings, tokens of each row, logits and likeliest tokens of them."""

    config: InferConfig
    prompts: list[list[int]]
    answers: list[list[int]]
    shown: list[str]
    stops: list[int]
    rows: list[list[int]]
    logits: list[Any]
    tokens: list[Any]


def _read(
    options: InferConfig, texts: list[Conversation], config: VerifyConfig, before: _Reading | None = None
) -> _Reading:
    """Load a model, let it answer and read. After another it reads the other's rows."""
    import torch

    from ossia.infer.engine import Sampling
    from ossia.infer.reading import readings
    from ossia.infer.run import load_engine

    engine = load_engine(options)
    if before is None:
        prompts = [_prompt(engine.template, text) for text in [_question(_SHOWN), *texts][: config.prompts]]
    else:
        prompts = before.prompts
    answers = [
        engine.generate([prompt], Sampling(max_new_tokens=config.max_new_tokens))[0]
        for prompt in _shown(prompts, "answering", "questions")
    ]
    if before is None:
        rows = [engine.template.render(text).input_ids for text in texts if text.messages[-1].role == "assistant"]
        rows = rows or [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rows = [row[: config.max_length] for row in rows]
    else:
        rows = before.rows
    every = max(1, -(-sum(map(len, rows)) // _POSITIONS))
    logits, tokens = [], []
    with torch.inference_mode(), progress("reading", len(rows), "rows") as advance:
        for reading in readings(engine.model, rows, _TOKENS):
            found = engine.model(**reading.inputs, use_cache=False).logits[0]
            for first, end in reading.places:
                out = found[first:end]
                tokens.append(out.argmax(-1).cpu())
                logits.append(out[::every].float().cpu())
            advance(len(reading.places))
    stops = engine.template.stop_ids
    replies = map(engine.template.parse, answers)
    shown = [" ".join(readable(reply.content, reply.tool_calls).split()) or "(no answer yet)" for reply in replies]
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _Reading(options, prompts, answers, shown, stops, rows, logits, tokens)


def _shown(items: list[Any], label: str, unit: str) -> Iterator[Any]:
    with progress(label, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


def _prompt(template: Any, text: Conversation) -> list[int]:
    """Up to the last answer of a row, if it ends in one."""
    asked, _ = split_answer(text.messages)
    return template.prompt(asked, tools=text.tools, reasoning_effort=text.reasoning_effort)


def _compare(config: VerifyConfig, exported: Path, first: _Reading, second: _Reading) -> Verification:
    import torch

    rounded = holds_mxfp4(weight_files(exported))
    limit = config.max_logit_error if config.max_logit_error is not None else 0.3 if rounded else 0.05
    floor = config.min_agreement if config.min_agreement is not None else 0.8 if rounded else 0.95
    want, got = (torch.cat(reading.logits).double() for reading in (first, second))
    error = ((got - want).norm() / want.norm()).item()
    likeliest, found = (torch.cat(reading.tokens) for reading in (first, second))
    same = (likeliest == found).double().mean().item()
    reason = ""
    if not error <= limit:
        reason = f"the logits' relative error is {error:.4f}, over {limit:g}"
    elif same < floor:
        reason = f"the likeliest token is the same at {same:.2%} of the positions, under {floor:.0%}"
    pairs = list(zip(first.answers, second.answers, strict=True))
    agreed = sum(_agreement(one, other) for one, other in pairs)
    return Verification(
        verified=not reason,
        reason=reason,
        logit_error=error,
        max_logit_error=limit,
        same_token=same,
        min_agreement=floor,
        positions=len(found),
        greedy_agreement=agreed / max(sum(len(one) for one, _ in pairs), 1),
        answers=len(pairs),
        stopped=_stopped(second),
        original_stopped=_stopped(first),
        max_new_tokens=config.max_new_tokens,
        question=_SHOWN,
        original_answer=first.shown[0],
        exported_answer=second.shown[0],
    )


def _agreement(one: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _stopped(reading: _Reading) -> int:
    return sum(bool(answer) and answer[-1] in reading.stops for answer in reading.answers)
