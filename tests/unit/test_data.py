"""Files and formats: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json

import pytest

from ossia.config.parts import DataOptions
from ossia.data.formats import read_row
from ossia.data.prepare import Counts, conversations
from ossia.data.sources import BadRow, Row, find_files, read_rows
from ossia.errors import OssiaError, UsageError


def texts(value):
    return [(m.role, m.content, m.thinking) for m in read_row(Row(value, "f:1"))[1].messages]


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
    messages = read_row(Row(row, "f:1"))[1].messages
    assert messages[0].content == "ab"
    assert (messages[1].tool_calls[0].name, messages[1].tool_calls[0].arguments) == ("f", '{"x": 1}')
    assert messages[2].name == "f"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected an object"),
        ({"mesages": []}, "did you mean 'messages'"),
        ({}, "keys none"),
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
        read_row(Row(value, "f.jsonl:7"))
    assert message in str(caught.value)
    assert "f.jsonl:7" in str(caught.value)


def test_broken_lines_and_lists_name_their_place(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"messages": 1}\n\n{"a": \n\xff\xfe\n')
    found = list(read_rows(lines))
    assert found[0].source.endswith("a.jsonl:1")
    assert "a.jsonl:3: broken JSON" in str(found[1])
    assert "a.jsonl:4: not UTF-8" in str(found[2])
    whole = tmp_path / "a.json"
    for text, message in (
        ('[{"a": 1},\n]', "a.json:2: broken JSON"),
        ('{"a": 1}', "expected a list"),
        ('{"a":1}\n{"a":2}', "rename a file of JSON lines to .jsonl"),
    ):
        whole.write_text(text)
        with pytest.raises(BadRow, match=message):
            list(read_rows(whole))


def test_files_that_are_not_there_or_empty(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    for name, message in (
        ("trian.jsonl", r"no such file; did you mean .*train\.jsonl"),
        ("train.jsonl", "is empty"),
        ("no/x.json", "no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            find_files([str(tmp_path / name)])
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UsageError, match=r"\.csv is not read"):
        find_files([str(tmp_path / "x.csv")])
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match="in this folder"):
        find_files([str(tmp_path / "sub")])


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
    options = DataOptions(model_name=["小奥", "Ossia"], model_author=["Team"])
    answers = [c.messages[-1].content for c in conversations([str(path)], options, Counts())]
    assert answers == ["Ossia by Team", "我是小奥"]


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "q", "output": "a"}\n{"x": 1}\nnot json\n')
    with pytest.raises(OssiaError, match=r"a\.jsonl:2.*--on_bad_row skip"):
        list(conversations([str(path)], DataOptions(), Counts()))
    counts = Counts()
    assert len(list(conversations([str(path)], DataOptions(on_bad_row="skip"), counts))) == 1
    assert (counts.bad, "a.jsonl:2" in counts.first_bad) == (2, True)
