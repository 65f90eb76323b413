"""What every endpoint stands on: the models by name, limits, prompts rendered, answers asked for."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from llguidance import LLMatcher

from ossia.config.serve import ServeConfig
from ossia.errors import OssiaError
from ossia.infer.engine import Engine, Sampling, Token
from ossia.serve.answer import Answer, Delta, Splitter, usage
from ossia.serve.errors import ApiError, bad
from ossia.serve.grammar import Form, Mask, Vocabulary
from ossia.serve.metrics import Metrics
from ossia.serve.schema import StreamOptions
from ossia.serve.worker import Prompt, Work, Worker
from ossia.template.base import Template
from ossia.template.generic import GenericTemplate
from ossia.template.messages import Message, is_builtin

DEEPEST = 32
"""Levels that a schema may have; rendering it takes several calls a level."""

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass
class Ask:
    """What is to be answered, from whichever endpoint.

    `grammar` is one that the answers must follow; `copies` the number of answers to each prompt.
    """

    prompts: list[list[int]]
    sampling: Sampling
    model: str
    adapter: str | None
    splitter: Callable[[], Splitter]
    stops: list[str]
    copies: int = 1
    grammar: LLMatcher | None = None


class Run:
    """The answers to one `Ask` while they come. Whoever makes one closes it."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self.service, self.ask = service, ask
        logprobs = ask.sampling.top_logprobs is not None
        self.prompt_tokens = sum(map(len, ask.prompts))
        self.answers: list[Answer] = []
        self._masks: list[Mask | None] = []
        prompts = []
        for ids in ask.prompts:
            for copy in range(ask.copies):
                mask = service.vocabulary.follow(ask.grammar) if ask.grammar is not None else None
                seed = ask.sampling.seed
                sampling = ask.sampling if seed is None else replace(ask.sampling, seed=seed + copy)
                prompts.append(Prompt(ids, sampling, ask.adapter, ask.model, mask))
                self._masks.append(mask)
                self.answers.append(Answer(ask.splitter(), ask.stops, service.vocabulary if logprobs else None))
        self.work: Work = service.worker.submit(prompts)
        service.metrics.prompt_tokens.labels(ask.model).inc(self.prompt_tokens)

    def close(self) -> None:
        """Give up what is unfinished."""
        self.work.close()

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """How each object of a chat or a completion begins."""
        return {"id": new_id(prefix), "object": kind, "created": int(time.time()), "model": self.ask.model}

    async def deltas(self) -> AsyncIterator[tuple[int, list[Delta]]]:
        """(answer, what came); the last one of an answer comes when its `reason` is set.

        Raises:
            ApiError: the engine failed, or a grammar could not go on.
        """
        async for index, item in self.work:
            answer = self.answers[index]
            if isinstance(item, Token):
                deltas = answer.push(item)
                if answer.stopped:
                    self.work.stop(index)
                if deltas:
                    yield index, deltas
                continue
            if (mask := self._masks[index]) is not None and mask.failed:
                raise bad(f"the answer could not follow its form ({mask.failed[:200]})", "response_format")
            yield index, answer.end(item.reason)

    async def chunks(
        self,
        head: dict[str, Any],
        options: StreamOptions | None,
        begin: Sequence[tuple[int, dict[str, Any]]],
        piece: Callable[[Answer, Delta | None], dict[str, Any] | None],
    ) -> AsyncIterator[str]:
        """The answers as server-sent events of chats and completions.

        Args:
            head: of each.
            begin: (answer, choice) that come before all.
            piece: the choice that holds a delta of an answer, None for one that is not told; of None: the one that
                ends it.
        """
        with_usage = bool(options and options.include_usage)

        def chunk(index: int, choice: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": index, **choice, "finish_reason": reason}
            return event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

        try:
            for index, choice in begin:
                yield chunk(index, choice)
            async for index, deltas in self.deltas():
                answer = self.answers[index]
                for delta in deltas:
                    if (told := piece(answer, delta)) is not None:
                        yield chunk(index, told)
                if answer.reason is not None:
                    yield chunk(index, piece(answer, None) or {}, answer.reason)
            if with_usage:
                yield event({**head, "choices": [], "usage": usage(self.prompt_tokens, self.answers)})
        except ApiError as error:
            yield event(error.body())
            return
        yield event("[DONE]")

    async def finish(self) -> list[Answer]:
        """The whole answers."""
        async for _ in self.deltas():
            pass
        return self.answers


class Service:
    """The models that are served; `templates` by adapter, and None for the base."""

    def __init__(self, engine: Engine, templates: dict[str | None, Template], config: ServeConfig, base: str) -> None:
        self.engine = engine
        self.templates = templates
        self.config = config
        self.created = int(time.time())
        self.metrics = Metrics()
        self.worker = Worker(engine, config.max_queue, self.metrics)
        self.vocabulary = Vocabulary(engine.template, engine.model.config.vocab_size)
        self.stopping = False
        self._models: dict[str, str | None] = {**{name: name for name in engine.adapters}, base: None}
        # Tokenizers are not all fit for several threads; one keeps long prompts off the event loop.
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="render")
        # Its table takes seconds to build for 200,000 words.
        self._renderer.submit(self.vocabulary.bytes, 0)

    @property
    def models(self) -> list[str]:
        """Names that requests may give; the first is the default."""
        return list(self._models)

    def model(self, name: str | None) -> tuple[str, str | None]:
        """(name, adapter or None for the base) of the model that a request names; ApiError 404 for an unknown one."""
        name = name or self.models[0]
        if name not in self._models:
            raise ApiError(
                404,
                f"no model {name[:100]!r} here; there is {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return name, self._models[name]

    async def off_loop(self, work: Callable[[], Any]) -> Any:
        """Run tokenizer work in its thread; what the template refuses is a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._renderer, work)
        except OssiaError as error:
            raise bad(str(error), "messages") from error
        except RecursionError:
            raise bad("nested too deeply") from None

    async def prompt(
        self, adapter: str | None, messages: list[Message], tools: Sequence[dict[str, Any]], effort: str | None
    ) -> list[int]:
        """Token ids after which the model answers; ApiError for what the model's chat template would not show."""
        template = self.templates[adapter]
        if isinstance(template, GenericTemplate):
            if effort is not None and not template.reads("reasoning_effort"):
                raise bad("this model's chat template has no reasoning effort; leave it out", "reasoning_effort")
            if not (template.reads("tools") or all(map(is_builtin, tools))):
                raise bad("this model's chat template shows no tools; leave them out", "tools")
            if any(message.tool_calls for message in messages) and not template.reads("tool_calls"):
                raise bad("this model's chat template shows no tool calls; write them as text", "messages")
        return await self.off_loop(lambda: template.prompt(messages, tools=tools, reasoning_effort=effort))

    async def grammar(self, form: Form | None, tools: list[dict[str, Any]], call: str | None) -> LLMatcher:
        """See `Vocabulary.grammar`."""
        return await self.off_loop(lambda: self.vocabulary.grammar(form, tools, call))

    def room(self, prompts: list[list[int]], asked: int | None, default: int | None = None) -> int:
        """Tokens that an answer to the longest prompt may have: what is asked for, cut to the limits, which the
        answer's end then tells. ApiError for a prompt over them."""
        longest, limits = max(map(len, prompts)), self.config
        most = self.engine.max_length
        if not min(map(len, prompts)):
            raise bad("the prompt has no tokens", "prompt")
        if longest > (limits.max_prompt_tokens or most - 1) or longest >= most:
            allowed = min(limits.max_prompt_tokens or most - 1, most - 1)
            raise bad(
                f"the prompt has {longest:,} tokens; at most {allowed:,} are taken here",
                "messages",
                "context_length_exceeded",
            )
        return min(asked or default or limits.max_new_tokens, limits.max_new_tokens, most - longest)


def new_id(kind: str) -> str:
    """A fresh id, such as `chatcmpl-…`."""
    return f"{kind}{secrets.token_hex(12)}"


def event(body: Any, name: str | None = None) -> str:
    """A server-sent event."""
    data = body if isinstance(body, str) else _JSON.encode(body)
    return (f"event: {name}\n" if name else "") + f"data: {data}\n\n"


def check_schema(schema: Any, field: str) -> None:
    """ApiError for a schema that is nested too deeply."""
    level = [schema]
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
        if not level:
            return
    raise bad(f"{field} is nested more than {DEEPEST} levels deep", field)
