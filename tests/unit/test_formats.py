"""Files and formats: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json

import pytest

from ossia.config.parts import RowOptions
from ossia.data.formats import read_row
from ossia.data.readers import BadRow
from ossia.data.render import read_rows, refuse_bad
from ossia.errors import OssiaError


def texts(value):
    return [(m.role, m.content, m.thinking) for m in read_row(value, "f:1").conversation.messages]


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "翻译", "input": "hello", "output": "你好", "system": "简短", "history": [["q", "a"]]}
    assert texts(row) == [
        ("system", "简短", None),
        ("user", "q", None),
        ("assistant", "a", None),
        ("user", "翻译\nhello", None),
        ("assistant", "你好", None),
    ]


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_messages_with_reasoning(key):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", key: "why", "content": "a"}]}
    assert texts(row)[1] == ("assistant", "a", "why")


def test_content_parts_and_tool_results_get_their_function_name():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "assistant", "content": "done"},
        ]
    }
    messages = read_row(row, "f:1").conversation.messages
    assert messages[0].content == "ab"
    assert (messages[1].tool_calls[0].name, messages[1].tool_calls[0].arguments) == ("f", '{"x": 1}')
    assert messages[2].name == "f"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected an object"),
        ({"mesages": []}, "did you mean 'messages'"),
        ({}, "an empty row"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is str"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "did you mean 'user'"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts only"),
        ({"messages": [{"role": "assistant", "content": "x", "loss": -1}]}, "loss is -1"),
        ({"messages": [{"role": "user", "content": "x"}], "reasoning_effort": "max"}, "reasoning_effort is 'max'"),
        ({"instruction": "x", "outptu": "y"}, "no key 'output'; did you mean 'outptu'"),
        ({"instruction": 3, "output": "y"}, "instruction is int"),
        ({"instruction": "", "output": "y"}, "both empty"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history entry 1"),
    ],
)
def test_bad_rows_name_place_key_and_fix(value, message):
    with pytest.raises(BadRow) as caught:
        read_row(value, "f.jsonl:7")
    assert message in str(caught.value)
    assert "f.jsonl:7" in str(caught.value)


def test_names_fill_rows_by_language(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": "Who?", "output": "{{NAME}} by {{author}}"},
                {"instruction": "你是谁", "output": "我是{{name}}"},
            ]
        )
    )
    options = RowOptions(model_name=["小奥", "Ossia"], model_author=["Team"])
    answers = [row.conversation.messages[-1].content for row in read_rows([str(path)], options, 0)]
    assert answers == ["Ossia by Team", "我是小奥"]


def test_bad_rows_are_said_and_refused_on_request(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "q", "output": "a"}\n{"x": 1}\nnot json\n')
    good, bad, worse = read_rows([str(path)], RowOptions(), 0)
    assert [message.content for message in good.conversation.messages] == ["q", "a"]
    assert ("a.jsonl:2" in bad.bad, "a.jsonl:3" in worse.bad) == (True, True)
    refuse_bad(bad, RowOptions(on_bad_row="skip"))
    with pytest.raises(OssiaError, match=r"a\.jsonl:2.*--on_bad_row skip"):
        refuse_bad(bad, RowOptions())


USER, SAID = ("user", "q", None), ("assistant", "a", None)
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": OPENAI, "system": "s"}, [("system", "s", None), USER, SAID]),
        ("messages", {"messages": json.dumps(OPENAI), "id": None}, [USER, SAID]),
        (
            "multilingual-thinking",
            {"reasoning_language": "French", "developer": "d", "user": "q", "analysis": "w", "final": "a"},
            [("system", "reasoning language: French\n\nd", None), USER, ("assistant", "a", "w")],
        ),
        ("sharegpt", {"conversations": SHAREGPT, "system": "s"}, [("system", "s", None), USER, SAID]),
        ("sharegpt", {"conversations": OPENAI}, [USER, SAID]),
        ("sharegpt", {"conversation": SHAREGPT}, [USER, SAID]),
        ("alpaca", {"instruction": "q", "input": None, "output": "a"}, [USER, SAID]),
        ("alpaca", {"instruction": "q", "context": "c", "response": "a"}, [("user", "q\nc", None), SAID]),
        ("question/answer", {"question": "q", "answer": "a"}, [USER, SAID]),
        (
            "query/response",
            {"query": "q", "response": "a", "history": [["1", "2"]], "system": "s"},
            [("system", "s", None), ("user", "1", None), ("assistant", "2", None), USER, SAID],
        ),
        ("query/response", {"prompt": "q", "completion": "a"}, [USER, SAID]),
        ("query/response", {"prompt": OPENAI[:1], "completion": OPENAI[1:]}, [USER, SAID]),
        ("query/response", {"input": "q", "output": "a"}, [USER, SAID]),
        ("query/response", {"query": "q"}, [USER]),
        ("text", {"text": "words", "label": "news"}, []),
        ("kto", {"messages": OPENAI, "label": True}, [USER, SAID]),
        ("kto", {"prompt": "q", "completion": "a", "label": "0"}, [USER, SAID]),
        ("messages", {"messages": OPENAI, "label": "sports"}, [USER, SAID]),
        (
            "preference",
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "b"}},
            [USER, SAID],
        ),
        ("preference", {"messages": OPENAI, "rejected_response": "b"}, [USER, SAID]),
        ("preference", {"query": "q", "response": "a", "rejected_response": "b"}, [USER, SAID]),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, [USER, SAID]),
        (
            "preference",
            {"prompt": "q", "chosen": OPENAI, "rejected": [OPENAI[0], {"role": "assistant", "content": "b"}]},
            [USER, SAID],
        ),
        ("preference", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, [USER, SAID]),
    ],
)
def test_each_format_is_told_by_its_keys(name, row, expected):
    found = read_row(row, "f:1")
    assert found.format == name
    assert [(m.role, m.content, m.thinking) for m in found.conversation.messages] == expected
    assert (found.conversation.text is not None) == (name == "text")
    assert [m.content for m in found.conversation.rejected or []] == (["b"] if name == "preference" else [])
    assert found.conversation.label == (
        {"a": True}.get(row.get("completion"), True) and row["label"] is True if name == "kto" else None
    )


def test_columns_that_mean_nothing_are_named():
    assert read_row({"query": "q", "response": "a", "id": 3, "source": "x"}, "f:1").unused == ["source"]
    assert read_row({"messages": OPENAI, "tools": None, "reasoning_effort": "low"}, "f:1").unused == []


def test_columns_get_the_names_that_formats_know():
    columns = {"text1": "query", "text2": "response"}
    assert texts_of(read_row({"text1": "q", "text2": "a"}, "f:1", columns)) == [USER, SAID]
    assert texts_of(
        read_row({"question": "a", "answer": "q"}, "f:1", {"question": "answer", "answer": "question"})
    ) == [USER, SAID]
    with pytest.raises(BadRow, match="the row has a column 'query' too"):
        read_row({"text1": "q", "query": "x", "text2": "a"}, "f:1", columns)


def texts_of(found):
    return [(m.role, m.content, m.thinking) for m in found.conversation.messages]


def test_sharegpt_calls_and_results():
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "function_call", "value": json.dumps([call, {"name": "g", "arguments": "{}"}])},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([{"name": "f"}, {"name": "g"}]),
    }
    conversation = read_row(row, "f:1").conversation
    roles = [message.role for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    asked = conversation.messages[1]
    assert (asked.content, [(c.name, c.arguments) for c in asked.tool_calls]) == (
        "I look.",
        [("f", '{"x": 1}'), ("f", '{"x": 1}'), ("g", "{}")],
    )
    assert [m.name for m in conversation.messages[2:5]] == ["f", "f", "g"]
    assert len(conversation.tools) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "humn", "value": "q"}]}, "did you mean 'human'"),
        ({"conversations": [{"from": "human", "value": None}]}, "conversations[0]: no content"),
        ({"conversations": [{"from": "observation", "value": "3"}]}, "no function_call before"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]},
            "text that is not JSON",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}, "says nothing"),
        (
            {
                "user": "q",
                "analysis": "w",
                "final": "a",
                "messages": [*OPENAI[:1], {"role": "assistant", "content": "b"}],
            },
            "final is not what the last",
        ),
        ({"question": "q", "anwser": "a"}, "no key 'answer'; did you mean 'anwser'"),
        ({"query": float("nan"), "response": "a"}, "query is NaN"),
        ({"query": "", "response": "a"}, "query is empty"),
        ({"text": "  "}, "text is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "rejected": "a"}, "rejected without chosen"),
        ({"messages": OPENAI, "chosen": "x", "rejected": "y"}, "ends with an answer, and chosen"),
        ({"chosen": OPENAI, "rejected": [{"role": "user", "content": "other"}, OPENAI[1]]}, "different prompts"),
        ({"messages": OPENAI[:1], "label": False}, "no answer at the end"),
        ({"messages": OPENAI, "tools": "{"}, "tools is a text that is not JSON"),
        (
            {
                "messages": [
                    OPENAI[0],
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": {"x": float("nan")}}}],
                    },
                ]
            },
            "NaN or Infinity",
        ),
        ({"messages": [{"role": "user", "content": "q", "thinking": "hm"}, OPENAI[1]]}, "only the assistant reasons"),
        (
            {"messages": [{"role": "user", "content": "q", "tool_calls": [{"function": {"name": "f"}}]}, OPENAI[1]]},
            "only the assistant calls",
        ),
        ({"messages": [{"role": "system", "content": "1"}, *OPENAI], "system": "2"}, "two different instructions"),
        ({"instruction": "q", "history": [["1", " "]], "output": "a"}, "history entry 1 has no answer"),
    ],
)
def test_bad_rows_of_every_format(row, message):
    with pytest.raises(BadRow) as caught:
        read_row(row, "f.jsonl:7")
    assert message in str(caught.value)
    assert "f.jsonl:7" in str(caught.value)
