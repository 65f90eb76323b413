"""/v1/responses: text and functions; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from ossia.infer.engine import Sampling
from ossia.serve.answer import BREAK, Answer, Delta
from ossia.serve.chat import logprobs, plain_content, prepare
from ossia.serve.errors import ApiError, bad
from ossia.serve.schema import InputItem, ResponsesRequest
from ossia.serve.service import Ask, Run, Service, event, new_id
from ossia.template.messages import Message, ToolCall

LOGPROBS = "message.output_text.logprobs"


async def response_ask(service: Service, body: ResponsesRequest) -> Ask:
    """What a response asks of the engine; ApiError names what is wrong."""
    name, adapter = service.model(body.model)
    tools = []
    for tool in body.tools or []:
        if tool.type != "function":
            raise bad(f"a tool is of type {tool.type!r:.60}; only functions are supported here", "tools")
        tools.append({"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})})
    choice = body.tool_choice or "auto"
    call: str | None = None
    if not isinstance(choice, str):
        if choice.type != "function" or not choice.name:
            raise bad("tool_choice takes none, auto, required or a function", "tool_choice")
        call = choice.name
    elif choice == "required":
        call = ""
    messages = conversation(body, service.config.max_messages)
    effort = body.reasoning.effort if body.reasoning else None
    prompt, grammar = await prepare(service, adapter, messages, tools, choice == "none", call, _schema(body), effort)
    wanted = LOGPROBS in (body.include or []) or body.top_logprobs is not None
    return Ask(
        prompts=[prompt],
        sampling=Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_new_tokens=service.room([prompt], body.max_output_tokens, "max_output_tokens"),
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
        kind = (delta.kind, delta.call)
        text = delta.text
        if kind != self._kind:
            events += self.close()
            events += self._open(kind, delta.name)
            text = text.removeprefix(BREAK) if delta.kind != "call" else text
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

    def _open(self, kind: tuple[str, int], name: str | None) -> Events:
        self._kind = kind
        new: dict[str, Any]
        if kind[0] == "call":
            new = {"id": new_id("fc_"), "type": "function_call", "call_id": new_id("call_"), "name": name}
            new |= {"arguments": "", "status": "in_progress"}
        elif kind[0] == "reasoning":
            new = {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
        else:
            new = {"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []}
            new |= {"status": "in_progress"}
        self.items.append(new)
        events: Events = [("response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(new)})]
        if kind[0] != "call":
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
        "tools": [
            {"parameters": None, "strict": False, **tool.model_dump(exclude_none=True)} for tool in body.tools or []
        ],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


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


def conversation(body: ResponsesRequest, most: int) -> list[Message]:
    """The input as messages; ApiError names the first item that cannot be one."""
    messages = [Message("developer", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, Message("user", body.input)]
    if len(body.input) > most:
        raise bad(f"{len(body.input)} items of input; at most {most} are taken here", "input")
    called: dict[str, str] = {}
    thinking: str | None = None
    for place, item in enumerate(body.input):
        field = f"input[{place}]"
        kind = item.type or "message"
        if kind == "reasoning":
            thinking = plain_content(item.content, field) or None
        elif kind == "message":
            if item.role is None:
                raise bad(f"{field} has no role", f"{field}.role")
            content = plain_content(item.content, field)
            said = item.role == "assistant"
            messages.append(Message(item.role, content, thinking if said else None))
            thinking = None if said else thinking
        elif kind == "function_call":
            call = _call(item, field)
            called[item.call_id or ""] = call.name
            if messages and messages[-1].role == "assistant":
                messages[-1].tool_calls += (call,)
            else:
                messages.append(Message("assistant", "", thinking, (call,)))
                thinking = None
        elif kind == "function_call_output":
            if item.call_id not in called:
                raise bad(f"{field} answers the call {item.call_id!r:.80}, which is not before it", f"{field}.call_id")
            messages.append(Message("tool", plain_content(item.output, field), name=called[item.call_id]))
        else:
            raise bad(f"{field} is a {kind!r:.60}; messages, reasoning and functions are read here", f"{field}.type")
    if not messages:
        raise bad("input is empty", "input")
    return messages


def _call(item: InputItem, field: str) -> ToolCall:
    if not item.name or item.arguments is None or not item.call_id:
        raise bad(f"{field} needs name, arguments and call_id", field)
    return ToolCall(item.name, item.arguments)


def _schema(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.schema_ is None:
        raise bad("text.format of type json_schema needs schema", "text.format")
    return form.schema_
