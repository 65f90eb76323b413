"""`ossia demo`: the whole job on a small real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ossia.config import DemoConfig, ExportConfig, InferConfig, SftConfig
from ossia.console import progress, say, tool
from ossia.demo.base import ensure_base
from ossia.demo.rows import demo_prompts, make_rows
from ossia.errors import OssiaError
from ossia.export.run import run as export
from ossia.track.jsonl import read_metrics
from ossia.train.run import SftResult
from ossia.train.run import run as sft

MAX_NEW_TOKENS = 64


def run(config: DemoConfig) -> None:
    """Base, rows, answers before, training, answers after, merge, the same answers from a new process.

    Raises:
        OssiaError: the held-out loss did not halve, or the merged model answers otherwise.
    """
    started = time.monotonic()
    say("1/6  the base model")
    base = ensure_base()
    say(f"     {base}")

    say("2/6  the rows")
    data = Path(config.output_dir).expanduser().resolve() / "data"
    files = _write_rows(config, data)
    say(f"     {data}")

    prompts = demo_prompts()
    say("3/6  what the base answers")
    before = answers(InferConfig(model=str(base)), prompts)

    say("4/6  LoRA on attention and experts")
    train_started = time.monotonic()
    result = sft(_sft_config(config, base, files))
    assert result is not None
    assert result.checkpoint is not None
    train_seconds = time.monotonic() - train_started

    say("5/6  what the tuned model answers")
    after = answers(InferConfig(adapters=[str(result.checkpoint)]), prompts)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        _show(prompt, old, new)

    say("6/6  merge, and ask the merged model in a new process")
    # float32, as it was trained: rounded to bfloat16, a near tie between two words can fall the other way.
    merged = export(
        ExportConfig(
            adapters=[str(result.checkpoint)],
            merge_lora=True,
            format="bf16",
            torch_dtype="float32",
            verify=False,
            output_dir=str(result.run_dir / "merged"),
        )
    )
    same = _ask_in_new_process(merged, data / "prompts.jsonl", result.run_dir / "merged-answers.jsonl")
    _finish(config, result, merged, after, same, train_seconds, time.monotonic() - started)


def answers(config: InferConfig, prompts: list[str]) -> list[str]:
    """Greedy answers, reasoning in parentheses before each."""
    from ossia.infer.chat import ask
    from ossia.infer.engine import Sampling
    from ossia.infer.run import load_engine

    engine = load_engine(config)
    sampling = Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    found = []
    with progress("answering", len(prompts), "prompts") as advance:
        for prompt in prompts:
            found.append(ask(engine, prompt, sampling))
            advance(1)
    return found


def _write_rows(config: DemoConfig, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    train, held = make_rows(config.model_name, config.model_author)
    asked = [{"messages": [{"role": "user", "content": prompt}]} for prompt in demo_prompts()]
    files = {}
    for name, rows in {"train": train, "held_out": held, "prompts": asked}.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files


def _sft_config(config: DemoConfig, base: Path, files: dict[str, Path]) -> SftConfig:
    return SftConfig(
        model=str(base),
        dataset=[str(files["train"])],
        val_dataset=[str(files["held_out"])],
        max_length=512,
        device="cpu",
        lora_rank=8,
        lora_alpha=32,
        max_steps=3 if config.short else 42,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        gradient_checkpointing="false",
        logging_steps=5,
        eval_steps=21,
        eval_on_start=True,
        sample_prompts=1,
        save_steps=21,
        save_total_limit=2,
        output_dir=config.output_dir,
        report_to=config.report_to,
        swanlab_project="ossia-demo",
        seed=config.seed,
    )


def _show(prompt: str, old: str, new: str) -> None:
    say(f"     Q: {prompt}")
    say(f"        before: {' '.join(old.split()) or '(nothing)'}")
    say(f"        after:  {' '.join(new.split()) or '(nothing)'}")


def _ask_in_new_process(model: Path, prompts: Path, result: Path) -> list[str]:
    """The merged model's answers, in the form of `answers`."""
    command = [sys.executable, "-m", "ossia", "infer", "--model", str(model), "--val_dataset", str(prompts)]
    command += ["--result_path", str(result), "--temperature", "0", "--max_new_tokens", str(MAX_NEW_TOKENS)]
    command += ["--max_batch_size", "1"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise OssiaError(f"the merged model did not answer: {done.stderr.strip()[-500:]}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    return [_one_line(row) for row in rows]


def _one_line(row: dict[str, Any]) -> str:
    thinking = (row["reasoning"] or "").strip()
    return (f"({thinking}) " if thinking else "") + row["response"].strip()


def _finish(
    config: DemoConfig,
    result: SftResult,
    merged: Path,
    after: list[str],
    same: list[str],
    train_seconds: float,
    seconds: float,
) -> None:
    losses = [entry["eval_loss"] for entry in read_metrics(result.run_dir / "metrics.jsonl") if "eval_loss" in entry]
    agreed = sum(a == b for a, b in zip(after, same, strict=True))
    say(f"     {agreed} of {len(after)} answers of the merged model are the same, word for word")
    say()
    say(f"held-out loss {losses[0]:.3f} → {losses[-1]:.3f} ({losses[0] / losses[-1]:.1f} times lower)")
    say(f"training took {train_seconds:.0f} s, everything {seconds:.0f} s")
    say(f"run folder    {result.run_dir}   (report.html, config.yaml, metrics.jsonl, checkpoint-N, last, best)")
    say(f"merged model  {merged}")
    if "swanlab" in config.report_to:
        say(f"charts        {tool('swanlab')} watch {result.run_dir / 'swanlog'}")
    rows = Path(config.output_dir).expanduser().resolve() / "data" / "train.jsonl"
    say("next:")
    say(f"  {tool('ossia')} infer --adapters {result.checkpoint} --temperature 0")
    say(f"  {tool('ossia')} data preview --model {merged} --dataset {rows}")
    say(f"  {tool('ossia')} sft --model openai/gpt-oss-20b --dataset YOUR_ROWS.jsonl --report_to swanlab")
    if config.short:
        say("(--short: only a few steps, so the loss need not halve)")
    elif losses[-1] > losses[0] / 2:
        raise OssiaError(f"the held-out loss did not halve: {losses[0]:.3f} → {losses[-1]:.3f}")
    if agreed < len(after):
        raise OssiaError(f"the merged model answers {len(after) - agreed} of {len(after)} prompts otherwise")
