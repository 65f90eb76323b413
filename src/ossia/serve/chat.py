"""/v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from llguidance import LLMatcher

from ossia.infer.engine import Sampling, Token
from ossia.serve.answer import Answer, Delta, usage
from ossia.serve.errors import bad
from ossia.serve.fields import one_value
from ossia.serve.grammar import Form, Vocabulary, tool_name
from ossia.serve.schema import (
    AssistantMessage,
    Builtins,
    BuiltinTool,
    ChatMessage,
    ChatRequest,
    Content,
    FunctionChoice,
    FunctionMessage,
    ReasoningPart,
    ResponseFormat,
    ResponsesFunctionChoice,
    Stops,
    TemplateKwargs,
    TextPart,
    Tool,
    ToolCallBody,
    ToolMessage,
)
from ossia.serve.service import Ask, Run, Service, check_schema, new_id
from ossia.template.history import History
from ossia.template.messages import Message, ToolCall, calls_builtin


async def chat_ask(service: Service, body: ChatRequest) -> Ask:
    """What a chat asks of the engine; ApiError names what is wrong."""
    name, adapter = service.model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or [] if isinstance(tool, Tool | BuiltinTool)]
    tools = with_builtins(tools, body.builtin_tools, body.chat_template_kwargs)
    hidden, call = body.tool_choice == "none", chosen(body.tool_choice)
    messages = conversation(body.messages, service.config.max_messages, tools)
    effort = one_value(
        {
            "reasoning_effort": body.reasoning_effort,
            "reasoning.effort": body.reasoning and body.reasoning.effort,
            "chat_template_kwargs.reasoning_effort": template_effort(body.chat_template_kwargs),
        }
    )
    prompt, grammar = await prepare(service, adapter, messages, tools, hidden, call, _form(body), effort)
    if body.ignore_eos and grammar is not None:
        raise bad("ignore_eos: an answer that must have a form ends with it; leave one out", "ignore_eos")
    asked = one_value({"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens})
    return Ask(
        prompts=[prompt],
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=service.room([prompt], asked),
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


def with_builtins(
    tools: list[dict[str, Any]], named: Builtins, template: TemplateKwargs | None
) -> list[dict[str, Any]]:
    """The tools of a request and the built-in ones that it names elsewhere."""
    names = [*(named or []), *((template and template.builtin_tools) or [])]
    missing = [name for name in dict.fromkeys(names) if {"type": name} not in tools]
    return [*tools, *({"type": name} for name in missing)]


def chosen(choice: Any) -> str | None:
    """The tool of `tool_choice` that must be called; "": any of them; None: none must."""
    if isinstance(choice, BuiltinTool):
        return choice.type
    if isinstance(choice, FunctionChoice):
        return choice.function.name
    if isinstance(choice, ResponsesFunctionChoice):
        return choice.name
    return "" if choice == "required" else None


def template_effort(template: TemplateKwargs | None) -> str | None:
    """The effort in `chat_template_kwargs`."""
    return template.reasoning_effort if template else None


async def prepare(
    service: Service,
    adapter: str | None,
    messages: list[Message],
    tools: list[dict[str, Any]],
    hidden: bool,
    call: str | None,
    form: Form | None,
    effort: str | None,
) -> tuple[list[int], LLMatcher | None]:
    """(prompt, grammar or None).

    Args:
        tools: functions, in the form of chats, and built-in tools.
        hidden: the tools are not shown to the model.
        call: None: calls are optional; "": one must be called; else: this one must be.
        form: that the final text has, or None.
    """
    functions = [tool["function"] for tool in tools if "function" in tool]
    for function in functions:
        check_schema(function.get("parameters"), "tools")
    names = list(map(tool_name, tools))
    if call is not None and (not names or (call and call not in names)):
        raise bad(f"tool_choice needs one of tools; there is {', '.join(names) or 'none'}", "tool_choice")
    if len(set(names)) < len(names):
        raise bad("two tools have one name", "tools")
    tools = [] if hidden else tools
    if form is not None and form.schema is not None:
        check_schema(form.schema, form.field)
    prompt = await service.prompt(adapter, messages, tools, effort)
    strict = not hidden and any(function.get("strict") for function in functions)
    constrained = form is not None or call is not None or strict
    return prompt, await service.grammar(form, tools, call) if constrained else None


async def answer_chat(body: ChatRequest, run: Run) -> dict[str, Any]:
    """The whole answer, as one object."""
    answers = await run.finish()
    shown = _shows_reasoning(body)
    choices = [
        {
            "index": index,
            "message": answer_message(answer, shown),
            "logprobs": logprobs(answer.tokens, answer.vocabulary),
            "finish_reason": answer.reason,
        }
        for index, answer in enumerate(answers)
    ]
    head = run.head("chatcmpl-", "chat.completion")
    return {**head, "choices": choices, "usage": usage(run.prompt_tokens, answers)}


def answer_message(answer: Answer, shows_reasoning: bool = True) -> dict[str, Any]:
    """A whole answer as a message, which may be sent back as it is."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or None, "refusal": None}
    if answer.reasoning and shows_reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": new_id("call_"), "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in answer.calls
        ]
    else:
        message["content"] = answer.content
    return message


def stream_chat(body: ChatRequest, run: Run) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    shown = _shows_reasoning(body)

    def piece(answer: Answer, delta: Delta | None) -> dict[str, Any] | None:
        if delta is None:
            return {"delta": {}, "logprobs": None}
        if delta.kind == "reasoning" and not shown:
            return None
        return {"delta": _delta(delta), "logprobs": logprobs(list(delta.tokens), answer.vocabulary, True)}

    role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    begin = [(index, role) for index in range(len(run.answers))]
    return run.chunks(run.head("chatcmpl-", "chat.completion.chunk"), body.stream_options, begin, piece)


def _shows_reasoning(body: ChatRequest) -> bool:
    exclude = body.reasoning.exclude if body.reasoning else None
    shown = {"include_reasoning": body.include_reasoning, "reasoning.exclude": None if exclude is None else not exclude}
    return one_value(shown) is not False


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


def conversation(bodies: list[ChatMessage], most: int, tools: list[dict[str, Any]]) -> list[Message]:
    """The messages as templates take them; ApiError names the first that cannot be. `tools` are those declared."""
    if len(bodies) > most:
        raise bad(f"{len(bodies)} messages; at most {most} are taken here", "messages")
    called: dict[str, ToolCall] = {}
    history = History()
    for place, body in enumerate(bodies):
        field = f"messages[{place}]"
        if isinstance(body, AssistantMessage):
            _assistant(history, body, field, tools, called)
        elif isinstance(body, ToolMessage | FunctionMessage):
            history.add(_result(body, field, tools, called))
        else:
            history.add(Message(body.role, plain_content(body.content, field)))  # type: ignore[union-attr]
    return history.messages()


def _assistant(
    history: History,
    body: AssistantMessage,
    field: str,
    tools: list[dict[str, Any]],
    called: dict[str, ToolCall],
) -> None:
    names = ("reasoning_content", "reasoning", "thinking")
    thinking = one_value({f"{field}.{name}": getattr(body, name) or None for name in names}) or _details(body, field)
    parts = spoken(body.content)
    if body.refusal:
        if any(kind == "text" and text not in ("", body.refusal) for kind, text in parts):
            raise bad(f"{field} has content and a refusal; send one of them", f"{field}.refusal")
        parts = [*(part for part in parts if part[0] != "text"), ("text", body.refusal)]
    inside = "".join(text for kind, text in parts if kind == "reasoning")
    if thinking and one_value({f"{field}.reasoning": thinking, f"{field}.content": inside or None}) != inside:
        history.reasoned(thinking)
    for kind, text in parts:
        if kind == "reasoning":
            history.reasoned(text)
        elif text:
            history.said(text)
    calls = {
        call.id: ToolCall(call.function.name, call.function.arguments, calls_builtin(call.function.name, tools))
        for call in body.tool_calls or []
        if isinstance(call, ToolCallBody)
    }
    called |= calls
    made = list(calls.values())
    if body.function_call is not None:
        name = body.function_call.name
        made.append(ToolCall(name, body.function_call.arguments, calls_builtin(name, tools)))
    if len(calls) < len(body.tool_calls or []):
        raise bad(f"{field}: two tool_calls have one id", f"{field}.tool_calls")
    if made:
        history.called(*made)
    elif not (thinking or any(text for _, text in parts)):
        history.said("")


def _details(body: AssistantMessage, field: str) -> str | None:
    """Reasoning in pieces, as OpenRouter and LiteLLM give it out."""
    for name in ("reasoning_details", "thinking_blocks"):
        details = getattr(body, name) or []
        if text := "".join(each.text or each.thinking or each.summary or "" for each in details):
            return text
        if details:
            raise bad(f"{field}.{name} has no text that can be read here; leave it out", f"{field}.{name}")
    return None


def _result(
    body: ToolMessage | FunctionMessage, field: str, tools: list[dict[str, Any]], called: dict[str, ToolCall]
) -> Message:
    """What a tool answered, under the name of the call that it answers."""
    content = plain_content(body.content, field)
    call = called.get(body.tool_call_id or "") if isinstance(body, ToolMessage) else None
    if call is None:
        if body.name is None:
            id = body.tool_call_id if isinstance(body, ToolMessage) else None
            raise bad(f"{field} answers the call {id!r:.80}, which no message before it made", f"{field}.tool_call_id")
        return Message("tool", content, name=body.name, builtin=calls_builtin(body.name, tools))
    if body.name is not None and body.name != call.name:
        raise bad(f"{field} is of {body.name!r:.80}, and the call it answers of {call.name!r:.80}", f"{field}.name")
    return Message("tool", content, name=call.name, builtin=call.builtin)


def plain_content(content: Content, field: str) -> str:
    """The text of what nobody but the assistant says; ApiError for reasoning in it."""
    if any(isinstance(part, ReasoningPart) for part in content or [] if not isinstance(part, str)):
        raise bad(f"{field}.content has reasoning; only the assistant reasons", f"{field}.content")
    return "".join(text for _, text in spoken(content))


def spoken(content: Content) -> list[tuple[Literal["reasoning", "text"], str]]:
    """What an assistant's content says, in its order; neighbours of one kind are joined."""
    if content is None or isinstance(content, str):
        return [("text", content or "")]
    found: list[tuple[Literal["reasoning", "text"], str]] = []
    for part in content:
        kind: Literal["reasoning", "text"] = "reasoning" if isinstance(part, ReasoningPart) else "text"
        text = part_text(part)
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + text)
        else:
            found.append((kind, text))
    return found


def part_text(part: Any) -> str:
    """The text of a part of a content, of whichever kind."""
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, ReasoningPart):
        return part.text or part.thinking or part.reasoning or ""
    return str(part.refusal)


def _form(body: ChatRequest) -> Form | None:
    """What the final text must be; ApiError where two fields ask for a form."""
    found = [
        Form("guided_json", schema=_loaded(body.guided_json, "guided_json")) if body.guided_json is not None else None,
        Form("guided_choice", choice=body.guided_choice) if body.guided_choice is not None else None,
        Form("guided_regex", regex=body.guided_regex) if body.guided_regex is not None else None,
        _response_format(body.response_format) if body.response_format else None,
    ]
    if (asked := body.structured_outputs) is not None:
        field = "structured_outputs"
        found += [
            Form(field, schema=_loaded(asked.json_, f"{field}.json")) if asked.json_ is not None else None,
            Form(field, choice=asked.choice) if asked.choice is not None else None,
            Form(field, regex=asked.regex) if asked.regex is not None else None,
            Form(field, schema={"type": "object"}) if asked.json_object else None,
        ]
    forms = [form for form in found if form is not None]
    if len(forms) > 1:
        fields = " and ".join(dict.fromkeys(form.field for form in forms))
        raise bad(f"{fields}: an answer has one form; send one of json, choice and regex", forms[1].field)
    if forms and (forms[0].choice == [] or forms[0].regex == ""):
        raise bad(f"{forms[0].field} is empty; leave it out", forms[0].field)
    return forms[0] if forms else None


def _loaded(schema: dict[str, Any] | str, field: str) -> dict[str, Any]:
    """A schema that may be written as JSON text."""
    if isinstance(schema, dict):
        return schema
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad(f"{field} is a text that is no JSON object; a schema is needed", field)
    return found


def _response_format(form: ResponseFormat) -> Form | None:
    field = "response_format"
    inside = form.json_schema.schema_ if form.json_schema else None
    if form.type != "json_schema" and form.json_schema is not None:
        raise bad(f"{field} of type {form.type} takes no json_schema; write type json_schema", f"{field}.json_schema")
    if form.type == "text":
        if form.schema_ is not None:
            raise bad(f"{field} of type text takes no schema; write type json_schema", f"{field}.schema")
        return None
    schema: dict[str, Any] | None = one_value({f"{field}.json_schema.schema": inside, f"{field}.schema": form.schema_})
    if schema is None and form.type == "json_schema":
        raise bad(f"{field} of type json_schema needs json_schema.schema", field)
    return Form(field, schema={"type": "object"} if schema is None else schema)
