"""Figures of a data set."""

from __future__ import annotations

import json

import pytest

from ossia.config.parts import DataOptions
from ossia.data.report import Bin, Report, collect, histogram
from ossia.data.sources import find_datasets
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template


@pytest.fixture(scope="module")
def template(tiny_gpt_oss):
    return load_template(load_tokenizer(tiny_gpt_oss), "harmony")


@pytest.fixture
def report(tmp_path, template):
    """`report(rows, …)`: the figures of rows, each an object or the text of a line."""

    def build(*rows: object, keep: int = 0, **options) -> Report:
        path = tmp_path / "a.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return collect(find_datasets([str(path)]), DataOptions(**options), template, keep=keep)

    return build


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def test_every_bad_row_has_place_key_and_reason(report):
    usr = {"messages": [turn("usr", "q")]}
    found = report({"instruction": "q", "output": "a"}, usr, "{", {"instruction": 3}, {"instruction": "q", "outptu": 1})
    assert (found.rows, found.bad, found.usable) == (5, 4, 1)
    assert [(bad.source.rpartition("/")[2], bad.key) for bad in found.bad_rows] == [
        ("a.jsonl:2", "messages[0].role"),
        ("a.jsonl:3", None),
        ("a.jsonl:4", "instruction"),
        ("a.jsonl:5", "output"),
    ]
    assert found.bad_rows[2].reason == "instruction is int; a text is needed"


def test_many_bad_rows_are_grouped_by_reason(report):
    rows = [{"messages": [turn("user", "q")] * n + [turn("usr", "q")]} for n in range(30)]
    found = report(*rows)
    assert (found.bad, len(found.bad_rows), len(found.reasons)) == (30, 20, 1)
    assert next(iter(found.reasons)).startswith("messages[N].role is 'usr'")


def test_a_row_that_the_template_refuses_is_bad(report):
    found = report({"messages": [turn("user", "q"), turn("tool", "3"), turn("assistant", "a")]})
    assert found.bad == 1
    assert "a result with no function_call before it" in found.bad_rows[0].reason


def test_a_broken_list_is_one_bad_place_and_other_files_are_read(tmp_path, template):
    (tmp_path / "a.json").write_text('[{"instruction": "q", \n}]')
    (tmp_path / "b.json").write_text('[{"instruction": "q", "output": "a"}]')
    found = collect(find_datasets([str(tmp_path)]), DataOptions(), template)
    assert (found.bad, found.usable) == (1, 1)
    assert found.bad_rows[0].source.endswith("a.json:2")


def test_repeats_placeholders_long_untrained_and_blank_reasoning(report):
    row = {"instruction": "Who?", "output": "{{name}} of {{ team }}"}
    found = report(
        row,
        row,
        {"instruction": "Who?", "output": "x" * 300},
        {"messages": [turn("user", "alone")]},
        {"messages": [turn("user", "1"), turn("assistant", "a", thinking=" ")]},
        {"messages": [turn("user", "2"), turn("assistant", "<think>\n</think>a", thinking=None)]},
        max_length=400,
    )
    assert (found.duplicates.count, found.repeated_questions.count) == (1, 1)
    assert found.duplicates.first[0].endswith("a.jsonl:2")
    assert found.placeholders.count == 2
    assert found.placeholder_names == {"name": 2, "team": 2}
    assert (found.too_long.count, found.untrained.count, found.notes["empty_reasoning"].count) == (1, 1, 2)
    assert found.usable == found.rows - 2


def test_filled_placeholders_are_not_left(report):
    found = report({"instruction": "Who?", "output": "{{NAME}}"}, model_name=["Ossia"])
    assert found.placeholders.count == 0


def test_words_of_rows_cannot_steer_a_terminal(report):
    found = report({"instruction": "q", "output": "{{\x1b[2J\ud800}}", "reasoning_language": "\x1b[1m"})
    assert list(found.reasoning_languages) == ["?[1m"]
    found = report({"instruction": "q", "output": "{{\x1b[2J}}"})
    assert list(found.placeholder_names) == ["?[2J"]


def test_tokens_by_channel_turns_and_scripts(report, template):
    found = report(
        {"messages": [turn("user", "1+1?"), turn("assistant", "two", thinking="count")]},
        {
            "messages": [
                turn("user", "你好吗"),
                turn("assistant", "很好"),
                turn("user", "да"),
                turn("assistant", "好的"),
            ]
        },
        {"messages": [turn("user", "привет, мир"), turn("assistant", "да")], "reasoning_language": "Russian"},
        keep=2,
    )
    assert set(found.channels) == {"", "analysis", "final"}
    assert found.channels[""].trained == 0
    assert found.total.trained == sum(share.trained for share in found.channels.values())
    assert found.total.tokens == sum(found.lengths)
    assert found.turns == {1: 2, 2: 1}
    assert found.scripts == {"Latin": 1, "Chinese characters": 1, "Cyrillic": 1}
    assert found.reasoning_languages == {"Russian": 1}
    assert [len(rendered.input_ids) for _, rendered in found.kept] == list(found.lengths[:2])
    assert found.percentiles()["max"] == max(found.lengths)


def test_histogram_has_every_row_and_round_bins():
    lengths = [1, 2, 3, 18, 19, 20, 20, 39]
    assert histogram([], 4) == []
    bins = histogram(lengths, 4)
    assert bins == [Bin(0, 10, 3), Bin(10, 20, 2), Bin(20, 30, 2), Bin(30, 40, 1)]
    tail = histogram([10] * 1000 + [5000], 10)
    assert sum(part.rows for part in tail) == 1001
    assert tail[-1].end == 5001
    assert len(tail) <= 10
