"""`ossia data check`, `stats` and `preview --html` as a user runs them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

GOOD = '{"instruction": "q", "output": "a"}\n'
SCRIPT = '{"instruction": "<script>alert(1)</script>", "output": "\\"><img src=x onerror=alert(2)> {{7*7}}"}\n'
SHARED = Path(os.environ.get("OSSIA_SHARED") or Path(__file__).resolve().parents[2].parent / "shared")


@pytest.fixture
def data(tmp_path, tiny_gpt_oss):
    """`data(command, lines, …)`: arguments of a data command over a file of these lines."""

    def arguments(command: str, lines: str, *more: object) -> list[object]:
        (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
        return ["data", command, "--model", tiny_gpt_oss, "--dataset", "a.jsonl", *more]

    return arguments


def test_check_of_good_rows(ossia, data):
    out = ossia.ok(*data("check", GOOD))
    assert "a.jsonl: 1 row, 1 can be trained on" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_check_reads_on_and_fails_with_bad_rows(ossia, data):
    done = ossia(*data("check", GOOD + "nonsense\n" + '{"instruction": [1]}\n' + GOOD))
    assert done.returncode == 1
    assert "a.jsonl:2: broken JSON" in done.stdout
    assert "a.jsonl:3: instruction is list" in done.stdout
    assert "same as an earlier row" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: 2 rows cannot be read")
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "stats"])
def test_json_is_one_object(ossia, data, command):
    values = json.loads(ossia.ok(*data(command, GOOD, "--format", "json")))
    assert (values["rows"], values["usable"]) == (1, 1)


def test_check_json_with_bad_rows(ossia, data):
    done = ossia(*data("check", GOOD + '{"instruction": [1]}\n', "--format", "json"))
    assert done.returncode == 1
    assert json.loads(done.stdout)["bad"]["first"] == [
        {"source": "a.jsonl:2", "key": "instruction", "reason": "instruction is list; a text is needed"}
    ]


def test_stats(ossia, data):
    out = ossia.ok(*data("stats", GOOD * 3 + "nonsense\n"))
    assert "carry loss" in out
    assert "packed to 4,096: 3 samples in 1 sequence," in out
    assert "\x1b" not in out
    nothing = ossia(*data("stats", "nonsense\n"))
    assert nothing.returncode == 1
    assert "no row to measure: 1 bad" in nothing.stderr


@pytest.mark.parametrize("command", ["check", "stats", "preview"])
def test_page_escapes_rows_and_needs_nothing_else(ossia, data, tmp_path, command):
    ossia.ok(*data(command, SCRIPT + GOOD, "--html", "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1, "the page's own"
    assert "<img" not in page
    assert not re.search(r"""(src|href)=["']|url\(|@import""", page)
    assert "&lt;" in page
    assert 'class="full" data-w="1"' in page
    assert ("<svg" in page) == (command != "preview")


def test_page_shows_the_rows_asked_for(ossia, data, tmp_path):
    ossia.ok(*data("stats", GOOD * 5, "--html", "page.html", "--rows", 2))
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('<details class="row"') == 2


def test_page_that_cannot_be_written_is_said_first(ossia, data, tmp_path):
    done = ossia(*data("check", GOOD, "--html", "no/page.html"))
    assert done.returncode == 2
    assert "--html no/page.html: no folder no" in done.stderr


@pytest.mark.skipif(
    not (SHARED / "tokenizer").is_dir(), reason=f"no {SHARED}/tokenizer (OSSIA_SHARED names its folder)"
)
def test_rows_found_in_public(ossia):
    folder = SHARED / "data"
    names = ("derived_gsm8k_test_as_multilingual_thinking.jsonl", "llamafactory_identity.json")
    files = [folder / name for name in names]
    common = ("--model", SHARED / "tokenizer", "--dataset", *files, "--format", "json")
    check = json.loads(ossia.ok("data", "check", *common))
    assert (check["rows"], check["usable"], check["bad"]["count"]) == (1410, 1410, 0)
    assert check["placeholders"]["count"] > 50
    assert set(check["placeholders"]["names"]) == {"name", "author"}
    stats = json.loads(ossia.ok("data", "stats", *common))
    assert stats["reasoning_languages"] == {"English": 1319}
    assert stats["channels"]["analysis"]["tokens"] > 100_000
    assert sum(part["rows"] for part in stats["histogram"]) == 1410
    assert stats["packing"]["fill"] > 0.9
    for name in ("llamafactory_alpaca_en_demo.json", "llamafactory_alpaca_zh_demo.json", "gsm8k_test.jsonl", names[0]):
        one = ("--model", SHARED / "tokenizer", "--dataset", folder / name, "--max_length", 4096, "--format", "json")
        assert json.loads(ossia.ok("data", "stats", *one))["packing"]["fill"] >= 0.97, name
