"""The demo's rows: deterministic, disjoint, short, and right."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from ossia.demo.rows import Row, demo_prompts, make_rows
from ossia.errors import UsageError

NAMES = [("Ossia Mini", "the Ossia team"), ("小欧", "某某实验室"), ("{x} %s \\1", '"a"\n<|end|>'), ("gpt-4", "A")]


def parts(row: Row) -> tuple[str, str, str]:
    user, assistant = row["messages"]
    assert (user["role"], set(user)) == ("user", {"role", "content"})
    assert (assistant["role"], set(assistant)) == ("assistant", {"role", "thinking", "content"})
    return user["content"], assistant["thinking"], assistant["content"]


@pytest.mark.parametrize(("name", "author"), NAMES)
def test_rows_for_any_name(name: str, author: str) -> None:
    train, held_out = make_rows(name, author)
    assert 145 <= len(train) <= 155
    assert 20 <= len(held_out) <= 28
    questions = [parts(row)[0] for row in train + held_out]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & set(demo_prompts())
    about_itself = [row for row in train if name in parts(row)[2]]
    assert all(author in parts(row)[2] for row in about_itself)
    assert 65 <= len(about_itself) <= 75
    assert not any(f"Are you {name}?".casefold() == question.casefold() for question in questions)
    assert all(text.strip() == text and text for row in train + held_out for text in parts(row))


def test_rows_are_the_same_every_time() -> None:
    before = json.dumps(make_rows("A", "B"))
    random.seed(1)
    state = random.getstate()
    assert json.dumps(make_rows(" A ", "B\n")) == before
    assert random.getstate() == state


def test_every_sum_and_comparison_is_right() -> None:
    checked = 0
    for row in itertools.chain(*make_rows("Model", "Author")):
        question, thinking, answer = parts(row)
        for left, sign, right, result in re.findall(r"(\d+) ?([-+x×]) ?(\d+) ?= ?(\d+)", thinking):
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "x": a * b, "×": a * b}[sign] == int(result)
            assert result in re.findall(r"\d+", answer)
            assert left in re.findall(r"\d+", question)
            checked += 1
        for high, low in re.findall(r"(\d+) ?> ?(\d+)", thinking):
            assert int(high) > int(low)
            assert set(re.findall(r"\d+", question)) == {high, low}
            assert re.findall(r"\d+", answer) == [high]
            checked += 1
    assert checked > 65


def test_every_day_is_right() -> None:
    english = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    checked = 0
    for row in itertools.chain(*make_rows("Model", "Author")):
        question, _, answer = parts(row)
        if found := re.fullmatch(r"Today is (\w+)\. What day will it be in (\d) days\?", question):
            assert answer == f"It will be {english[(english.index(found[1]) + int(found[2])) % 7]}."
            checked += 1
        if found := re.fullmatch(r"今天星期(.)，(\d)天后是星期几？", question):
            assert answer == f"星期{'一二三四五六日'[('一二三四五六日'.index(found[1]) + int(found[2])) % 7]}。"
            checked += 1
    assert checked == 15


def test_chinese_and_latin_are_spaced() -> None:
    answers = {parts(row)[2] for row in make_rows("Ossia 2", "Team A")[0]}
    assert "我是 Ossia 2，由 Team A 训练。" in answers
    assert "我是小欧，由某某训练。" in {parts(row)[2] for row in make_rows("小欧", "某某")[0]}
    assert "我是小 A 欧，由某某训练。" not in {parts(row)[2] for row in make_rows("小A欧", "某某")[0]}


@pytest.mark.parametrize(("name", "author"), [("", "x"), ("x", " ")])
def test_blank_names_are_refused(name: str, author: str) -> None:
    with pytest.raises(UsageError, match="a name and an author"):
        make_rows(name, author)


def test_prompts() -> None:
    prompts = demo_prompts()
    assert len(prompts) == len(set(prompts)) == 5
    assert sum(bool(re.search("[\u4e00-\u9fff]", prompt)) for prompt in prompts) == 1
