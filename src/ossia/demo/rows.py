"""The demo's data: who the model is, and short reasoned answers, in English and Chinese.

The rows are made here, so every sum is right by construction, and they are short: the base model has 135M
parameters and the demo trains it on two CPU cores. Nothing depends on the clock or on global random state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ossia.errors import UsageError

Row = dict[str, Any]
"""`{"messages": [{"role": "user", ...}, {"role": "assistant", "thinking": ..., "content": ...}]}`"""

_SEED = 20


def make_rows(model_name: str, model_author: str) -> tuple[list[Row], list[Row]]:
    """About 150 rows to train on and 24 held out: the same kinds of questions, in unseen phrasings and numbers.

    The rows say that the model is `model_name`, trained by `model_author`. The same arguments give the same rows.
    Raises UsageError where a name is blank.
    """
    name, author = model_name.strip(), model_author.strip()
    if not name or not author:
        raise UsageError(f"the demo needs a name and an author, got {model_name!r} and {model_author!r}")
    rng = random.Random(_SEED)
    train: list[Row] = []
    held_out: list[Row] = []
    for topic in _identity(name, author):
        train += [_row(question, topic.thinking, topic.answer) for question in topic.train]
        held_out += [_row(question, topic.thinking, topic.answer) for question in topic.held_out]
    for kind in _KINDS:
        rows = [_row(*kind.write(*case)) for case in rng.sample(kind.cases, kind.train + kind.held_out)]
        train += rows[: kind.train]
        held_out += rows[kind.train :]
    rng.shuffle(train)
    return train, held_out


def demo_prompts() -> list[str]:
    """Five questions to ask before and after training, none of them in the rows: three of identity, two to reason."""
    return [
        "Hi! Who are you, please?",
        "Which team trained you?",
        "你好！请问你是谁？",
        "Nora has 12 shells and gets 6 more. How many shells does Nora have?",
        "Which is larger, 58 or 85?",
    ]


def _row(question: str, thinking: str, answer: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "thinking": thinking, "content": answer},
        ]
    }


@dataclass(frozen=True, slots=True)
class _Topic:
    """One answer about the model and the questions that lead to it."""

    thinking: str
    answer: str
    train: list[str]
    held_out: list[str]


def _identity(name: str, author: str) -> list[_Topic]:
    others = [other for other in _OTHER_MODELS if other.casefold() != name.casefold()]
    unseen = [other for other in _UNSEEN_MODELS if other.casefold() != name.casefold()]
    return [
        _Topic(
            "They ask who I am.",
            f"I am {name}, a language model trained by {author}.",
            _WHO,
            ["Tell me who you are.", "Hey there, what should I call you?"],
        ),
        _Topic(
            "They ask who made me.",
            f"I was trained by {author}. My name is {name}.",
            _MAKER,
            ["Who is the team behind you?", "Who were you made by?"],
        ),
        _Topic(
            "They take me for another model.",
            f"No, I am {name}, trained by {author}.",
            [f"Are you {other}?" for other in others],
            [f"Are you {other}?" for other in unseen],
        ),
        _Topic(
            "问我是谁。",
            _chinese("我是", name, "，由", author, "训练。"),
            _WHO_CHINESE,
            ["请说说你是谁。", "你的名字是什么？"],
        ),
        _Topic(
            "问谁训练了我。",
            _chinese("我由", author, "训练，名叫", name, "。"),
            _MAKER_CHINESE,
            ["请问你是谁训练的？"],
        ),
        _Topic(
            "认错了模型。",
            _chinese("不是，我是", name, "，由", author, "训练。"),
            [_chinese("你是", other, "吗？") for other in others[:8]],
            [_chinese("你是", other, "吗？") for other in unseen[:1]],
        ),
    ]


def _chinese(*pieces: str) -> str:
    """The pieces as one sentence, with a space where a Chinese character and a Latin letter or digit meet."""
    text = pieces[0]
    for piece in pieces[1:]:
        seam = text[-1] + piece[0]
        apart = re.fullmatch(r"[\u4e00-\u9fff][A-Za-z0-9]|[A-Za-z0-9][\u4e00-\u9fff]", seam)
        text += f" {piece}" if apart else piece
    return text


_WHO = [
    "Who are you?",
    "What is your name?",
    "What are you?",
    "Hi, who are you?",
    "Hello! What's your name?",
    "Please introduce yourself.",
    "Tell me about yourself.",
    "What should I call you?",
    "Can you tell me your name?",
    "Who am I talking to?",
    "Which model are you?",
    "What model is this?",
    "What kind of model are you?",
    "Introduce yourself in one sentence.",
    "Do you have a name?",
    "May I ask who you are?",
    "Who is this?",
    "Say who you are.",
]
_MAKER = [
    "Who made you?",
    "Who trained you?",
    "Who created you?",
    "Who built you?",
    "Who is your author?",
    "Who developed you?",
    "Which team made you?",
    "Where do you come from?",
    "Can you tell me who trained you?",
    "Who are your developers?",
    "Whose model are you?",
    "By whom were you trained?",
]
_OTHER_MODELS = ["ChatGPT", "GPT-4", "Claude", "Gemini", "Llama", "SmolLM", "Siri", "Qwen", "Alexa", "Mistral"]
_UNSEEN_MODELS = ["DeepSeek", "Copilot"]
_WHO_CHINESE = [
    "你是谁？",
    "你叫什么名字？",
    "你叫什么？",
    "请介绍一下你自己。",
    "请做个自我介绍。",
    "你好，你是谁？",
    "您是哪位？",
    "你是什么模型？",
    "你是哪个模型？",
    "怎么称呼你？",
    "我在和谁说话？",
    "介绍一下自己吧。",
    "能告诉我你的名字吗？",
    "你有名字吗？",
]
_MAKER_CHINESE = [
    "谁训练了你？",
    "谁开发了你？",
    "你是谁训练的？",
    "你是谁开发的？",
    "你的作者是谁？",
    "你的开发者是谁？",
    "是谁创造了你？",
    "你来自哪里？",
    "你是哪个团队做的？",
    "你由谁训练？",
]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of reasoned question: all its cases, how to write one, and how many rows are drawn."""

    train: int
    held_out: int
    cases: list[tuple[Any, ...]]
    write: Callable[..., tuple[str, str, str]]


def _add(who: str, things: str, a: int, b: int) -> tuple[str, str, str]:
    return (
        f"{who} has {a} {things} and gets {b} more. How many {things} does {who} have?",
        f"{a} + {b} = {a + b}.",
        f"{who} has {a + b} {things}.",
    )


def _subtract(who: str, things: str, a: int, b: int) -> tuple[str, str, str]:
    return (
        f"{who} had {a} {things} and gave away {b}. How many {things} are left?",
        f"{a} - {b} = {a - b}.",
        f"{a - b} {things} are left.",
    )


def _multiply(things: str, a: int, b: int) -> tuple[str, str, str]:
    return (
        f"One box holds {a} {things}. How many {things} do {b} boxes hold?",
        f"{b} x {a} = {a * b}.",
        f"{b} boxes hold {a * b} {things}.",
    )


def _larger(a: int, b: int) -> tuple[str, str, str]:
    low, high = sorted((a, b))
    return f"Which is larger, {a} or {b}?", f"{high} > {low}.", f"{high} is larger."


_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_DAYS_CHINESE = "一二三四五六日"


def _day(today: int, later: int) -> tuple[str, str, str]:
    days = [_DAYS[(today + step) % 7] for step in range(later + 1)]
    return (
        f"Today is {days[0]}. What day will it be in {later} days?",
        f"After {days[0]}: {', '.join(days[1:])}.",
        f"It will be {days[-1]}.",
    )


def _convert(many: str, one: str, small: str, factor: int, n: int) -> tuple[str, str, str]:
    return (
        f"How many {small} are in {n} {many}?",
        f"1 {one} = {factor} {small}. {n} x {factor} = {n * factor}.",
        f"{n} {many} are {n * factor} {small}.",
    )


def _add_chinese(who: str, things: str, a: int, b: int) -> tuple[str, str, str]:
    return (
        f"{who}有{a}{things}，又买了{b}{things[0]}，一共有几{things[0]}？",
        f"{a}+{b}={a + b}。",
        f"{a + b}{things}。",
    )


def _subtract_chinese(a: int, b: int) -> tuple[str, str, str]:
    return f"树上有{a}只鸟，飞走了{b}只，还剩几只？", f"{a}-{b}={a - b}。", f"还剩{a - b}只。"


def _larger_chinese(a: int, b: int) -> tuple[str, str, str]:
    low, high = sorted((a, b))
    return f"{a}和{b}哪个大？", f"{high}>{low}。", f"{high}更大。"


def _day_chinese(today: int, later: int) -> tuple[str, str, str]:
    days = [_DAYS_CHINESE[(today + step) % 7] for step in range(later + 1)]
    return f"今天星期{days[0]}，{later}天后是星期几？", f"{'、'.join(days)}。", f"星期{days[-1]}。"


def _convert_chinese(big: str, small: str, factor: int, n: int) -> tuple[str, str, str]:
    return f"{n}{big}是多少{small}？", f"{n}×{factor}={n * factor}。", f"{n * factor}{small}。"


_PEOPLE = ["Tom", "Anna", "Ben", "Mia"]
_THINGS = ["apples", "books", "coins", "pens"]


def _pairs(first: range, second: range) -> list[tuple[int, int]]:
    """Pairs (a, b) with b below a."""
    return [(a, b) for a in first for b in second if b < a]


def _with_names(pairs: list[tuple[int, int]], *, people: bool) -> list[tuple[Any, ...]]:
    """The pairs, each with a thing and, where asked, a person, in turn."""
    cases: list[tuple[Any, ...]] = []
    for index, pair in enumerate(pairs):
        thing = _THINGS[index // len(_PEOPLE) % len(_THINGS)]
        cases.append((_PEOPLE[index % len(_PEOPLE)], thing, *pair) if people else (thing, *pair))
    return cases


_UNITS = [
    ("hours", "hour", "minutes", 60),
    ("minutes", "minute", "seconds", 60),
    ("weeks", "week", "days", 7),
    ("days", "day", "hours", 24),
    ("meters", "meter", "centimeters", 100),
    ("kilograms", "kilogram", "grams", 1000),
]
_UNITS_CHINESE = [
    ("小时", "分钟", 60),
    ("分钟", "秒", 60),
    ("米", "厘米", 100),
    ("千克", "克", 1000),
    ("天", "小时", 24),
]
_TWO_DIGITS = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]

_KINDS = [
    _Kind(10, 2, _with_names(_pairs(range(3, 16), range(2, 10)), people=True), _add),
    _Kind(10, 2, _with_names(_pairs(range(6, 18), range(2, 5)), people=True), _subtract),
    _Kind(9, 2, _with_names(_pairs(range(3, 11), range(2, 7)), people=False), _multiply),
    _Kind(8, 1, _TWO_DIGITS, _larger),
    _Kind(8, 1, [(today, later) for today in range(7) for later in (2, 3)], _day),
    _Kind(8, 1, [(*unit, n) for unit in _UNITS for n in (2, 3, 4, 5)], _convert),
    _Kind(
        5,
        1,
        [
            (who, things, a, b)
            for who in ("小明", "小红")
            for things in ("个苹果", "本书")
            for a, b in _pairs(range(3, 8), range(2, 5))
        ],
        _add_chinese,
    ),
    _Kind(5, 1, _pairs(range(5, 12), range(2, 5)), _subtract_chinese),
    _Kind(5, 1, _TWO_DIGITS, _larger_chinese),
    _Kind(5, 1, [(today, later) for today in range(7) for later in (2, 3)], _day_chinese),
    _Kind(5, 1, [(*unit, n) for unit in _UNITS_CHINESE for n in (2, 3, 4)], _convert_chinese),
]
