"""Options: command line, file and Python call are one."""

from __future__ import annotations

import dataclasses

import pytest

from ossia.config import (
    BenchConfig,
    CheckConfig,
    DemoConfig,
    ExportConfig,
    InferConfig,
    PlanConfig,
    PreviewConfig,
    ServeConfig,
    SftConfig,
    StatsConfig,
)
from ossia.errors import UsageError


def parse(*argv: str) -> SftConfig:
    return SftConfig.from_args(argv, "ossia sft", "")


def test_flags_of_sft_are_pinned():
    """A new flag is a decision: change this list with it."""
    assert " ".join(f.name for f in dataclasses.fields(SftConfig)) == (
        "config debug model torch_dtype device experts attn_impl adapters adapter_weights template system reasoning_effort model_identity "
        "current_date loss_scale dataset columns on_bad_row model_name model_author max_length truncation multi_turn seed val_dataset "
        "split_dataset_ratio packing packing_length load_from_cache_file dataset_num_proc train_type lora_rank lora_alpha lora_dropout use_rslora target_modules target_experts "
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
        "lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2 "
        "adam_epsilon max_grad_norm label_smoothing_factor optim gradient_checkpointing memory_budget max_time deterministic deepspeed deepspeed_force fsdp dataloader_num_workers logging_steps "
        "per_device_eval_batch_size eval_strategy eval_steps early_stopping_patience eval_on_start sample_prompts log_expert_load save_strategy save_steps save_total_limit "
        "resume resume_from_checkpoint output_dir add_version report_to run_name run_tags swanlab_project swanlab_workspace swanlab_exp_name "
        "swanlab_mode use_liger_kernel bf16 fp16 dry_run"
    )


@pytest.mark.parametrize(
    "cls",
    [
        BenchConfig,
        SftConfig,
        InferConfig,
        ServeConfig,
        ExportConfig,
        DemoConfig,
        PlanConfig,
        PreviewConfig,
        CheckConfig,
        StatsConfig,
    ],
)
def test_every_field_has_help_and_a_group_that_is_shown(cls):
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], field.name
        assert field.metadata["group"] in cls.group_titles, field.name


def test_kinds_of_values():
    config = parse(
        "--model", "m", "--dataset", "a.json", "b.json", "--learning_rate", "2e-5", "--lora_rank", "16",
        "--use_rslora", "--gradient_checkpointing", "false", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}',
        "--save_total_limit=3",
    )  # fmt: skip
    assert (config.model, config.dataset, config.learning_rate, config.lora_rank) == (
        "m",
        ["a.json", "b.json"],
        2e-5,
        16,
    )
    assert (config.use_rslora, config.gradient_checkpointing) == (True, "false")
    assert (config.lr_scheduler_kwargs, config.save_total_limit) == ({"min_lr_rate": 0.1}, 3)


def test_resolved_options_read_back_exactly(tmp_path):
    config = parse("--model", "m", "--dataset", "数据.json", "--target_experts", "7,15", "--eval_strategy", "no")
    config.save(tmp_path / "config.yaml")
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert again.to_dict() == config.to_dict()


def test_precedence_is_defaults_file_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rank: 4\nseed: 7\n")
    config = parse("--config", str(tmp_path / "c.yaml"), "--seed", "9")
    assert (config.lora_rank, config.seed, config.lora_alpha) == (4, 9, 32.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rnk", "8"], "unknown flag --lora_rnk; did you mean '--lora_rank'"),
        (["--learning-rate", "1"], "did you mean '--learning_rate'"),
        (["--lora_rank", "eight"], "--lora_rank got 'eight'; it takes a whole number"),
        (["--lora_rank", "0"], "--lora_rank is 0; it must be at least 1"),
        (["--template", "harmny"], "did you mean 'harmony'"),
        (["--use_rslora", "maybe"], "it takes true or false"),
        (["--lr_scheduler_kwargs", "{"], "is not JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "takes a JSON object"),
        (["--target_experts", "some"], "it takes all, none or layer numbers"),
        (["--fp16", "true"], "overflows in fp16"),
        (["--config", "no-such.yaml"], "no such file"),
        (["--model"], "expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (["--deepspeed", "zero9"], "it takes zero2, zero3 or a .json file"),
        (["--fsdp", "full"], "it takes full_shard"),
        (["--fsdp", "full_shard", "--deepspeed", "zero2"], "both shard"),
        (["--max_time", "90"], "--max_time got '90'; it takes a time such as 2h"),
        (["--early_stopping_patience", "2"], "goes by held-out loss"),
        (["--resume", "auto", "--resume_from_checkpoint", "c"], "give one"),
        (["--split_dataset_ratio", "1.5"], "must be in [0, 1)"),
        (["--learning_rate", "0"], "must be above 0"),
    ],
)
def test_wrong_flags_say_what_is_wrong(argv, message):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", "unknown option 'lora_rnk'; did you mean 'lora_rank'"),
        ("- a", "expected 'option: value'"),
        ("a: [", "not a YAML file"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse("--config", str(tmp_path / "c.yaml"))
    assert message in str(caught.value)


def test_flags_that_mean_nothing_here_are_said_in_one_line_each():
    config = parse("--deepspeed", "zero3", "--use_liger_kernel", "true")
    assert len(config.notes()) == 2
    assert "one process" in config.notes()[1]
    assert len(config.notes(processes=2)) == 1
    assert parse().notes() == []
