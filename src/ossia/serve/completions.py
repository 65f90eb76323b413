"""/v1/completions: text goes on, without a chat format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ossia.infer.engine import Sampling, Token
from ossia.serve.answer import Answer, Delta, PlainSplitter, usage
from ossia.serve.chat import stop_list
from ossia.serve.errors import bad
from ossia.serve.grammar import Vocabulary
from ossia.serve.schema import CompletionRequest
from ossia.serve.service import Ask, Run, Service

DEFAULT_TOKENS = 16


async def completion_ask(service: Service, body: CompletionRequest) -> Ask:
    """What a completion asks of the engine; ApiError names what is wrong."""
    name, adapter = service.model(body.model)
    if body.echo and body.logprobs is not None:
        raise bad("echo with logprobs is not supported here; leave one out", "echo", "unsupported_parameter")
    texts = _prompts(body.prompt)
    size = service.vocabulary.size
    for text in texts:
        if not isinstance(text, str) and any(not 0 <= id < size for id in text):
            raise bad(f"prompt has a token id outside 0 to {size - 1}", "prompt")
    tokenizer = service.engine.template.tokenizer
    prompts = await service.off_loop(
        lambda: [tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
    )
    return Ask(
        prompts=prompts,
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=service.room(prompts, body.max_tokens, DEFAULT_TOKENS),
            seed=body.seed,
            top_logprobs=body.logprobs,
            ignore_eos=bool(body.ignore_eos),
        ),
        model=name,
        adapter=adapter,
        splitter=lambda: PlainSplitter(service.engine.template),
        stops=stop_list(body.stop),
        copies=body.n or 1,
    )


async def answer_completion(body: CompletionRequest, run: Run) -> dict[str, Any]:
    """The whole answers, as one object."""
    answers = await run.finish()
    echoes = await _echoes(body, run)
    choices = [
        {
            "index": index,
            "text": echoes[index] + answer.content,
            "logprobs": _logprobs(answer.tokens, answer.vocabulary, 0),
            "finish_reason": answer.reason,
        }
        for index, answer in enumerate(answers)
    ]
    head = run.head("cmpl-", "text_completion")
    return {**head, "choices": choices, "usage": usage(run.prompt_tokens, answers)}


async def stream_completion(body: CompletionRequest, run: Run) -> AsyncIterator[str]:
    """The answers as server-sent events."""

    def piece(answer: Answer, delta: Delta | None) -> dict[str, Any]:
        if delta is None:
            return {"text": "", "logprobs": None}
        start = len(answer.content) - len(delta.text)
        return {"text": delta.text, "logprobs": _logprobs(list(delta.tokens), answer.vocabulary, start)}

    echoes = await _echoes(body, run)
    begin = [(index, {"text": echo, "logprobs": None}) for index, echo in enumerate(echoes) if echo]
    async for text in run.chunks(run.head("cmpl-", "text_completion"), body.stream_options, begin, piece):
        yield text


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad("prompt is empty", "prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt


async def _echoes(body: CompletionRequest, run: Run) -> list[str]:
    ask, service = run.ask, run.service
    if not body.echo:
        return [""] * (len(ask.prompts) * ask.copies)
    tokenizer = service.engine.template.tokenizer
    texts = await service.off_loop(lambda: [tokenizer.decode(ids, skip_special_tokens=True) for ids in ask.prompts])
    return [text for text in texts for _ in range(ask.copies)]


def _logprobs(tokens: list[Token], vocabulary: Vocabulary | None, start: int) -> dict[str, Any] | None:
    if vocabulary is None:
        return None
    texts = [vocabulary.text(token.id) for token in tokens]
    offsets = [start + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{vocabulary.text(id): value for id, value in token.top} for token in tokens],
        "text_offset": offsets,
    }
