"""The README.md of an exported model or a pushed adapter: what it is made from, how it was trained, how its files were
held against the original. Of the run it tells what anyone may see: names without their folders, no keys, no paths."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ossia.adapters.combine import PARTS
from ossia.adapters.files import CONFIG as ADAPTER_CONFIG
from ossia.config import SftConfig
from ossia.model.folder import HUB_ID, read_json
from ossia.track.jsonl import METRICS
from ossia.track.series import MetricsReader, points
from ossia.train.folder import options_of, run_of

CARD, CURVE = "README.md", "loss.svg"

_MARKS = re.compile(r"(<!-- verification -->\n).*?(<!-- /verification -->)", re.DOTALL)
_WIDTH, _HEIGHT, _LEFT, _BELOW = 640, 240, 48, 24
# Where files lay, who watched and what the machine was: no part of what the weights became.
_PRIVATE = """
    model adapters dataset val_dataset output_dir add_version report_to run_name run_tags sample_prompts
    log_expert_load swanlab_project swanlab_exp_name swanlab_mode swanlab_workspace resume_from_checkpoint
    load_from_cache_file dataset_num_proc dataloader_num_workers device dry_run logging_steps save_strategy
    save_steps save_total_limit eval_steps eval_strategy eval_on_start per_device_eval_batch_size memory_budget
"""
_ALWAYS = ("learning_rate", "lora_rank", "lora_alpha", "per_device_train_batch_size", "max_length", "seed")


def write_card(
    folder: Path, base: str, adapter: Path, experts: str | None, repo: str | None = None, gguf: str | None = None
) -> None:
    """Write `README.md`, and `loss.svg` where the run's figures are at hand.

    Args:
        folder: the exported model, or what of an adapter is pushed.
        base: folder or hub id of the base model.
        adapter: a checkpoint; its run is told of where its folder is still around it.
        experts: how the experts are stored, for people; None: the adapter is not merged.
        repo: where it is pushed to, as org/name.
        gguf: name of the file, where the model is one of this format.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    parent = run_of(adapter)
    losses: dict[str, list[tuple[int, float]]] = {}
    options: dict[str, Any] = {}
    if parent is not None:
        options = _public(options_of(parent))
        losses = _losses(parent / METRICS)
    if len(losses.get("loss", ())) > 1:
        (folder / CURVE).write_text(_curve(losses), encoding="utf-8")
    shape = read_json(adapter / ADAPTER_CONFIG)
    on_hub = bool(HUB_ID.fullmatch(base)) and not Path(base).exists()
    base = base if on_hub else Path(base).name
    environment = Environment(
        loader=PackageLoader("ossia.export", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("card.md.jinja").render(
        name=repo or folder.name,
        title=repo.rpartition("/")[2] if repo else folder.name,
        base=base,
        on_hub=on_hub,
        experts=experts,
        on_experts=bool(shape.get("target_parameters")),
        gguf=gguf,
        parts=json.loads((adapter / PARTS).read_text(encoding="utf-8")) if (adapter / PARTS).is_file() else [],
        rank=shape.get("r"),
        alpha=shape.get("lora_alpha"),
        options={name: " ".join(_words(value)) for name, value in options.items()},
        command=_command(base, options),
        curve=CURVE if (folder / CURVE).is_file() else None,
        last={name: values[-1] for name, values in losses.items()},
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def put_verification(folder: Path, lines: list[str]) -> None:
    """Put a verification's lines into the card, where there is one with a place for them."""
    card = folder / CARD
    if card.is_file():
        told = "".join(f"- {_escaped(line)}\n" for line in lines)
        text = card.read_text(encoding="utf-8")
        card.write_text(_MARKS.sub(lambda marks: marks[1] + told + marks[2], text), encoding="utf-8")


def _public(config: SftConfig) -> dict[str, Any]:
    """What a reader may know: names of datasets without their folders."""
    values = config.to_dict()
    told = {"dataset": [_name(word) for word in config.dataset]}
    if config.adapters:
        told["adapters"] = [_name(word) for word in config.adapters]
    if config.val_dataset:
        told["val_dataset"] = [_name(word) for word in config.val_dataset]
    default, hidden = SftConfig().to_dict(), set(_PRIVATE.split())
    names = (name for name in values if name not in hidden)
    return told | {name: values[name] for name in names if values[name] != default[name] or name in _ALWAYS}


def _name(word: str) -> str:
    """A dataset as others would name it: a hub id stays, of a path its last part."""
    return word if "::" in word else word.replace("\\", "/").rpartition("/")[2]


def _command(base: str, options: dict[str, Any]) -> str | None:
    if not options:
        return None
    words = [f"ossia sft --model {shlex.quote(base)}"]
    for name, value in options.items():
        words.append(f"--{name} " + " ".join(map(shlex.quote, _words(value))))
    return " \\\n    ".join(words)


def _words(value: Any) -> list[str]:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]


def _losses(file: Path) -> dict[str, list[tuple[int, float]]]:
    """`loss` and `eval_loss` by step, thinned to what the picture can show."""
    reader = MetricsReader(file)
    reader.update()
    curves = {name: points(reader.series[name], _WIDTH) for name in ("loss", "eval_loss") if name in reader.series}
    return {
        name: known
        for name, curve in curves.items()
        if (known := [(int(x or 0), y) for x, y in zip(curve["x"], curve["y"], strict=True) if y is not None])
    }


def _curve(losses: dict[str, list[tuple[int, float]]]) -> str:
    """An SVG of loss by step, held-out loss dashed; axes from 0."""
    points = [point for values in losses.values() for point in values]
    last, top = max(max(step for step, _ in points), 1), max(loss for _, loss in points) or 1.0

    def place(step: int, loss: float) -> str:
        x = _LEFT + step / last * (_WIDTH - _LEFT - 8)
        y = _HEIGHT - _BELOW - loss / top * (_HEIGHT - _BELOW - 8)
        return f"{x:.1f},{y:.1f}"

    paths = "".join(
        f'<polyline points="{" ".join(place(*point) for point in values)}" fill="none" stroke="#2563eb" '
        f'stroke-width="2" stroke-dasharray="{"6 4" if name == "eval_loss" else "none"}"/>'
        for name, values in losses.items()
    )
    corner, end, up = place(0, 0), place(last, 0), place(0, top)
    text = 'font-family="sans-serif" font-size="12" fill="#555"'
    labels = (
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end" {text}>{top:.2f}</text>'
        f'<text x="{_LEFT - 6}" y="{_HEIGHT - _BELOW}" text-anchor="end" {text}>0</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end" {text}>step {last}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}" {text}>loss (dashed: held out)</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="loss by step"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
        f'<polyline points="{up} {corner} {end}" fill="none" stroke="#999"/>{paths}{labels}</svg>\n'
    )


def _escaped(line: str) -> str:
    """A line as Markdown shows it unchanged, whatever a model wrote into it."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(line.split()))
