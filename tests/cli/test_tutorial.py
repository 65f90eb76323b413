"""The commands of the tutorials, unchanged but for paths and the programme's name."""

from __future__ import annotations

import json
import shlex

import pytest

SFT = """sft --deepspeed zero3 --model {model} --dataset {data} --train_type lora --torch_dtype bfloat16
--num_train_epochs {epochs} --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4
--lora_rank 8 --lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50
--save_steps 50 --save_total_limit 2 --logging_steps 5 --max_length 8192 --output_dir output --warmup_ratio 0.05
--dataloader_num_workers 4 --use_liger_kernel true --load_from_cache_file false --loss_scale ignore_empty_think
--save_strategy epoch --model_author a --model_name b --report_to swanlab --swanlab_project p"""


def train(ossia, model, data, epochs=3, env=None):
    return ossia.ok(*shlex.split(SFT.format(model=model, data=data, epochs=epochs)), env=env)


@pytest.fixture
def run(ossia, tiny_gpt_oss, rows, tmp_path):
    """A finished run of the tutorial's command."""
    train(ossia, tiny_gpt_oss, rows)
    return next((tmp_path / "output").glob("v0-*"))


def test_sft_infer_export_and_batch(ossia, run, rows, tmp_path, tiny_gpt_oss):
    checkpoints = sorted(path.name for path in run.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"], "save_total_limit keeps two of three"
    assert (run / "last").resolve().name == "checkpoint-3"
    adapter = run / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer.pt"} <= {
        path.name for path in adapter.iterdir()
    }
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_gpt_oss)

    out = ossia.ok(
        "infer", "--adapters", adapter, "--stream", "true", "--temperature", 0, "--max_new_tokens", 8, stdin="hi\n"
    )
    assert "cut at --max_new_tokens 8" in out or len(out.splitlines()) > 1

    out = ossia.ok("export", "--adapters", adapter, "--merge_lora", "true")
    merged = run / "checkpoint-3-merged"
    assert "format: mxfp4, as the base is" in out
    assert "tokens of 12 rows" in out, "a small base is calibrated without being asked"
    assert "verified" in out.splitlines()
    assert {"config.json", "README.md", "verification.json"} <= {path.name for path in merged.iterdir()}

    result = tmp_path / "out.jsonl"
    ossia.ok("infer", "--model", merged, "--val_dataset", rows, "--max_new_tokens", 4, "--result_path", result)
    answers = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    assert [row["labels"] for row in answers] == [f"是 {n + 1}." for n in range(12)]
    assert {"response", "labels", "logprobs", "messages", "reasoning", "finish_reason", "prompt_tokens",
            "completion_tokens", "tools", "reasoning_effort"} == set(answers[0])  # fmt: skip
    assert answers[0]["messages"][0] == {"role": "user", "content": "0+1?"}


def test_flags_without_meaning_here_are_said_and_the_run_goes_on(ossia, tiny_gpt_oss, rows):
    out = train(ossia, tiny_gpt_oss, rows, epochs=1)
    assert "--use_liger_kernel: not needed" in out
    assert "--deepspeed zero3: one process has nothing to shard" in out
    assert "no row has {{NAME}}" in out


def test_metrics_and_options_of_the_run(run, ossia, tmp_path):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(value, int | float) for row in metrics for value in row.values())
    assert metrics[-1]["progress"] == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ">finished<" in page
    assert "12 samples" in page
    (run / "again.yaml").write_bytes((run / "config.yaml").read_bytes())
    out = ossia.ok("sft", "--config", run / "again.yaml", "--dry_run", "true")
    assert "lora_rank: 8" in out
    assert not list((tmp_path / "output").glob("v1-*")), "a dry run makes no folder"


def test_adapter_works_from_any_folder(run, tmp_path, monkeypatch):
    from tests.conftest import Ossia

    (tmp_path / "elsewhere").mkdir()
    out = Ossia(tmp_path / "elsewhere").ok("infer", "--adapters", run / "last", "--max_new_tokens", 2, stdin="hi\n")
    assert "checkpoint-3" in out


def test_two_processes_are_started_and_train_as_one(ossia, tiny_gpt_oss, rows, tmp_path):
    common = (
        "--model",
        tiny_gpt_oss,
        "--dataset",
        rows,
        "--max_steps",
        3,
        "--logging_steps",
        1,
        "--learning_rate",
        1e-2,
    )
    common += ("--device", "cpu", "--save_strategy", "no")
    env = {"NPROC_PER_NODE": "2", "MASTER_PORT": "29561"}
    out = ossia.ok("sft", *common, "--per_device_train_batch_size", 2, "--output_dir", "two", env=env)
    assert "starting 2 processes" in out
    assert out.count("run: ") == 1
    ossia.ok("sft", *common, "--per_device_train_batch_size", 4, "--output_dir", "one")

    def losses(name):
        file = next((tmp_path / name).glob("v0-*/metrics.jsonl"))
        return [row["loss"] for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)


def test_packed_rows_train_as_padded_ones_do(ossia, tiny_gpt_oss, rows, tmp_path):
    """All rows in one step, packed or not: one loss, one gradient norm."""
    found = []
    for packing, batch in (("false", 12), ("true", 1)):
        out = ossia.ok(
            *(
                "sft",
                "--model",
                tiny_gpt_oss,
                "--dataset",
                rows,
                "--output_dir",
                tmp_path / packing,
                "--add_version",
                "false",
            ),
            *(
                "--max_steps",
                1,
                "--logging_steps",
                1,
                "--per_device_train_batch_size",
                batch,
                "--torch_dtype",
                "float32",
            ),
            *("--packing", packing, *(["--packing_length", 8192] if packing == "true" else [])),
        )
        assert ("packing: 12 samples in 1 sequence of 8,192" in out) == (packing == "true")
        lines = (tmp_path / packing / "metrics.jsonl").read_text().splitlines()
        found.append(next(line for line in map(json.loads, lines) if "loss" in line))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)


def test_accumulated_batches_equal_one_batch(ossia, tiny_gpt_oss, rows, tmp_path):
    def losses(name, batch, accumulation):
        ossia.ok(
            "sft", "--model", tiny_gpt_oss, "--dataset", rows, "--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no",
            "--learning_rate", 1e-2, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
            "--output_dir", name,
        )  # fmt: skip
        file = next((tmp_path / name).glob("v0-*/metrics.jsonl"))
        return [row["loss"] for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]

    assert losses("a", 4, 1) == pytest.approx(losses("b", 1, 4), rel=1e-4)


def test_resumed_run_ends_as_an_uninterrupted_one(ossia, tiny_gpt_oss, rows, tmp_path):
    common = ("--model", tiny_gpt_oss, "--dataset", rows, "--num_train_epochs", 2, "--per_device_train_batch_size", 4)
    common += ("--learning_rate", 1e-2, "--save_steps", 2, "--logging_steps", 1, "--lora_dropout", 0.1)
    ossia.ok("sft", *common, "--output_dir", "a")
    first = next((tmp_path / "a").glob("v0-*"))
    ossia.ok("sft", *common, "--output_dir", "b", "--resume_from_checkpoint", first / "checkpoint-4")
    second = next((tmp_path / "b").glob("v0-*"))
    from safetensors.torch import load_file

    a, b = (load_file(path / "checkpoint-6" / "adapter_model.safetensors") for path in (first, second))
    assert all((a[name] == b[name]).all() for name in a)


def test_any_other_model_trains_merges_and_answers(ossia, tiny_llama, rows, tmp_path):
    ossia.ok("sft", "--model", tiny_llama, "--dataset", rows, "--max_steps", 2, "--output_dir", "o")
    run = next((tmp_path / "o").glob("v0-*"))
    out = ossia.ok("export", "--adapters", run / "last", "--merge_lora", "true", "--output_dir", "m")
    assert "format: bf16, as the base is" in out.splitlines()
    ossia.ok("infer", "--model", "m", "--max_new_tokens", 3, "--temperature", 0, stdin="hi\n")


def test_preview_as_text_and_json(ossia, tiny_gpt_oss, rows):
    text = ossia.ok("data", "preview", "--model", tiny_gpt_oss, "--dataset", rows, "--rows", 2)
    assert "assistant, reasoning: 0+1=1" in text
    assert "<|start|>assistant<|channel|>analysis<|message|>0+1=1<|end|>" in text
    lines = ossia.ok("data", "preview", "--model", tiny_gpt_oss, "--dataset", rows, "--format", "json").splitlines()
    for row in map(json.loads, lines):
        assert len(row["text"]) == len(row["input_ids"]) == len(row["loss_weights"]) == len(row["labels"])
        assert "".join(row["text"]).endswith("<|return|>")
        trained = "".join(piece for piece, weight in zip(row["text"], row["loss_weights"], strict=True) if weight)
        assert trained.startswith("<|channel|>analysis<|message|>")
    assert len(lines) == 3
