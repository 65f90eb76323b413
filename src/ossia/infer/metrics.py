"""How near answers are to those that rows have: exact match, BLEU, chrF and ROUGE by known libraries, equal calls."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

from ossia.console import counted
from ossia.template.messages import ToolCall

_CHINESE = r"[\u3400-\u9fff\uf900-\ufaff]"
_NEEDED = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
_ROUGE = ("rouge1", "rouge2", "rougeL")


class Words:
    """ROUGE's tokenizer: words of letters and digits in any script, Chinese by the character."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-cased tokens."""
        return re.findall(rf"{_CHINESE}|(?:(?!{_CHINESE})\w)+", text.lower())


def measure(answers: list[str], labels: list[str]) -> dict[str, float]:
    """Shares in percent: `exact_match` (without outer space), and where the libraries are there `bleu`, `chrf`,
    `rouge1`, `rouge2` and `rougeL`, the last three F-measures averaged over rows."""
    found = {"exact_match": _mean([100.0 * (a.strip() == b.strip()) for a, b in zip(answers, labels, strict=True)])}
    if missing():
        return found
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found["bleu"] = sacrebleu.corpus_bleu(answers, [labels], tokenize=bleu_tokenizer(labels)).score
    found["chrf"] = sacrebleu.corpus_chrf(answers, [labels]).score
    scorer: Any = RougeScorer(list(_ROUGE), tokenizer=Words())
    scores = [scorer.score(label, answer) for answer, label in zip(answers, labels, strict=True)]
    return found | {name: _mean([100.0 * score[name].fmeasure for score in scores]) for name in _ROUGE}


def metrics_line(answers: list[str], labels: list[str]) -> str:
    """The same for people, and what to install for the rest."""
    found = measure(answers, labels)
    line = f"{counted(len(answers), 'row')} with answers of their own: exact match {found['exact_match']:.1f} %"
    if "bleu" not in found:
        return f"{line}; BLEU, chrF and ROUGE need: pip install {' '.join(missing())}"
    rouge = " / ".join(f"{found[name]:.1f}" for name in _ROUGE)
    bleu = f"BLEU {found['bleu']:.1f} (tokenizer {bleu_tokenizer(labels)})"
    return f"{line}, {bleu}, chrF {found['chrf']:.1f}, ROUGE-1 / 2 / L {rouge}"


def calls_lines(pairs: Sequence[tuple[Sequence[ToolCall], Sequence[ToolCall]]]) -> list[str]:
    """How many answers were calls where rows have calls, how many agree, and how many were calls where rows have text.

    A reply ends at its first call, so it is held against the first one of a row.

    Args:
        pairs: the calls of an answer and those of the row's own answer, for each row that has one.
    """
    wanted = [(calls, labels) for calls, labels in pairs if labels]
    lines = []
    if wanted:
        called = [(calls[0], labels[0]) for calls, labels in wanted if calls]
        agreed = sum(same_call(call, label) for call, label in called)
        lines.append(
            f"{counted(len(wanted), 'row')} whose answer is a call: {len(called):,} answered with a call, "
            f"{agreed:,} with the same (name and arguments)"
        )
    if astray := sum(bool(calls) and not labels for calls, labels in pairs):
        lines.append(f"{counted(astray, 'row')} whose answer is a text answered with a call")
    return lines


def same_call(one: ToolCall, other: ToolCall) -> bool:
    """Whether name and arguments are the same, arguments as JSON where both are."""
    if one.name.removeprefix("functions.") != other.name.removeprefix("functions."):
        return False
    try:
        return _same(json.loads(one.arguments), json.loads(other.arguments))
    except (ValueError, RecursionError):
        return one.arguments.strip() == other.arguments.strip()


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, and 1 is 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def missing() -> list[str]:
    """Packages that the metrics need and that are not installed."""
    return [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]


def bleu_tokenizer(labels: list[str]) -> str:
    """sacrebleu's for Chinese where a tenth of what is written is Chinese, which also takes words of other scripts."""
    text = "".join(labels)
    chinese = len(re.findall(_CHINESE, text))
    return "zh" if chinese > 0.1 * len(re.sub(r"\s", "", text)) else "13a"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
