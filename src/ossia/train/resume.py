"""Where a run goes on: which folder, which checkpoint; everything newer is taken back."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ossia.config import SftConfig
from ossia.console import is_main_process, say, tool
from ossia.data.store import TokenRows
from ossia.errors import OssiaError, UsageError
from ossia.track import read_metrics
from ossia.track.files import write_aside
from ossia.track.jsonl import METRICS
from ossia.track.lock import held, holder
from ossia.track.report import SAMPLES
from ossia.train.checkpoint import checkpoints, damage, manifest, sound_checkpoint, step_of, tidy
from ossia.train.folder import CONFIG, numbered_runs, options_of, point

_FREE = {
    "resume",
    "resume_from_checkpoint",
    "max_time",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "add_version",
    "sample_prompts",
    "log_expert_load",
    "report_to",
    "run_name",
    "run_tags",
    "swanlab_project",
    "swanlab_workspace",
    "swanlab_exp_name",
    "swanlab_mode",
    "load_from_cache_file",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dry_run",
}
"""Options that leave the weights of every step alone: they may change when a run goes on."""


@dataclass(frozen=True)
class Start:
    """Where training begins. `run` None: in a new folder; `checkpoint` None: at step 0."""

    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return max(step_of(self.checkpoint), 0) if self.checkpoint else 0

    @property
    def evaluation_due(self) -> bool:
        """Whether the run was stopped during the evaluation of its last step."""
        return bool(self.checkpoint and manifest(self.checkpoint).get("evaluation_due"))


def find_start(config: SftConfig) -> Start:
    """What `--resume` and `--resume_from_checkpoint` mean; looks only, changes nothing.

    Raises:
        UsageError: no such checkpoint or run, a run of other options, or one that another process trains.
        OssiaError: the checkpoint asked for is damaged.
    """
    if not config.add_version:
        _refuse_running(Path(config.output_dir).expanduser().resolve())
    if config.resume_from_checkpoint:
        checkpoint = Path(config.resume_from_checkpoint).expanduser().resolve()
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(f"--resume_from_checkpoint {checkpoint}: no trainer_state.json there")
        if manifest(checkpoint):
            _refuse_damaged(checkpoint)
        return Start(None, checkpoint)
    if config.resume is None:
        return Start()
    if config.resume == "auto":
        run = _newest_run(config)
        if run is None:
            say(f"--resume auto: no run of these options in {config.output_dir}; starting one")
            return Start()
        _refuse_running(run)
        return _start_of(run)
    path = Path(config.resume).expanduser().resolve()
    run = path.parent if step_of(path) >= 0 else path
    if not (run / CONFIG).is_file():
        raise UsageError(f"--resume {config.resume}: neither a run folder nor a checkpoint-N folder in one")
    _refuse_running(run)
    different = differences(config, options_of(run))
    if different:
        raise UsageError(
            f"--resume {config.resume}: that run has {different[0]}; give its options (--config {run / CONFIG}), or go "
            "on with others in a new run by --resume_from_checkpoint"
        )
    if path == run:
        return _start_of(run)
    _refuse_damaged(path)
    newer = [checkpoint.name for checkpoint in checkpoints(run) if step_of(checkpoint) > step_of(path)]
    if newer:
        raise UsageError(
            f"--resume {config.resume}: the run is at {newer[-1]} already; give --resume {run}, or start a new run "
            f"from {path.name} by --resume_from_checkpoint"
        )
    return Start(run, path)


def differences(config: SftConfig, other: SftConfig) -> list[str]:
    """Each option that matters and differs, as `--name THERE (here HERE)`."""
    there = other.to_dict()
    return [
        f"--{name} {there[name]} (here {value})"
        for name, value in config.to_dict().items()
        if name not in _FREE and there[name] != value
    ]


def data_facts(rows: TokenRows, held: TokenRows | None) -> dict[str, Any]:
    """What a checkpoint notes of its data, to know them again: counts, and a hash of all lengths."""
    parts = [rows.lengths, held.lengths] if held is not None else [rows.lengths]
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return {"rows": [len(part) for part in parts], "lengths": digest}


def check_facts(checkpoint: Path, facts: dict[str, Any]) -> None:
    """UsageError where a checkpoint was trained on other rows, or by another number of processes."""
    then = manifest(checkpoint)
    if not then:
        return
    if then.get("processes") != facts["processes"]:
        raise UsageError(f"{checkpoint}: trained by {then.get('processes')} processes, here are {facts['processes']}")
    if any(then.get(name) != facts[name] for name in ("rows", "lengths")):
        raise UsageError(
            f"{checkpoint}: trained on other rows ({then.get('rows')} training and held-out, now {facts['rows']}); "
            "bring them back, or start a new run from its adapter by --adapters"
        )


def take_back(start: Start) -> None:
    """Bring a run's folder to the state it had at its checkpoint (main process only)."""
    if start.run is None:
        return
    tidy(start.run, start.step)
    if start.checkpoint is not None:
        point(start.run, "last", str(start.checkpoint))
    for name in (METRICS, SAMPLES):
        cut_lines(start.run / name, start.step)


def cut_lines(path: Path, step: int) -> None:
    """Leave out what was written after `step`, and the summary of a run's end with all that follows it."""
    if not path.is_file():
        return
    rows = takewhile(lambda row: "train_loss" not in row, read_metrics(path))
    kept = [row for row in rows if 0 < step >= row["step"]]
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def resume_command(run: Path) -> str:
    """The line that goes on with a run."""
    return f"{tool('ossia')} sft --config {shlex.quote(str(run / CONFIG))} --resume {shlex.quote(str(run))}"


def _start_of(run: Path) -> Start:
    checkpoint, damaged = sound_checkpoint(run)
    for line in damaged:
        say(line + (f"; {checkpoint.name} is used" if checkpoint else ""))
    if checkpoint is None and damaged:
        raise OssiaError(f"{run}: no sound checkpoint is left; start a new run without --resume")
    if checkpoint is None:
        say(f"{run} has no checkpoint yet; it starts again")
    return Start(run, checkpoint)


def _newest_run(config: SftConfig) -> Path | None:
    parent = Path(config.output_dir).expanduser().resolve()
    if not config.add_version:
        runs = [parent]
    elif parent.is_dir():
        runs = [path for _, path in sorted(numbered_runs(parent), reverse=True)]
    else:
        runs = []
    for run in runs:
        try:
            if (run / CONFIG).is_file() and not differences(config, options_of(run)):
                return run
        except UsageError as error:
            say(f"{run.name} is passed over: {error}")
    return None


def _refuse_running(run: Path) -> None:
    # The other processes of this very run may come later than its first.
    if is_main_process() and (process := holder(run)):
        raise held(run, process)


def _refuse_damaged(checkpoint: Path) -> None:
    why = damage(checkpoint)
    if why is None:
        return
    other, _ = sound_checkpoint(checkpoint.parent)
    raise OssiaError(f"{checkpoint} is damaged: {why}" + (f"; {other.name} beside it is sound" if other else ""))
