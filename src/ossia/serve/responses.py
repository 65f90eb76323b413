"""/v1/responses: text and functions; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from ossia.infer.engine import Sampling
from ossia.serve.answer import BREAK, Answer, Delta
from ossia.serve.chat import chosen, logprobs, part_text, plain_content, prepare, spoken, template_effort, with_builtins
from ossia.serve.errors import ApiError, bad
from ossia.serve.fields import one_value
from ossia.serve.grammar import Form
from ossia.serve.schema import (
    LOGPROBS,
    CallItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    ResponsesTool,
    ResultItem,
)
from ossia.serve.service import Ask, Run, Service, event, new_id
from ossia.template.history import History
from ossia.template.messages import Message, ToolCall, calls_builtin

PHASES: dict[str, Literal["commentary", "final"]] = {"commentary": "commentary", "final_answer": "final"}
"""OpenAI's names for what is said before the model goes on and for what it ends with, and harmony's channels."""


async def response_ask(service: Service, body: ResponsesRequest) -> Ask:
    """What a response asks of the engine; ApiError names what is wrong."""
    name, adapter = service.model(body.model)
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
        if isinstance(tool, ResponsesTool)
        else tool.model_dump()
        for tool in body.tools or []
    ]
    tools = with_builtins(tools, body.builtin_tools, body.chat_template_kwargs)
    hidden, call = body.tool_choice == "none", chosen(body.tool_choice)
    messages = conversation(body, service.config.max_messages, tools)
    effort = one_value(
        {
            "reasoning.effort": body.reasoning and body.reasoning.effort,
            "chat_template_kwargs.reasoning_effort": template_effort(body.chat_template_kwargs),
        }
    )
    prompt, grammar = await prepare(service, adapter, messages, tools, hidden, call, _form(body), effort)
    asked = one_value({"max_output_tokens": body.max_output_tokens, "max_tokens": body.max_tokens})
    wanted = LOGPROBS in (body.include or []) or body.top_logprobs is not None
    return Ask(
        prompts=[prompt],
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=service.room([prompt], asked),
            seed=body.seed,
            top_logprobs=(body.top_logprobs or 0) if wanted else None,
        ),
        model=name,
        adapter=adapter,
        splitter=service.engine.template.stream,
        stops=[],
        grammar=grammar,
    )


async def answer_response(body: ResponsesRequest, run: Run) -> dict[str, Any]:
    """The whole response."""
    items = _Items(run.answers[0])
    async for _, deltas in run.deltas():
        for delta in deltas:
            items.push(delta)
    items.close()
    return _finished(_head(body, run.ask.model), run, items)


async def stream_response(body: ResponsesRequest, run: Run) -> AsyncIterator[str]:
    """The response as server-sent events."""
    head = _head(body, run.ask.model)
    items = _Items(run.answers[0])
    number = 0

    def send(kind: str, values: dict[str, Any]) -> str:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **values}, kind)

    yield send("response.created", {"response": head})
    yield send("response.in_progress", {"response": head})
    try:
        async for _, deltas in run.deltas():
            for delta in deltas:
                for kind, values in items.push(delta):
                    yield send(kind, values)
    except ApiError as error:
        reason = {"code": "server_error", "message": error.message}
        yield send("response.failed", {"response": {**head, "status": "failed", "error": reason}})
        return
    for kind, values in items.close():
        yield send(kind, values)
    whole = _finished(head, run, items)
    yield send(f"response.{whole['status']}", {"response": whole})


Events = list[tuple[str, dict[str, Any]]]


class _Items:
    """Output items as they grow; each method returns the events that tell of it."""

    def __init__(self, answer: Answer) -> None:
        self.items: list[dict[str, Any]] = []
        self._answer = answer
        self._kind: tuple[str, int] | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> Events:
        events: Events = []
        kind = (delta.kind, delta.part)
        text = delta.text[delta.joint :]
        if kind != self._kind:
            events += self.close()
            events += self._open(delta)
        found = logprobs(list(delta.tokens), self._answer.vocabulary)
        entries = found["content"] if found else []
        self._text += text
        self._logprobs += entries
        if delta.kind == "call":
            if text:
                events.append(("response.function_call_arguments.delta", {**self._where(), "delta": text}))
        elif delta.kind == "reasoning":
            events.append(("response.reasoning_text.delta", {**self._where(0), "delta": text}))
        else:
            events.append(("response.output_text.delta", {**self._where(0), "delta": text, "logprobs": entries}))
        return events

    def close(self) -> Events:
        """End the item that is open."""
        if self._kind is None:
            return []
        item, text = self.items[-1], self._text
        item["status"] = "completed" if self._answer.reason != "length" else "incomplete"
        if self._kind[0] == "call":
            item["arguments"] = text
            done = {**self._where(), "arguments": text, "name": item["name"]}
            events: Events = [("response.function_call_arguments.done", done)]
        else:
            part = self._part(text)
            item["content"] = [part]
            kind = "reasoning_text" if self._kind[0] == "reasoning" else "output_text"
            extra = {"logprobs": self._logprobs} if kind == "output_text" else {}
            events = [
                (f"response.{kind}.done", {**self._where(0), "text": text, **extra}),
                ("response.content_part.done", {**self._where(0), "part": part}),
            ]
        events.append(("response.output_item.done", {"output_index": len(self.items) - 1, "item": item}))
        self._kind, self._text, self._logprobs = None, "", []
        return events

    def _open(self, delta: Delta) -> Events:
        self._kind = (delta.kind, delta.part)
        new: dict[str, Any]
        if delta.kind == "call":
            new = {"id": new_id("fc_"), "type": "function_call", "call_id": new_id("call_"), "name": delta.name}
            new |= {"arguments": "", "status": "in_progress"}
        elif delta.kind == "reasoning":
            new = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
        else:
            new = {"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []}
            new |= {"status": "in_progress"}
            new["phase"] = "commentary" if delta.channel == "commentary" else "final_answer"
        self.items.append(new)
        events: Events = [("response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(new)})]
        if delta.kind != "call":
            events.append(("response.content_part.added", {**self._where(0), "part": self._part("")}))
        return events

    def _part(self, text: str) -> dict[str, Any]:
        assert self._kind is not None
        if self._kind[0] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _where(self, content_index: int | None = None) -> dict[str, Any]:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return where if content_index is None else {**where, "content_index": content_index}


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """A response that has just begun."""
    form = body.text.format if body.text and body.text.format else None
    choice = body.tool_choice or "auto"
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": with_builtins(list(map(_echoed, body.tools or [])), body.builtin_tools, body.chat_template_kwargs),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _echoed(tool: Any) -> dict[str, Any]:
    """A tool as responses give it back."""
    optional = {"parameters": None, "strict": False} if isinstance(tool, ResponsesTool) else {}
    return {**optional, **tool.model_dump(exclude_none=True)}


def _finished(head: dict[str, Any], run: Run, items: _Items) -> dict[str, Any]:
    answer = run.answers[0]
    cut = answer.reason == "length"
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items.items,
        "usage": {
            "input_tokens": run.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer.generated,
            "output_tokens_details": {"reasoning_tokens": answer.reasoned},
            "total_tokens": run.prompt_tokens + answer.generated,
        },
    }


def conversation(body: ResponsesRequest, most: int, tools: Sequence[dict[str, Any]] = ()) -> list[Message]:
    """The input as messages; ApiError names the first item that cannot be one. `tools` are those declared."""
    history = History()
    if body.instructions:
        history.add(Message("developer", body.instructions))
    if isinstance(body.input, str):
        history.add(Message("user", body.input))
        return history.messages()
    if len(body.input) > most:
        raise bad(f"{len(body.input)} items of input; at most {most} are taken here", "input")
    called: dict[str, ToolCall] = {}
    for place, item in enumerate(body.input):
        field = f"input[{place}]"
        if isinstance(item, ReasoningItem):
            if text := _reasoning(item, field):
                history.reasoned(text)
        elif isinstance(item, MessageItem):
            _message(history, item, field)
        elif isinstance(item, CallItem):
            called[item.call_id] = ToolCall(item.name, item.arguments, calls_builtin(item.name, tools))
            history.called(called[item.call_id])
        elif isinstance(item, ResultItem):
            if (call := called.get(item.call_id)) is None:
                raise bad(f"{field} answers the call {item.call_id!r:.80}, which is not before it", f"{field}.call_id")
            content = plain_content(item.output, field)
            history.add(Message("tool", content, name=call.name, builtin=call.builtin))
    messages = history.messages()
    if not messages:
        raise bad("input is empty", "input")
    return messages


def _message(history: History, item: MessageItem, field: str) -> None:
    if item.role != "assistant":
        if item.phase is not None:
            raise bad(f"{field} ({item.role}) has a phase; only what an assistant says has", f"{field}.phase")
        history.add(Message(item.role, plain_content(item.content, field)))
        return
    channel = None if item.phase is None else PHASES[item.phase]
    for kind, text in spoken(item.content):
        if kind == "reasoning":
            history.reasoned(text)
        else:
            history.said(text, channel)


def _reasoning(item: ReasoningItem, field: str) -> str:
    """The reasoning of an item, or its summary; ApiError where it can only be decrypted by whoever made it."""
    content = item.content if isinstance(item.content, str) else "".join(map(part_text, item.content or []))
    if text := content or BREAK.join(map(part_text, item.summary or [])):
        return text
    if item.encrypted_content:
        raise bad(
            f"{field} is reasoning that only its maker can decrypt; send its content or summary, or leave the item out",
            f"{field}.encrypted_content",
        )
    return ""


def _form(body: ResponsesRequest) -> Form | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        if form is not None and form.schema_ is not None:
            raise bad("text.format of type text takes no schema; write type json_schema", "text.format.schema")
        return None
    if form.schema_ is None and form.type == "json_schema":
        raise bad("text.format of type json_schema needs schema", "text.format")
    return Form("text.format", schema={"type": "object"} if form.schema_ is None else form.schema_)
