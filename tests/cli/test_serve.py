"""`ossia serve`: the official client, curl and raw sockets against real processes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tests.parity.test_adapters import randomise
from tests.served import ScriptedEngine, scripted, serving

from ossia.adapters.inject import add_lora
from ossia.adapters.io import load_adapter, save_adapter
from ossia.cli import main
from ossia.config import ServeConfig, SftConfig
from ossia.infer.engine import Engine, Sampling
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer
from ossia.serve.errors import ApiError
from ossia.serve.service import Service
from ossia.template import load_template
from ossia.template.messages import Message, ToolCall

WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = 'say <|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
SYSTEM = "Be kind."
TOOLS = [{"type": "function", "function": WEATHER}]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "w", "schema": WEATHER["parameters"], "strict": True},
}


FIELDS = [
    ("chat/completions", {"temprature": 0.5}, 400, "temprature", "did you mean 'temperature'?"),
    ("chat/completions", {"odd": []}, 400, "odd", "not known here; leave it out"),
    ("completions", {"max_token": 3}, 400, "max_token", "did you mean 'max_tokens'?"),
    ("responses", {"max_completion_tokens": 3}, 400, "max_completion_tokens", "write max_output_tokens"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "weight": 0}]}, 400, "messages[0].weight", "not known"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, 400, "messages[0].reasoning_content", "not known"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "value": "y"}]}]}, 400, "messages[0].content[0].value", "not known"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "prefix": True}]}, 400, "messages[0].prefix", "begins anew"),
    ("chat/completions", {"messages": [{"role": "assistant", "reasoning": "x", "reasoning_content": "y"}]}, 400, "messages[0].reasoning", "differ"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "reasoning_details": [{"type": "reasoning.encrypted", "data": "…"}]}]}, 400, "messages[0].reasoning_details", "no text"),
    ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {}}]}]}, 400, "messages[0].tool_calls[0].type", "'custom'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
    ("chat/completions", {"tools": [{"type": "function", "name": "f"}]}, 400, "tools[0].name", "inside of function"),
    ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, 400, "tools[0].function.params", "did you mean 'parameters'"),
    ("chat/completions", {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, 400, "tools[0].type", '{"type": "python"}'),
    ("chat/completions", {"tools": [{"type": "mcp"}]}, 400, "tools[0].type", "only functions"),
    ("chat/completions", {"tools": [{"type": "python"}, *TOOLS], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, 400, "tool_choice", "there is python, weather"),
    ("chat/completions", {"tools": [{"type": "python"}, {"type": "function", "function": {"name": "python"}}]}, 400, "tools", "one name"),
    ("chat/completions", {"tool_choice": {"type": "allowed_tools"}}, 400, "tool_choice.type", "it takes function"),
    ("chat/completions", {"response_format": {"type": "text", "json_schema": {"schema": {}}}}, 400, "response_format.json_schema", "write type json_schema"),
    ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"scheme": {}}}}, 400, "response_format.json_schema.scheme", "did you mean 'schema'"),
    ("chat/completions", {"response_format": {"type": "json_object"}, "guided_regex": "x"}, 400, "response_format", "one form"),
    ("chat/completions", {"structured_outputs": {"grammar": "x"}}, 400, "structured_outputs.grammar", "not supported"),
    ("chat/completions", {"guided_json": "not JSON"}, 400, "guided_json", "no JSON object"),
    ("chat/completions", {"guided_regex": "("}, 400, "guided_regex", "cannot be followed"),
    ("chat/completions", {"stream_options": {"include_usages": True}}, 400, "stream_options.include_usages", "include_usage"),
    ("chat/completions", {"reasoning_effort": "minimal"}, 400, "reasoning_effort", "write 'low'"),
    ("chat/completions", {"chat_template_kwargs": {"reasoning_effort": "xhigh"}}, 400, "chat_template_kwargs.reasoning_effort", "write 'high'"),
    ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs.enable_thinking", "always reasons"),
    ("chat/completions", {"chat_template_kwargs": {"thinking_mode": 1}}, 400, "chat_template_kwargs.thinking_mode", "not known"),
    ("chat/completions", {"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, 400, "reasoning.effort", "differ"),
    ("chat/completions", {"reasoning": {"max_tokens": 5}}, 400, "reasoning.max_tokens", "write effort"),
    ("chat/completions", {"extra_body": {"top_k": 3}}, 400, "extra_body", "beside the other fields"),
    ("chat/completions", {"min_tokens": 5}, 400, "min_tokens", "not supported"),
    ("chat/completions", {"top_k": 40}, 400, "top_k", "not supported"),
    ("chat/completions", {"thinking": {"type": "disabled"}}, 400, "thinking", "reasoning_effort"),
    ("chat/completions", {"verbosity": "low"}, 400, "verbosity", "in a message"),
    ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differ"),
    ("completions", {"tools": []}, 400, "tools", "for chats"),
    ("responses", {"text": {"verbosity": "high"}}, 400, "text.verbosity", "not supported"),
    ("responses", {"text": {"format": {"type": "json_schema", "json_schema": {}}}}, 400, "text.format.json_schema", "not known"),
    ("responses", {"reasoning": {"effort": "none"}}, 400, "reasoning.effort", "write 'low'"),
    ("responses", {"include": ["everything"]}, 400, "include[0]", "should be"),
    ("responses", {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools[0].function", "beside type"),
    ("responses", {"input": [{"type": "message", "role": "user", "content": "x", "arguments": "{}"}]}, 400, "input[0].arguments", "not known"),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input[0].content[0].type", "only text"),
    ("responses", {"input": [{"type": "web_search_call", "id": "w", "status": "completed"}]}, 400, "input[0].type", "'web_search_call'"),
    ("responses", {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, 400, "input[0].encrypted_content", "only its maker"),
    ("responses", {"input": [{"role": "tool", "content": "x"}]}, 400, "input[0].role", "should be"),
    ("responses", {"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, 400, "input[0].phase", "assistant"),
    ("responses", {"truncation": "auto"}, 400, "truncation", "shorter input"),
]  # fmt: skip
"""Fields that would be passed over."""


def ask(text, **more):
    return {"model": "base", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def adapters(tiny_gpt_oss, tmp_path_factory):
    """Two adapters of different targets; the second's run had a system text."""
    folders = []
    for seed, targets in ((1, {"target_experts": "auto"}), (2, {"target_experts": "none"})):
        model = add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=4, **targets)
        randomise(model, seed)
        folders.append(tmp_path_factory.mktemp("run") / f"tuned-{seed}")
        save_adapter(model, folders[-1], str(tiny_gpt_oss))
    options = SftConfig(model=str(tiny_gpt_oss), dataset=["rows.jsonl"], system=SYSTEM)
    options.save(folders[1].parent / "config.yaml")
    return folders


@pytest.fixture(scope="module")
def real(tiny_gpt_oss, adapters):
    """The command itself, on a random model with two adapters."""
    named = [str(adapters[0]), f"second={adapters[1]}"]
    with serving("-m", "ossia", "deploy", "--adapters", *named, "--port", 0, "--device", "cpu") as found:
        yield found


def test_chat(client):
    answer = client.chat.completions.create(**ask("héllo 😀", model="tuned"))
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("tuned: héllo 😀", "stop")
    assert choice.message.reasoning_content == "thought"
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("thought")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_whole_says(client):
    chunks = list(client.chat.completions.create(**ask("h😀", stream=True, stream_options={"include_usage": True})))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "base: h😀"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "thought"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert not chunks[-1].choices
    assert chunks[-1].usage == client.chat.completions.create(**ask("h😀")).usage


def test_length_stop_texts_and_choices(client):
    cut = client.chat.completions.create(**ask("slow 50", max_completion_tokens=12))
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 12)
    said = "say <|channel|>final<|message|>one two three<|return|>"
    for stop, expected in ((" t", "one"), (["x", "ree"], "one two th"), ("e three", "one two three")):
        whole = client.chat.completions.create(**ask(said, stop=stop)).choices[0]
        assert (whole.message.content, whole.finish_reason) == (expected, "stop")
        streamed = client.chat.completions.create(**ask(said, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    three = client.chat.completions.create(**ask("a", n=3))
    assert [(choice.index, choice.message.content) for choice in three.choices] == [(n, "base: a") for n in range(3)]


def test_ignore_eos_goes_on_to_max_tokens(client):
    said = "say <|channel|>final<|message|>one<|return|>two<|return|>"
    for options, expected in (({}, ("one", "stop")), ({"ignore_eos": True}, ("one\n\ntwo", "length"))):
        choice = client.chat.completions.create(**ask(said, extra_body=options)).choices[0]
        assert (choice.message.content, choice.finish_reason) == expected
    plain = client.completions.create(model="base", prompt="say a<|return|>b", extra_body={"ignore_eos": True})
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("ab", "length")


def test_logprobs_go_with_the_text(client):
    options = {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask("é", **options)).choices[0]
    assert b"".join(bytes(entry.bytes) for entry in whole.logprobs.content).decode() == "base: é"
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in whole.logprobs.content)
    streamed = client.chat.completions.create(**ask("é", stream=True, **options))
    parts = [chunk.choices[0].logprobs.content for chunk in streamed if chunk.choices[0].logprobs]
    assert [entry for part in parts for entry in part] == whole.logprobs.content
    stopped = client.chat.completions.create(**ask("é", stop="e:", **options)).choices[0]
    assert "".join(entry.token for entry in stopped.logprobs.content) == stopped.message.content == "bas"


def test_tools_there_and_back(client):
    whole = client.chat.completions.create(**ask(CALL, tools=TOOLS))
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [("weather", '{"city": "Oslo"}')]

    streamed = list(client.chat.completions.create(**ask(CALL, tools=TOOLS, stream=True)))
    deltas = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "weather"
    assert deltas[0].id.startswith("call_")
    assert all(delta.id is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == '{"city": "Oslo"}'
    assert streamed[-1].choices[0].finish_reason == "tool_calls"

    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    history = [*ask(CALL)["messages"], message.model_dump(exclude_none=True), result]
    later = client.chat.completions.create(model="base", messages=history, tools=TOOLS)
    assert later.choices[0].message.content == "base: told rain"
    history[-1]["tool_call_id"] = "other"
    with pytest.raises(openai.BadRequestError, match="no message before it made"):
        client.chat.completions.create(model="base", messages=history, tools=TOOLS)


RUN = "say <|channel|>analysis<|message|>hm<|end|><|start|>assistant to=python<|channel|>analysis code<|message|>1\n+1<|call|>"


def test_built_in_tools_are_given_back_as_calls(server, client):
    for declared in ({"tools": [{"type": "python"}, *TOOLS]}, {"tools": TOOLS, "builtin_tools": ["python"]}):
        choice = client.chat.completions.create(**ask(RUN, extra_body=declared)).choices[0]
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0].function
        assert (choice.message.reasoning_content, call.name, call.arguments) == ("hm", "python", "1\n+1")
        chunks = list(client.chat.completions.create(**ask(RUN, stream=True, extra_body=declared)))
        deltas = [call.function for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert (deltas[0].name, "".join(delta.arguments for delta in deltas)) == ("python", "1\n+1")
    # Declared in the system block, the same by either way.
    sizes = {
        prompt_size(server, ask("x", tools=[{"type": "python"}])),
        prompt_size(server, ask("x", builtin_tools=["python"])),
        prompt_size(server, ask("x", chat_template_kwargs={"builtin_tools": ["python"]})),
        prompt_size(server, {"input": "x", "tools": [{"type": "python"}]}, "responses"),
        prompt_size(server, {"input": "x", "builtin_tools": ["python"]}, "responses"),
    }
    assert len(sizes) == 1
    assert sizes.pop() > prompt_size(server, ask("x")) + 500
    assert prompt_size(server, ask("x", builtin_tools=["python"], tool_choice="none")) == prompt_size(server, ask("x"))

    history = [*ask(RUN)["messages"], choice.message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "2"})
    status, _, body = server.post("/v1/chat/completions", {"messages": history, "tools": [{"type": "python"}]})
    assert (status, "prompt_tokens" in body) == (200, True)


def test_built_in_tools_in_responses(client):
    tools = [{"type": "python"}, {"type": "browser"}]
    answer = client.responses.create(model="base", input=RUN, tools=tools)
    assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    assert (answer.output[1].name, answer.output[1].arguments) == ("python", "1\n+1")
    assert [tool["type"] if isinstance(tool, dict) else tool.type for tool in answer.tools] == ["python", "browser"]
    streamed = list(client.responses.create(model="base", input=RUN, tools=tools, stream=True))
    assert "".join(e.delta for e in streamed if e.type == "response.function_call_arguments.delta") == "1\n+1"
    result = {"type": "function_call_output", "call_id": answer.output[1].call_id, "output": "2"}
    history = [
        {"role": "user", "content": "?"},
        *(item.model_dump(exclude_none=True) for item in answer.output),
        result,
    ]
    history.append({"role": "user", "content": "so?"})
    assert client.responses.create(model="base", input=history, tools=tools).output_text == "base: so?"


def test_what_is_said_before_a_call_is_an_item_of_its_own(client):
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    said = f"say {thought}{thought}<|channel|>commentary<|message|>\n\nNow.<|end|><|start|>assistant"
    text = f"{said}<|channel|>final<|message|>Done.<|return|>"
    answer = client.responses.create(model="base", input=text)
    assert [item.type for item in answer.output] == ["reasoning", "reasoning", "message", "message"]
    assert [item.phase for item in answer.output[2:]] == ["commentary", "final_answer"]
    assert [item.content[0].text for item in answer.output] == ["hm", "hm", "\n\nNow.", "Done."]
    events = list(client.responses.create(model="base", input=text, stream=True))
    assert [event.item for event in events if event.type == "response.output_item.done"] == events[-1].response.output


@pytest.mark.parametrize("name", ["browser.search", "files.read", "repo:find"])
def test_names_that_were_given_out_are_taken_back(client, name):
    """Names that the model made up."""
    said, so = f"say  to={name}<|channel|>commentary json<|message|>{{}}<|call|>", {"role": "user", "content": "so?"}
    message = client.chat.completions.create(**ask(said, tools=TOOLS)).choices[0].message
    assert message.tool_calls[0].function.name == name
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "there is no such tool"}
    history = [*ask("hi")["messages"], message.model_dump(exclude_none=True), result, so]
    later = client.chat.completions.create(model="base", messages=history, tools=TOOLS)
    assert later.choices[0].message.content == "base: so?"

    call = client.responses.create(model="base", input=said).output[0]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "there is no such tool"}
    history = [{"role": "user", "content": "hi"}, call.model_dump(exclude_none=True), output, so]
    assert client.responses.create(model="base", input=history).output_text == "base: so?"


def test_forms_are_kept_by_a_model_that_would_not(real):
    """A random model, whose answers would be noise."""
    client, base = real.client(), real.client().models.list().data[-1].id
    text = [{"role": "user", "content": "hi"}]
    seen = set()
    for seed in range(4):
        options = {"model": base, "messages": text, "seed": seed, "max_tokens": 300}
        whole = client.chat.completions.create(**options, response_format=SCHEMA).choices[0]
        if whole.finish_reason == "stop":
            seen.add(json.loads(whole.message.content)["city"])
        strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
        free = client.chat.completions.create(**options, tools=strict).choices[0]
        if free.finish_reason == "tool_calls":
            seen.add(json.loads(free.message.tool_calls[0].function.arguments)["city"])
        forced = client.chat.completions.create(**options, tools=TOOLS, tool_choice="required").choices[0]
        if forced.finish_reason == "tool_calls":
            seen.add(json.loads(forced.message.tool_calls[0].function.arguments)["city"])
    assert seen
    assert seen <= {"Oslo", "Rome"}


def test_responses(client):
    answer = client.responses.create(model="base", input="hi", instructions="Be kind.")
    assert answer.output_text == "base: hi"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "thought"
    assert answer.usage.output_tokens_details.reasoning_tokens == len("thought")
    assert answer.status == "completed"
    cut = client.responses.create(model="base", input="slow 50", max_output_tokens=12)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")

    tool = {"type": "function", **WEATHER, "strict": True}
    called = client.responses.create(model="base", input=CALL, tools=[tool]).output
    assert [item.type for item in called] == ["reasoning", "function_call"]
    result = {"type": "function_call_output", "call_id": called[1].call_id, "output": "rain"}
    history = [{"role": "user", "content": "w?"}, *(item.model_dump(exclude_none=True) for item in called), result]
    later = client.responses.create(model="base", input=[*history, {"role": "user", "content": "so?"}], tools=[tool])
    assert later.output_text == "base: so?"


def test_a_streamed_response_is_the_whole_one(client):
    for text in ("hi", CALL):
        events = list(client.responses.create(model="base", input=text, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        final = events[-1].response
        assert events[-1].type == "response.completed"
        parts = {
            kind: "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
            for kind in ("reasoning_text", "output_text", "function_call_arguments")
        }
        assert parts["reasoning_text"] == final.output[0].content[0].text
        assert parts["output_text"] == final.output_text
        assert parts["function_call_arguments"] == getattr(final.output[1], "arguments", "")
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == final.output
    with client.responses.stream(model="base", input="hi") as stream:
        assert stream.get_final_response().output_text == "base: hi"


def test_completions(client):
    answer = client.completions.create(model="base", prompt=["say a b", "say c"], n=2, max_tokens=9, echo=True)
    assert [choice.text for choice in answer.choices] == ["say a ba b", "say a ba b", "say cc", "say cc"]
    one = client.completions.create(model="base", prompt="say xyz", stop="z", logprobs=1)
    assert (one.choices[0].text, one.choices[0].logprobs.tokens) == ("xy", ["x", "y"])
    streamed = client.completions.create(model="base", prompt="say xyz", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "xyz"


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "words"),
    [
        ("chat/completions", {"model": "nope"}, 404, "model", "there is tuned, base"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "'king'; it takes system"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type", "only text"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}] * 21}, 400, "messages", "at most 20"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages", "at most 4,095"),
        ("chat/completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature", "valid number"),
        ("chat/completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ("chat/completions", {"logit_bias": {"1": 2}}, 400, "logit_bias", "not supported"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"n": 100}, 400, "n", "at most 72"),
        ("chat/completions", {"stop": ""}, 400, "stop", "at least 1"),
        ("chat/completions", {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ("chat/completions", {"tool_choice": "required"}, 400, "tool_choice", "needs one of tools"),
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name", "pattern"),
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, 400, "response_format", "cannot be followed"),
        ("chat/completions", {"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos", "leave one out"),
        ("responses", {"previous_response_id": "x"}, 400, "previous_response_id", "not supported"),
        ("responses", {"tools": [{"type": "web_search"}]}, 400, "tools[0].type", '{"type": "browser"}'),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type", "send the item itself"),
        *FIELDS,
        ("completions", {"prompt": []}, 400, "prompt", "empty"),
        ("completions", {"prompt": [999999]}, 400, "prompt", "outside 0"),
        ("completions", {"suffix": "x"}, 400, "suffix", "not supported"),
    ],
)  # fmt: skip
def test_errors_in_openais_shape(server, path, change, status, param, words):
    start = {"chat/completions": ask("x"), "responses": {"input": "x"}, "completions": {"prompt": "x"}}[path]
    seen, _, body = server.post(f"/v1/{path}", {**start, **change})
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (seen, error["param"]) == (status, param)
    assert words in error["message"]


def test_fields_that_change_no_answer_pass(client):
    answer = client.chat.completions.create(
        **ask(
            "a",
            user="me",
            metadata={"x": "y"},
            parallel_tool_calls=False,
            frequency_penalty=0,
            extra_body={"top_k": 0, "min_p": 0.0, "odd": None, "chat_template_kwargs": {"enable_thinking": True}},
        )
    )
    assert answer.choices[0].message.content == "base: a"


def prompt_size(server, body, path="chat/completions"):
    """How many tokens the prompt has, a byte a token."""
    status, _, answer = server.post(f"/v1/{path}", {"model": "base", **body})
    assert status == 200, answer
    found = json.loads(answer)["usage"]
    return found.get("prompt_tokens", found.get("input_tokens"))


def test_efforts_by_any_name(server):
    for effort in ("low", "high"):
        counts = {
            prompt_size(server, ask("x", reasoning_effort=effort)),
            prompt_size(server, ask("x", reasoning={"effort": effort})),
            prompt_size(server, ask("x", chat_template_kwargs={"reasoning_effort": effort})),
            prompt_size(server, {"input": "x", "reasoning": {"effort": effort, "summary": "auto"}}, "responses"),
            prompt_size(server, {"input": "x", "chat_template_kwargs": {"reasoning_effort": effort}}, "responses"),
        }
        assert counts == {prompt_size(server, ask("x")) + len(effort) - len("medium")}


def test_reasoning_can_be_left_out(client):
    for options in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        whole = client.chat.completions.create(**ask("a", extra_body=options)).choices[0].message
        assert (whole.content, hasattr(whole, "reasoning_content")) == ("base: a", False)
        chunks = list(client.chat.completions.create(**ask("a", stream=True, extra_body=options)))
        assert not any(hasattr(chunk.choices[0].delta, "reasoning_content") for chunk in chunks)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "base: a"


def test_more_tokens_than_there_are_is_cut_and_told(server, client):
    cut = client.chat.completions.create(**ask("long 2500", max_tokens=32000))
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2000)
    whole = client.chat.completions.create(**ask("a", max_tokens=2**31, max_completion_tokens=2**31))
    assert whole.choices[0].finish_reason == "stop"
    for name in ("max_output_tokens", "max_tokens"):
        status, _, body = server.post("/v1/responses", {"model": "base", "input": "long 2500", name: 32000})
        found = json.loads(body)
        assert (status, found["status"], found["usage"]["output_tokens"]) == (200, "incomplete", 2000)
    # The room of the model, less the prompt.
    long = client.completions.create(model="base", prompt="say " + "x" * 3000, max_tokens=32000)
    assert (long.choices[0].finish_reason, long.usage.total_tokens) == ("length", 4096)


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": SCHEMA},
        {"response_format": {"type": "json_schema", "schema": WEATHER["parameters"]}},
        {"response_format": {"type": "json_object", "schema": WEATHER["parameters"]}},
        {"guided_json": WEATHER["parameters"]},
        {"guided_json": json.dumps(WEATHER["parameters"])},
        {"guided_choice": ['{"city": "Oslo"}']},
        {"guided_regex": r'\{"city": "(Oslo|Rome)"\}'},
        {"structured_outputs": {"json": WEATHER["parameters"]}},
        {"structured_outputs": {"choice": ['{"city": "Rome"}']}},
        {"structured_outputs": {"regex": r'\{"city": "(Oslo|Rome)"\}'}},
    ],
)
def test_forms_by_any_name(client, options):
    """The scripted engine takes the last allowed token where its own is not: a form that is not held to would show."""
    said = "say <|channel|>final<|message|>Not at all what was asked for.<|return|>"
    answer = client.chat.completions.create(**ask(said, extra_body=options)).choices[0]
    assert re.match(r'\{"city": ?"(Oslo|Rome)', answer.message.content)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"null", 400),
        (b"[" * 100_000, 400),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
        (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400),
        (b'{"messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}", 400),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}]}).encode(), 413),
        (json.dumps(ask("x", tools=[{"type": "function", "function": {"name": "f", "parameters": json.loads('{"items":' * 90 + "{}" + "}" * 90)}}])).encode(), 400),
    ],
)  # fmt: skip
def test_malformed_bodies(server, body, status):
    seen, _, answer = server.post("/v1/chat/completions", body)
    assert seen == status
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_other_methods_paths_and_kinds(server):
    status, _, body = server.post("/v1/nothing", {})
    assert (status, "there is /" in body) == (404, True)
    status, headers, _ = server.post("/v1/models", {})
    assert (status, headers["Allow"]) == (405, "GET")
    assert server.post("/v1/chat/completions", ask("x"), {"Content-Type": "text/plain"})[0] == 415
    assert server.post("/v1/chat/completions", ask("x"), {"Host": "evil.example"})[0] == 403
    assert json.loads(server.get("/health")) == {"status": "ok"}
    assert "access-control-allow-origin" not in {name.lower() for name in headers}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server):
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "--json", json.dumps(ask("hi", stream=True))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    lines = [line for line in out.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_metrics_count_what_happened(server, client):
    before = server.metric("ossia_prompt_tokens_total"), server.metric("ossia_completion_tokens_total")
    usage = client.chat.completions.create(**ask("count")).usage
    assert server.metric("ossia_prompt_tokens_total") - before[0] == usage.prompt_tokens
    assert server.metric("ossia_completion_tokens_total") - before[1] == usage.completion_tokens
    assert server.metric("ossia_time_to_first_token_seconds_count") > 0
    assert server.metric("ossia_tokens_per_second_count") > 0
    assert server.metric("ossia_queue_depth") == 0


def leave(server, body):
    """Send a request, read its first bytes if it is a stream, and hang up."""
    port = int(server.url.rsplit(":", 1)[1])
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as opened:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        opened.sendall(head.encode() + data)
        server.until("ossia_running", 1)
        if body.get("stream"):
            assert opened.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
def test_work_stops_when_the_client_leaves(server, stream):
    cancelled = server.metric("ossia_cancelled_total")
    leave(server, ask("slow 1900", stream=stream))
    server.until("ossia_running", 0, seconds=3)
    assert server.metric("ossia_cancelled_total") == cancelled + 1


def test_a_failing_step_fails_its_answers_alone(server, client):
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the engine failed on this answer"):
            list(client.chat.completions.create(**ask("fail", stream=stream)))
        assert client.chat.completions.create(**ask("ok")).choices[0].message.content == "base: ok"


def test_a_failing_step_fails_none_of_those_that_wait(server):
    def post(text):
        return pool.submit(server.post, "/v1/chat/completions", ask(text))

    with ThreadPoolExecutor(16) as pool:
        # Eight places: "fail" gets the first that is free, "later" comes after it.
        running = [post("slow 900") for _ in range(7)]
        server.until("ossia_running", 7)
        short = post("slow 100")
        server.until("ossia_running", 8)
        fails = post("fail")
        server.until("ossia_queue_depth", 1)
        later = post("later")
        assert short.result()[0] == 200
        assert [done.result()[0] for done in (*running, fails)] == [500] * 8
        assert later.result()[0] == 200


def test_an_engine_that_keeps_failing_ends_the_process(tiny_gpt_oss):
    with scripted(tiny_gpt_oss) as server:
        for _ in range(3):
            assert server.post("/v1/chat/completions", ask("fail"))[0] == 500
        assert server.process.wait(20) == 1
        time.sleep(0.2)
        assert any("the engine has failed: RuntimeError: told to fail" in line for line in server.lines)


def test_a_full_queue_a_key_and_a_graceful_stop(tiny_gpt_oss):
    flags = ("--max_queue", 1, "--max_batch_size", 1)
    with scripted(tiny_gpt_oss, *flags, env={"OSSIA_API_KEY": "s3cret"}) as server:
        wrong = server.post("/v1/chat/completions", ask("x"))
        assert (wrong[0], wrong[1]["WWW-Authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            server.client("s3cre").models.list()
        assert "Ossia" in server.get("/")
        assert server.get("/health")

        client = server.client("s3cret")
        streams = [client.chat.completions.create(**ask("slow 60", stream=True)) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(**ask("x"))
        assert full.value.response.headers["Retry-After"] == "1"
        server.process.send_signal(signal.SIGTERM)
        status = 200
        while status == 200:
            status = server.post("/v1/completions", {"prompt": ""}, {"Authorization": "Bearer s3cret"})[0]
            status = 200 if status == 400 else status
        assert status == 503
        for stream in streams:
            chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "x" * 60
        assert server.process.wait(10) == 0
        assert "s3cret" not in "\n".join(server.lines)


@pytest.mark.parametrize(("timeout", "signals"), [(0.3, 1), (60, 2)])
def test_a_stop_that_does_not_wait(tiny_gpt_oss, timeout, signals):
    with scripted(tiny_gpt_oss, "--shutdown_timeout", timeout) as server:
        stream = server.client().chat.completions.create(**ask("slow 3000", stream=True))
        next(stream)
        started = time.monotonic()
        for _ in range(signals):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        with pytest.raises(openai.APIError, match="the server was stopped"):
            list(stream)
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 20


def test_several_adapters_answer_as_each_alone(real, tiny_gpt_oss, adapters):
    client = real.client()
    models = client.models.list().data
    names = [model.id for model in models]
    assert names == ["tuned-1", "second", tiny_gpt_oss.name]
    assert [getattr(model, "parent", None) for model in models] == [names[2], names[2], None]
    assert client.models.retrieve("second").id == "second"
    said = []
    for name, adapter, system in zip(names, (*adapters, None), (None, SYSTEM, None), strict=True):
        template = load_template(load_tokenizer(tiny_gpt_oss), "harmony", system=system)
        prompt = template.prompt([Message("user", "2+2?")])
        model = load_model(tiny_gpt_oss, device="cpu")
        alone = Engine(model if adapter is None else load_adapter(model, adapter), template)
        expected = template.parse(alone.generate([prompt], Sampling(max_new_tokens=24))[0])
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "2+2?"}], temperature=0, max_tokens=24
        )
        message = answer.choices[0].message
        assert answer.usage.prompt_tokens == len(prompt)
        assert (message.content or "", getattr(message, "reasoning_content", "")) == (
            expected.content,
            expected.thinking,
        )
        said.append((expected.content, expected.thinking))
    assert len(set(said)) == 3


def test_seeds(real):
    client = real.client()

    def say(**options):
        answer = client.chat.completions.create(
            model="second", messages=[{"role": "user", "content": "a"}], max_tokens=12, **options
        )
        return [choice.message.content for choice in answer.choices]

    assert say(seed=5) == say(seed=5)
    assert say(seed=5) != say(seed=6)
    assert len(set(say(seed=5, n=3))) == 3


def test_what_a_chat_template_would_not_show_is_refused(tiny_llama):
    """A template without tools, calls or effort."""
    template = load_template(load_tokenizer(tiny_llama))
    service = Service(ScriptedEngine(template, 300), {None: template}, ServeConfig(model=str(tiny_llama)), "base")
    asked, called = Message("user", "x"), Message("assistant", tool_calls=(ToolCall("f", "{}"),))

    def prompt(messages, tools=(), effort=None):
        return asyncio.run(service.prompt(None, messages, tools, effort))

    assert prompt([asked]) == template.prompt([asked])
    for arguments, param in (
        (([asked], TOOLS), "tools"),
        (([asked], [{"type": "python"}]), "messages"),
        (([asked, called],), "messages"),
        (([asked], (), "high"), "reasoning_effort"),
    ):
        with pytest.raises(ApiError, match=r"this model|gpt-oss") as refused:
            prompt(*arguments)
        assert (refused.value.status, refused.value.param) == (400, param)


BASIC = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
OPENCODE = {
    **BASIC, "max_tokens": 32000, "temperature": 0, "top_p": 1, "stream": True, "stream_options": {"include_usage": True},
    "tools": TOOLS, "tool_choice": "auto", "reasoning_effort": "medium",
}  # fmt: skip
CODEX = {
    "model": "base", "instructions": "Be kind.", "stream": True, "store": False, "parallel_tool_calls": False,
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {"x": "y"},
    "reasoning": {"effort": "high", "summary": "auto"}, "tool_choice": "auto", "text": {"verbosity": "medium"},
    "tools": [{"type": "function", **WEATHER, "strict": False}],
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "c"}], "encrypted_content": None},
        {"type": "function_call", "id": "fc", "call_id": "1", "name": "weather", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
    ],
}  # fmt: skip
OPENROUTER = {
    **BASIC, "reasoning": {"effort": "low", "enabled": True, "exclude": False}, "provider": {"order": ["x"]},
    "usage": {"include": True}, "transforms": [], "plugins": [], "min_p": 0, "top_k": 0, "repetition_penalty": 1,
}  # fmt: skip
VLLM = {
    **BASIC, "ignore_eos": False, "min_tokens": 0, "stop_token_ids": [], "skip_special_tokens": True, "top_k": -1,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "add_generation_prompt": True,
    "continue_final_message": False, "logit_bias": None, "best_of": 1, "use_beam_search": False, "priority": 0,
    "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}, "include_reasoning": True,
    "n": 1, "prompt_logprobs": None, "truncate_prompt_tokens": None, "request_id": "r", "cache_salt": "s",
}  # fmt: skip
LANGCHAIN = {
    **BASIC, "n": 1, "temperature": 0.7, "max_completion_tokens": 9, "parallel_tool_calls": True, "stop": None,
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "audio": None, "function_call": None},
        {"role": "user", "content": "d"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat/completions", body) for body in (OPENCODE, OPENROUTER, VLLM, LANGCHAIN)] + [("responses", CODEX)],
    ids=["opencode", "OpenRouter", "vLLM", "LangChain", "Codex"],
)
def test_what_clients_send_unasked_is_taken(server, path, body):
    status, _, answer = server.post(f"/v1/{path}", body)
    assert status == 200, answer


@pytest.fixture
def command(capsys, monkeypatch):
    """`command(code, …)`: what `ossia serve …` prints, run in this process."""
    monkeypatch.delenv("OSSIA_API_KEY", raising=False)

    def run(code, *args):
        capsys.readouterr()
        assert main(["serve", *map(str, args)]) == code
        done = capsys.readouterr()
        return done.err if code else done.out

    return run


def test_wrong_usage_before_anything_loads(command, tiny_gpt_oss, adapters, monkeypatch):
    model = ("--model", tiny_gpt_oss)
    monkeypatch.setattr("ossia.serve.run.model_of", None)
    assert "so a key is needed" in command(2, *model, "--host", "0.0.0.0")
    assert "did you mean '--port'" in command(2, *model, "--prot", 1)
    assert "--port is 70000" in command(2, *model, "--port", 70000)
    assert "takes a size" in command(2, *model, "--max_body_size", "big")
    assert "no such address" in command(2, *model, "--host", "no.such.host.invalid", "--api_key", "x")
    assert "two are called one" in command(2, "--adapters", f"one={adapters[0]}", f"one={adapters[1]}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} is in use" in command(1, *model, "--port", port)
    out = command(0, *model, "--port", 0, "--dry_run", "true", "--api_key", "s3cret")
    assert re.search(r"would serve gpt-oss at http://127\.0\.0\.1:\d+$", out)
    assert "s3cret" not in out


def test_vllm(command, ossia, tiny_gpt_oss, tiny_llama, adapters, tmp_path):
    vllm = ("--backend", "vllm", "--model")
    out = command(0, *vllm, tiny_gpt_oss, "--dry_run", "true", "--api_key", "s3cret", "--max_length", 8192)
    expected = (
        f"vllm serve {tiny_gpt_oss} --served-model-name gpt-oss --host 127.0.0.1 --port 8000 --max-model-len 8192"
    )
    assert out == f"{expected} --reasoning-parser openai_gptoss --tool-call-parser openai --enable-auto-tool-choice\n"
    assert "parser" not in command(0, *vllm, tiny_llama, "--dry_run", "true")
    assert "pip install vllm" in command(1, *vllm, tiny_llama)
    assert "export --adapters" in command(2, *vllm, tiny_gpt_oss, "--adapters", adapters[0])
    assert "--max_queue is not for --backend vllm" in command(2, *vllm, tiny_llama, "--max_queue", 3)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$VLLM_API_KEY $*"\nexit 7\n')
    fake.chmod(0o755)
    done = ossia("serve", *vllm, tiny_llama, env={"PATH": f"{fake.parent}:/usr/bin:/bin", "OSSIA_API_KEY": "k"})
    assert done.returncode == 7
    assert done.stdout.splitlines()[-1].startswith(f"k serve {tiny_llama}")
