"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from llguidance import LLMatcher

from ossia.infer.engine import Sampling, Token
from ossia.serve.answer import Answer, Delta, usage
from ossia.serve.errors import bad
from ossia.serve.grammar import Vocabulary
from ossia.serve.schema import ChatMessage, ChatRequest, Content, Stops
from ossia.serve.service import Ask, Run, Service, check_schema, new_id
from ossia.template.messages import Message, ToolCall


async def chat_ask(service: Service, body: ChatRequest) -> Ask:
    """What a chat asks of the engine; ApiError names what is wrong."""
    name, adapter = service.model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    choice = body.tool_choice or "auto"
    call = None if choice in ("auto", "none") else "" if choice == "required" else choice.function.name  # type: ignore[union-attr]
    schema = _schema(body)
    messages = conversation(body.messages, service.config.max_messages)
    prompt, grammar = await prepare(
        service, adapter, messages, tools, choice == "none", call, schema, body.reasoning_effort
    )
    if body.ignore_eos and grammar is not None:
        raise bad("ignore_eos: an answer that must have a form ends with it; leave one out", "ignore_eos")
    asked, field = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, field = body.max_tokens, "max_tokens"
    return Ask(
        prompts=[prompt],
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=service.room([prompt], asked, field),
            seed=body.seed,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            ignore_eos=bool(body.ignore_eos),
        ),
        model=name,
        adapter=adapter,
        splitter=service.engine.template.stream,
        stops=stop_list(body.stop),
        copies=body.n or 1,
        grammar=grammar,
    )


async def prepare(
    service: Service,
    adapter: str | None,
    messages: list[Message],
    tools: list[dict[str, Any]],
    hidden: bool,
    call: str | None,
    schema: dict[str, Any] | None,
    effort: str | None,
) -> tuple[list[int], LLMatcher | None]:
    """(prompt, grammar or None).

    Args:
        tools: functions, in the form of chats.
        hidden: the tools are not shown to the model.
        call: None: calls are optional; "": one must be called; else: this one must be.
        schema: that the final text follows, or None.
    """
    for tool in tools:
        check_schema(tool["function"].get("parameters"), "tools")
    names = [tool["function"]["name"] for tool in tools]
    if call is not None and (not names or (call and call not in names)):
        raise bad(f"tool_choice needs a function of tools; there is {', '.join(names) or 'none'}", "tool_choice")
    if len(set(names)) < len(names):
        raise bad("two tools have one name", "tools")
    tools = [] if hidden else tools
    if schema is not None:
        check_schema(schema, "response_format")
    prompt = await service.prompt(adapter, messages, tools, effort)
    strict = any(tool["function"].get("strict") for tool in tools)
    constrained = schema is not None or call is not None or strict
    return prompt, await service.grammar(schema, tools, call) if constrained else None


async def answer_chat(body: ChatRequest, run: Run) -> dict[str, Any]:
    """The whole answer, as one object."""
    answers = await run.finish()
    choices = []
    for index, answer in enumerate(answers):
        message: dict[str, Any] = {"role": "assistant", "content": answer.content or None, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                {"id": new_id("call_"), "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in answer.calls
            ]
        else:
            message["content"] = answer.content
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": logprobs(answer.tokens, answer.vocabulary),
                "finish_reason": answer.reason,
            }
        )
    head = run.head("chatcmpl-", "chat.completion")
    return {**head, "choices": choices, "usage": usage(run.prompt_tokens, answers)}


def stream_chat(body: ChatRequest, run: Run) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def piece(answer: Answer, delta: Delta | None) -> dict[str, Any]:
        if delta is None:
            return {"delta": {}, "logprobs": None}
        return {"delta": _delta(delta), "logprobs": logprobs(list(delta.tokens), answer.vocabulary, True)}

    role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    begin = [(index, role) for index in range(len(run.answers))]
    return run.chunks(run.head("chatcmpl-", "chat.completion.chunk"), body.stream_options, begin, piece)


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.kind == "call":
        function: dict[str, Any] = {"arguments": delta.text}
        if delta.name is None:
            return {"tool_calls": [{"index": delta.call, "function": function}]}
        function = {"name": delta.name, **function}
        return {"tool_calls": [{"index": delta.call, "id": new_id("call_"), "type": "function", "function": function}]}
    return {"reasoning_content" if delta.kind == "reasoning" else "content": delta.text}


def logprobs(tokens: list[Token], vocabulary: Vocabulary | None, none_if_empty: bool = False) -> dict[str, Any] | None:
    """The log-probabilities of content tokens as chats have them; None where none were asked for."""
    if vocabulary is None or (none_if_empty and not tokens):
        return None
    words = vocabulary

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": words.text(id), "logprob": logprob, "bytes": list(words.bytes(id))}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(id, value) for id, value in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def stop_list(stops: Stops) -> list[str]:
    """`stop` as a list."""
    return [] if stops is None else [stops] if isinstance(stops, str) else stops


def conversation(bodies: list[ChatMessage], most: int) -> list[Message]:
    """The messages as templates take them; ApiError names the first that cannot be."""
    if len(bodies) > most:
        raise bad(f"{len(bodies)} messages; at most {most} are taken here", "messages")
    called: dict[str, str] = {}
    messages = []
    for place, body in enumerate(bodies):
        field = f"messages[{place}]"
        calls = tuple(ToolCall(call.function.name, call.function.arguments) for call in body.tool_calls or [])
        called |= {call.id: call.function.name for call in body.tool_calls or []}
        content = plain_content(body.content, field)
        name = None
        if body.role == "tool":
            name = body.name or called.get(body.tool_call_id or "")
            if name is None:
                raise bad(
                    f"{field} answers the call {body.tool_call_id!r}, which no message before it made",
                    f"{field}.tool_call_id",
                )
        elif calls and body.role != "assistant":
            raise bad(f"{field} ({body.role}) has tool_calls; only an assistant calls", f"{field}.tool_calls")
        elif body.content is None and not calls and body.role != "assistant":
            raise bad(f"{field} ({body.role}) has no content", f"{field}.content")
        thinking = (body.reasoning_content or body.reasoning or None) if body.role == "assistant" else None
        messages.append(Message(body.role, content, thinking, calls, name))
    return messages


def plain_content(content: Content, field: str) -> str:
    """The text of a message's content; ApiError for parts of other kinds."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for place, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "reasoning_text", "refusal", "summary_text"):
            raise bad(f"{field}.content[{place}] is {part.type!r:.60}; only text is read here", f"{field}.content")
        if text is None:
            raise bad(f"{field}.content[{place}] has no text", f"{field}.content")
        texts.append(text)
    return "".join(texts)


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise bad("response_format of type json_schema needs json_schema.schema", "response_format")
    return form.json_schema.schema_
