"""The model card of an export: what it tells, and that it tells nothing private."""

from __future__ import annotations

import json
import shlex
from xml.etree import ElementTree

import pytest

from ossia.config import SftConfig
from ossia.export.card import CARD, CURVE, put_verification, write_card


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder with options, figures and one checkpoint."""
    run = tmp_path / "secret" / "run"
    folder = run / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 5, "lora_alpha": 10, "peft_type": "LORA"}))
    config = SftConfig(
        model=str(tmp_path / "secret" / "base"),
        dataset=[str(tmp_path / "secret" / "行.jsonl#10"), "hf::org/name:train"],
        val_dataset=[str(tmp_path / "secret" / "held.jsonl")],
        lora_rank=5,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        system="it's a test",
        report_to=["swanlab"],
        swanlab_project="private-project",
        output_dir=str(tmp_path / "secret"),
    )
    config.save(run / "config.yaml")
    rows = [{"step": n, "loss": 2.0 / n, "learning_rate": 1e-4} for n in (1, 2, 3)]
    rows += [{"step": 3, "eval_loss": 0.9}, {"step": 4, "loss": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    return folder


def test_it_tells_what_was_trained_and_nothing_private(checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_card(folder, str(tmp_path / "secret" / "base"), checkpoint, "MXFP4")
    card = (folder / CARD).read_text(encoding="utf-8")
    assert "rank 5, alpha 10" in card
    assert "last loss: 0.6667 at step 3" in card
    assert "last held-out loss: 0.9000 at step 3" in card
    assert str(tmp_path) not in card
    assert "private-project" not in card
    assert "base_model:" not in card
    command = card.partition("```sh\n")[2].partition("```")[0].replace("\\\n", "")
    words = shlex.split(command)
    assert words[:4] == ["ossia", "sft", "--model", "base"]
    read = SftConfig.from_args(words[2:], "ossia sft", "")
    assert read.dataset == ["行.jsonl#10", "hf::org/name:train"]
    assert read.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (read.lora_rank, read.system) == (5, "it's a test")
    curve = ElementTree.fromstring((folder / CURVE).read_text(encoding="utf-8"))
    lines = [node for node in curve.iter() if node.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3, 1]


def test_a_hub_base_is_named_and_an_adapter_without_a_run_is_fine(checkpoint, tmp_path):
    (checkpoint.parent / "config.yaml").unlink()
    write_card(tmp_path, "openai/gpt-oss-20b", checkpoint, "bfloat16")
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "base_model: openai/gpt-oss-20b\n" in card
    assert "not kept beside the adapter" in card
    assert not (tmp_path / CURVE).exists()


def test_a_verification_takes_its_place_and_what_a_model_said_is_only_text(checkpoint, tmp_path):
    put_verification(tmp_path, ["no card, nothing happens"])
    write_card(tmp_path, "base", checkpoint, "MXFP4")
    assert "was not run" in (tmp_path / CARD).read_text(encoding="utf-8")
    for lines in (["first"], ["exported: <script> **bold**\n# title \\1", "verified"]):
        put_verification(tmp_path, lines)
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert "first" not in card
    assert r"- exported: \<script\> \*\*bold\*\* \# title \\1" + "\n- verified\n" in card
