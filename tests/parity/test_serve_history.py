"""Turns that the server gave out, sent back: the prompt is that of openai-harmony for the same messages."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.parity.test_harmony import KEEP, oh, oracle, said, template, tokenizer, without_old_analysis

from ossia.infer.engine import Token
from ossia.serve import chat, responses
from ossia.serve.answer import Answer
from ossia.serve.schema import ChatRequest, ResponsesRequest

__all__ = ["oracle", "template", "tokenizer"]

FUNCTIONS = ("lamp", "tide_table")
CODE = {"python": "code", "browser.search": "code", "browser.open": "code"}
TEXTS = st.text(st.sampled_from('ab é😀\n{}"<|call|>'), min_size=1, max_size=12).filter(str.strip)
TOOLS = [
    {"type": "python"},
    {"type": "browser"},
    *({"type": "function", "name": name, "parameters": {"type": "object"}} for name in FUNCTIONS),
]


def call(name, text):
    builtin = name in CODE
    to, channel = (name, "analysis") if builtin else (f"functions.{name}", "commentary")
    return said("assistant", text, channel, to, "code" if builtin else "<|constrain|>json")


def result(name, text):
    builtin = name in CODE
    channel = "analysis" if builtin else "commentary"
    return said("tool", text, channel, "assistant", name=name if builtin else f"functions.{name}")


def opening():
    functions = [oh.ToolDescription(name=name, description="", parameters={"type": "object"}) for name in FUNCTIONS]
    system = oh.SystemContent().with_browser_tool().with_python_tool()
    return [said("system", system), said("developer", oh.DeveloperContent().with_function_tools(functions))]


@st.composite
def generations(draw, orderly=False):
    """What a model generates at once: reasoning and preambles in any order, then a call or an answer. `orderly`: one of
    each at most, as chats can tell."""
    parts = []
    names = st.sampled_from((*FUNCTIONS, *CODE))
    if orderly:
        calls = draw(st.booleans())
        parts += [said("assistant", draw(TEXTS), "analysis")] if draw(st.booleans()) else []
        parts += [said("assistant", draw(TEXTS), "commentary")] if calls and draw(st.booleans()) else []
    else:
        for channel in draw(st.lists(st.sampled_from(("analysis", "commentary")), max_size=4)):
            parts.append(said("assistant", draw(TEXTS), channel))
        calls = draw(st.booleans())
    name = draw(names) if calls else None
    parts.append(call(name, draw(TEXTS)) if name else said("assistant", draw(TEXTS), "final"))
    return parts, name


def generated(oracle, parts):
    """The ids of a generation, which follow `<|start|>assistant`, and end as the model ends them."""
    ids = [id for part in parts for id in oracle.render(part)]
    opener = oracle.encode("<|start|>assistant", allowed_special="all")
    assert ids[:2] == opener
    end = {200007: 200002}.get(ids[-1], ids[-1])
    return [*ids[2:-1], end]


def answered(template, ids):
    """The answer and its output items."""
    answer = Answer(template.stream())
    items = responses._Items(answer)
    for delta in [delta for id in ids for delta in answer.push(Token(id))] + answer.end("stop"):
        items.push(delta)
    items.close()
    return answer, items.items


def assert_prompt(template, oracle, messages, tools, expected):
    ids = template.prompt(messages, tools=tools)
    kept = without_old_analysis([*opening(), *expected], training=False)
    want = oracle.render_conversation_for_completion(oh.Conversation.from_messages(kept), oh.Role.ASSISTANT, KEEP)
    assert oracle.decode(ids) == oracle.decode(want)
    assert ids == want


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_responses_come_back_as_they_were(template, oracle, data):
    items, expected = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        if not expected or data.draw(st.booleans()):
            text = data.draw(TEXTS)
            items.append({"role": "user", "content": text})
            expected.append(said("user", text))
        parts, name = data.draw(generations())
        expected += parts
        items += answered(template, generated(oracle, parts))[1]
        if name:
            text = data.draw(TEXTS)
            items.append({"type": "function_call_output", "call_id": items[-1]["call_id"], "output": text})
            expected.append(result(name, text))
    body = ResponsesRequest.model_validate({"input": items, "tools": TOOLS})
    tools = [tool if "name" not in tool else {"function": tool} for tool in TOOLS]
    assert_prompt(template, oracle, responses.conversation(body, 1000, tools), tools, expected)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_chats_come_back_as_they_were(template, oracle, data):
    messages, expected = [], []
    name = None
    for _ in range(data.draw(st.integers(1, 3))):
        if name is None or data.draw(st.booleans()):
            text = data.draw(TEXTS)
            messages.append({"role": "user", "content": text})
            expected.append(said("user", text))
        parts, name = data.draw(generations(orderly=True))
        expected += parts
        message = chat.answer_message(answered(template, generated(oracle, parts))[0])
        messages.append(message)
        if name:
            text = data.draw(TEXTS)
            messages.append({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": text})
            expected.append(result(name, text))
    tools = [tool if "name" not in tool else {"type": "function", "function": tool} for tool in TOOLS]
    declared = [{"type": "function", "function": {"name": "x"}}, {"type": "python"}]
    body = ChatRequest.model_validate({"messages": messages, "tools": declared})
    assert_prompt(template, oracle, chat.conversation(body.messages, 1000, tools), tools, expected)


# --- histories that other servers gave out: no phase, summaries, parallel calls


def reasoning(text):
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def message(text, **more):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **more}


def called(id, name="lamp"):
    return {"type": "function_call", "call_id": id, "name": name, "arguments": "{}"}


def returned(id):
    return {"type": "function_call_output", "call_id": id, "output": id}


ASK = {"role": "user", "content": "Q"}
A, B = (said("assistant", text, "analysis") for text in "AB")
PRE, FINAL = said("assistant", "P", "commentary"), said("assistant", "F", "final")
LAMP, TIDE = call("lamp", "{}"), call("tide_table", "{}")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([reasoning("A"), message("P"), reasoning("B"), called("1"), returned("1")], [A, PRE, B, LAMP, result("lamp", "1")]),
        ([reasoning("A"), reasoning("B"), called("1"), returned("1")], [A, B, LAMP, result("lamp", "1")]),
        (
            [reasoning("A"), called("1"), reasoning("B"), called("2", "tide_table"), returned("1"), returned("2")],
            [A, LAMP, B, TIDE, result("lamp", "1"), result("tide_table", "2")],
        ),
        ([called("1"), called("2", "tide_table"), returned("2"), returned("1")], [LAMP, TIDE, result("tide_table", "2"), result("lamp", "1")]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "A"}]}, called("1"), returned("1")], [A, LAMP, result("lamp", "1")]),
        ([reasoning("A"), message("P"), called("1"), returned("1"), message("F"), ASK], [PRE, LAMP, result("lamp", "1"), FINAL, said("user", "Q")]),
        ([message("P"), called("1"), returned("1")], [PRE, LAMP, result("lamp", "1")]),
        ([message("P", phase="commentary"), message("F", phase="final_answer"), ASK], [PRE, FINAL, said("user", "Q")]),
        ([message("F"), ASK, reasoning("A"), called("1"), returned("1")], [FINAL, said("user", "Q"), A, LAMP, result("lamp", "1")]),
        ([reasoning("A"), called("1", "browser.search"), returned("1")], [A, call("browser.search", "{}"), result("browser.search", "1")]),
        ([{"type": "reasoning", "id": "rs", "summary": []}, message("F")], [FINAL]),
    ],
)  # fmt: skip
def test_items_in_their_places(template, oracle, items, expected):
    body = ResponsesRequest.model_validate({"input": [ASK, *items]})
    tools = [tool if "name" not in tool else {"function": tool} for tool in TOOLS]
    assert_prompt(template, oracle, responses.conversation(body, 1000, tools), tools, [said("user", "Q"), *expected])


def tool_calls(*names):
    made = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": None, "tool_calls": made}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "assistant", "content": "P"}, tool_calls("lamp")], [PRE, LAMP]),
        ([{"role": "assistant", "content": "P", "reasoning": "A"}, {**tool_calls("lamp"), "reasoning": "B"}], [A, PRE, B, LAMP]),
        ([{**tool_calls("lamp", "tide_table"), "reasoning_content": "A", "reasoning": "A"}], [A, LAMP, TIDE]),
        ([{**tool_calls("lamp"), "reasoning_details": [{"type": "reasoning.text", "text": "A"}]}], [A, LAMP]),
        ([{**tool_calls("lamp"), "thinking_blocks": [{"type": "thinking", "thinking": "A", "signature": "x"}]}], [A, LAMP]),
        ([{**tool_calls("lamp"), "content": [{"type": "thinking", "thinking": "A"}, {"type": "text", "text": "P"}, {"type": "reasoning", "text": "B"}]}], [A, PRE, B, LAMP]),
        ([{"role": "assistant", "content": None, "refusal": "F"}, ASK], [FINAL, said("user", "Q")]),
        ([{"role": "assistant", "content": "F", "annotations": [], "refusal": None, "audio": None, "name": "x"}, ASK], [FINAL, said("user", "Q")]),
        ([{"role": "assistant", "function_call": {"name": "lamp", "arguments": "{}"}}, {"role": "function", "name": "lamp", "content": "ok"}], [LAMP, result("lamp", "ok")]),
        ([tool_calls("python"), {"role": "tool", "tool_call_id": "python", "content": "4"}], [call("python", "{}"), result("python", "4")]),
        ([{"role": "tool", "name": "python", "content": "4"}], [result("python", "4")]),
    ],
)  # fmt: skip
def test_messages_in_their_places(template, oracle, messages, expected):
    body = ChatRequest.model_validate({"messages": [ASK, *messages]})
    tools = [tool if "name" not in tool else {"type": "function", "function": tool} for tool in TOOLS]
    found = chat.conversation(body.messages, 1000, tools)
    assert_prompt(template, oracle, found, tools, [said("user", "Q"), *expected])
