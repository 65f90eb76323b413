"""transformers' Trainer with weighted token losses, exact means, adapter checkpoints and rates."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType

from ossia.adapters.io import adapter_tensors, load_adapter_tensors, save_adapter, whole_tensor
from ossia.data.collate import Collator, on_device
from ossia.data.packing import PackedRows
from ossia.data.passes import Passes, weightless
from ossia.data.store import CHANNELS, TokenRow, TokenRows
from ossia.errors import UsageError
from ossia.model.gpt_oss import LossOutput, OssiaGptOssForCausalLM
from ossia.model.loss import loss_from_logits
from ossia.model.packed import inner_model, keeps_apart
from ossia.train.callbacks import EvaluationStopped, StopCallback
from ossia.train.checkpoint import PREFIX, part_of, put_in_place, rotate, seal
from ossia.train.guard import Guard, Step
from ossia.train.schedule import factor_of
from ossia.train.sharding import whole

# What only our model takes. Others see packed documents by their position_ids; given bounds too, some of transformers'
# attentions would read them for keys that have none.
_OURS = ("labels", "loss_weights", "channels", "cu_seq_lens_q", "max_length_q", "real", "kept", "tokens")
_TRAINED = "trained_tokens"
_SPAN = {"cuda": 1024, "cpu": 512}
"""Tokens laid end to end where memory is not planned and attention makes tables of all pairs. By 1,024 a GPU is busy; a
CPU gains nothing from more."""


class SftTrainer(Trainer):
    """The one training loop.

    The loader brings rows as the arguments group them (a device's batch, times the accumulation steps); all rows of a
    step on a process then go through the model in as few passes as `passes` makes of them, and so do held-out rows.
    The loss of an optimizer step is the weighted sum over all its tokens, on all processes, divided by the sum of their
    weights: the same however they are divided into passes. `token_accuracy` counts positions of weight above 0.

    A step whose loss or gradient is not sound raises UnsoundStep and does not reach the weights. A checkpoint is whole
    or not there; one that cannot be written (a full disk) is tried again later while training goes on. `facts` are
    noted in each.

    Args:
        data_collator: its padding is used.
        passes: default: end to end where the model keeps packed rows apart (`check_packing`), else padded; of as many
            tokens as a batch of the longest rows, or about a thousand.
        held_passes: of held-out rows; default: likewise.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        *,
        base_model: str,
        tokenizer: Any,
        origin: str | None = None,
        facts: dict[str, Any] | None = None,
        stop: StopCallback | None = None,
        data_collator: Collator,
        passes: Passes | None = None,
        held_passes: Passes | None = None,
        **kwargs: Any,
    ) -> None:
        # Rows reach the step as they are: only there it is known which go together.
        super().__init__(model=model, data_collator=list, **kwargs)  # type: ignore[arg-type]
        self.tokenizer = tokenizer
        self.base_model, self.origin = base_model, origin
        self.facts = {"processes": self.args.world_size, **(facts or {})}
        self.stop = stop or StopCallback()
        self.add_callback(self.stop)
        # The Trainer's own rotation ends a run of limit 1 by removing its newest checkpoint.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        # The Trainer would divide once more by the accumulation steps if it believed the loss a mean per batch.
        self.model_accepts_loss_kwargs = True
        self._window = _Window()
        self._eval = _Sums()
        base: Any = inner_model(model)
        device = self.args.device
        self._guard = Guard(device, self.args.world_size, base.config.vocab_size, late=device.type == "cuda")
        self._rows: list[TokenRow] = []
        apart = passes.end_to_end if passes else keeps_apart(model)
        common = (model, data_collator.pad_id, apart)
        self._passes = passes or default_passes(*common, self.train_dataset, self.args.per_device_train_batch_size)
        self._held_passes = held_passes or default_passes(
            *common, self.eval_dataset, self.args.per_device_eval_batch_size
        )
        self._step_loss = torch.zeros((), device=device)
        self._evaluation_due = False
        self._rate: float | None = None
        self._optimizer_options: list[dict[str, Any]] = []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; Python's garbage collector leaves alone what lies there before, which it would walk through for
        a tenth of a second now and then while the GPU waits."""
        gc.collect()
        gc.freeze()
        try:
            done = super().train(*args, **kwargs)
            self._read_verdicts(wait=True)
            return done
        finally:
            gc.unfreeze()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """As Trainer's, which counts batches: all passes of the step stand in the place of its last one.

        Keeps the rows, for the step that goes wrong, and the learning rate: with DeepSpeed, Trainer asks for it when
        the schedule has gone on to the next step.
        """
        batches, weight = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._rate = super()._get_learning_rate()
        self._step_loss = torch.zeros((), device=device)
        if not batches:
            return batches, weight
        made = self._passes.batches(self._rows, self._least_passes())
        return [*[[] for _ in batches[1:]], [on_device(batch, device) for batch in made]], weight

    def _get_learning_rate(self) -> float:
        """Learning rate of the current step, or between steps of the last one."""
        return super()._get_learning_rate() if self._rate is None else self._rate

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, with a warm-up whose first step moves (`ossia.train.schedule`)."""
        args = self.args
        if self.lr_scheduler is None:
            name, warmup = SchedulerType(args.lr_scheduler_type).value, args.get_warmup_steps(num_training_steps)
            options: Any = args.lr_scheduler_kwargs
            factor = factor_of(name, args.learning_rate, warmup, num_training_steps, options)
            if factor is None:
                super().create_scheduler(num_training_steps, optimizer)
            else:
                self.lr_scheduler = LambdaLR(optimizer or self._made_optimizer(), factor)
                self._created_lr_scheduler = True
        self._optimizer_options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self._made_optimizer().param_groups
        ]
        return self.lr_scheduler

    def _made_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; then rates and the optimizer's options are those of this run.

        A checkpoint has those of the run that wrote it: at its end a rate near 0, with which the first step of a run
        that goes on from it, for more epochs, would be lost; and whatever --learning_rate and --weight_decay it had.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = self._made_optimizer().param_groups
        for group, options in zip(groups, self._optimizer_options, strict=True):
            group.update(options)
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = peak * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        self._rows = _rows_in(batch_samples)
        weight = float(sum(row.loss_weights[1:].sum(dtype=np.float64) for row in self._rows))
        if self.args.world_size == 1:
            return weight
        total = on_device({"weight": torch.tensor([weight], dtype=torch.float64)}, device)["weight"]
        return self.accelerator.gather(total).sum().float()

    def _least_passes(self) -> int:
        """Passes of the process that has most, where parameters are sharded: each pass then takes all processes."""
        if self.args.world_size == 1 or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return 1
        own = len(self._passes.groups([len(row) for row in self._rows]))
        return int(self.accelerator.gather(torch.tensor([own], device=self.args.device)).max())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum divided by the step's weight, times the processes that will average it."""
        sums = sums_of(model, inputs, self.args.label_smoothing_factor if model.training else 0.0)
        assert sums.loss is not None
        weight = inputs["loss_weights"][:, 1:]
        total = weight.sum() if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / total * self.args.world_size
        if model.training:
            self._window.add(sums, weight, inputs["channels"], inputs["tokens"])
        return (loss, sums) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: nothing reads it, and transformers' own walks through every parameter at every step."""
        return 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All passes of the step, of which the last one exchanges gradients; the first of a window starts its clock."""
        self._window.start()
        loss = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            with self._collecting(model) if number < len(inputs) else contextlib.nullcontext():
                loss += super().training_step(model, batch, num_items_in_batch)
        self._step_loss += loss
        return loss

    @contextlib.contextmanager
    def _collecting(self, model: nn.Module) -> Iterator[None]:
        """Within, gradients add up in this process; DeepSpeed, which has its own ways, only does not take its step."""
        state = self.accelerator.gradient_state
        ends = state.sync_gradients
        state._set_sync_gradients(False)
        apart = contextlib.nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model=model)
        try:
            with apart:
                yield
        finally:
            state._set_sync_gradients(ends)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's, which asks for it right before the update; looks at the step."""
        norm = super()._get_grad_norm(model, grad_norm)
        tensor = whole_tensor(torch.as_tensor(norm, device=self.args.device))
        self._guard.watch(self.state.global_step + 1, self._rows, self._step_loss, tensor, self.stop.wishes())
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        skips = self._guard.late and all(group.get("fused") for group in optimizer.param_groups)
        if skips:
            optimizer.found_inf = self._guard.unsound
        self._read_verdicts(wait=not skips)
        return norm

    def _read_verdicts(self, wait: bool) -> None:
        for step in self._guard.known(wait):
            if not step.sound:
                raise UnsoundStep(step)
            self.stop.hear(step.wishes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Rows of each pass; every process has its own, none of them twice."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(self._own_passes(rows), batch_size=1, collate_fn=_only)

    def _own_passes(self, rows: Any) -> _HeldPasses:
        groups, args = self._held_passes.groups(_lengths(rows)), self.args
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # Where parameters are sharded a pass takes all processes.
            groups += [[] for _ in range(-len(groups) % args.world_size)]
        return _HeldPasses(rows, groups[args.process_index :: args.world_size])

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds a pass to the sums of the set; gives nothing of its own, so that processes need not wait for another."""
        batch = self._prepare_inputs(on_device(self._held_passes.batch(inputs), self.args.device))
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = sums_of(model, batch)
        self._eval.add(sums, batch["loss_weights"][:, 1:], batch["channels"])
        return None, None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; neither it nor what callbacks do then counts as training, which draws the same numbers after it
        as without it."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self._window.paused(self.args.device), torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with `loss` the mean over all the set's token weights."""
        self._eval = _Sums()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        (loss, weight, correct, count), channels = _split(self.accelerator.reduce(self._eval.tensor(self.args.device)))
        metrics = {f"{prefix}_loss": loss / weight, f"{prefix}_token_accuracy": correct / count}
        metrics |= {f"{prefix}_loss/{name}": part / of for name, (part, of) in channels.items()}
        return output._replace(metrics=metrics)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; empty where the run is asked to stop, and the evaluation is left for when it goes on."""
        try:
            self._evaluation_due = False
            metrics = super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._evaluation_due = True
            self.control.should_evaluate = False
            self.stop.end(self.control)
            return {}
        if not self._rows and self.state.global_step:
            # What the run that this one goes on from has left.
            self._determine_best_metric(metrics, None)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; the best is saved, and so is the last before a stop."""
        best = bool(metrics) and super()._determine_best_metric(metrics, trial)
        if (best and self.args.save_strategy != "no") or self.control.should_training_stop:
            self.control.should_save = True
        return best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with accuracy, rate and memory beside each training loss."""
        if "loss" in logs:
            logs |= self._window.metrics(self.args.device, self.accelerator)
            logs[_TRAINED] += next((e[_TRAINED] for e in reversed(self.state.log_history) if _TRAINED in e), 0)
            self._window = _Window()
        super().log(logs, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it, give it its name; then remove those over the limit."""
        self._read_verdicts(wait=True)
        run = Path(str(self.args.output_dir))
        checkpoint = run / f"{PREFIX}{self.state.global_step}"
        part, best = part_of(checkpoint), self.state.best_model_checkpoint
        failed = ""
        with self._window.paused(self.args.device):
            for phase in (self._begin_part, self._write_part, self._finish_part):
                failed = failed or self._attempt(phase, part, checkpoint)
        if failed:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
        elif self.args.should_save:
            rotate(run, self._keep, self.state.best_model_checkpoint)
        self.stop.saved(checkpoint.name, failed)

    def _attempt(self, phase: Callable[[Path, Path], None], part: Path, checkpoint: Path) -> str:
        """Why a phase failed on any process, the same on all; or nothing."""
        failed = ""
        try:
            phase(part, checkpoint)
        except Exception as error:  # noqa: BLE001  a full disk is an OSError, torch's RuntimeError, tokenizers' Exception
            failed = " ".join(str(error).split())[:200] or type(error).__name__
        return next((each for each in gather_object([failed]) if each), "")

    def _begin_part(self, part: Path, checkpoint: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()

    def _write_part(self, part: Path, checkpoint: Path) -> None:
        self.store_flos()
        self.save_model(str(part), _internal_call=True)
        self._save_optimizer_and_scheduler(str(part))
        self._save_scaler(str(part))
        self._save_rng_state(str(part))

    def _finish_part(self, part: Path, checkpoint: Path) -> None:
        if not self.args.should_save:
            return
        step = self.state.best_global_step
        if step and (step == self.state.global_step or (checkpoint.parent / f"{PREFIX}{step}").is_dir()):
            self.state.best_model_checkpoint = str(checkpoint.parent / f"{PREFIX}{step}")
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(part / "trainer_state.json"))
        seal(part, {"step": self.state.global_step, "evaluation_due": self._evaluation_due, **self.facts})
        put_in_place(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's, with what was summed since the last log line."""
        super()._save_rng_state(output_dir)
        progress = {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "window": self._window.parts,
            "limit": self._guard.limit,
        }
        torch.save(progress, self._progress_file(Path(output_dir)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As Trainer's, which asks for it right before the first step; takes back what `_save_rng_state` wrote."""
        super()._load_rng_state(checkpoint)
        file = self._progress_file(Path(str(checkpoint)))
        if not file.is_file():
            return
        device = self.args.device
        # torch can't load to an indexed CPU, which DeepSpeed's is.
        progress = torch.load(file, map_location="cpu", weights_only=True)
        self._tr_loss, self._guard.limit = progress["loss"].to(device), progress["limit"].to(device)
        self._total_loss_scalar, self._globalstep_last_logged = progress["total_loss"], progress["last_logged"]
        self._window.parts = [part.to(device) for part in progress["window"]]
        # The mean loss of the end is the whole run's.
        self._initial_global_step = 0

    def _progress_file(self, folder: Path) -> Path:
        return folder / f"progress_{self.args.process_index}.pth"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter and the tokenizer; all processes of a sharded run take part."""
        folder, model = Path(output_dir or str(self.args.output_dir)), self.accelerator.unwrap_model(self.model)
        with whole(model):
            tensors = adapter_tensors(model)
        if self.args.should_save:
            save_adapter(model, folder, self.base_model, origin=self.origin, tensors=tensors)
            self.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Before a model is sharded; Trainer asks for it after that, when the weights must be there already."""
        if not self.is_fsdp_enabled:
            load_adapter_tensors(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapter_tensors(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))


class UnsoundStep(Exception):
    """An optimizer step was held back; the weights are those of the step before."""

    def __init__(self, step: Step) -> None:
        super().__init__(f"step {step.number}: loss {step.loss:g}, gradient norm {step.norm:g}")
        self.step = step


def sums_of(model: nn.Module, inputs: dict[str, Any], label_smoothing: float = 0.0) -> LossOutput:
    """Summed loss and right guesses of a batch, from our model's fused loss or any other's logits."""
    if isinstance(inner_model(model), OssiaGptOssForCausalLM):
        known = {name: value for name, value in inputs.items() if name not in ("channels", "tokens")}
        return model(**known, label_smoothing=label_smoothing)
    rest = {name: value for name, value in inputs.items() if name not in _OURS}
    logits = model(**rest, use_cache=False).logits
    return loss_from_logits(logits, inputs["labels"], inputs["loss_weights"], label_smoothing, inputs.get("kept"))


def check_packing(model: nn.Module) -> None:
    """Raise UsageError where the model lets packed rows see each other, as some of transformers' do."""
    if not keeps_apart(model):
        raise UsageError(
            f"--packing true: {type(inner_model(model)).__name__} of transformers lets packed rows see each other; "
            "train this model without --packing"
        )


def default_passes(model: nn.Module, pad_id: int, apart: bool, rows: Any, size: int) -> Passes:
    """Passes of a run whose memory is not planned: no more tokens than `size` of the longest rows have, or `_SPAN`.

    Args:
        model: that trains.
        pad_id: token that fills.
        apart: whether the model keeps packed rows apart.
        rows: to train on, or held out; None: there are none.
        size: rows of a batch.
    """
    longest = int(max(_lengths(rows), default=1)) if rows is not None else 1
    device = next(model.parameters()).device.type
    # Sequences that were packed before may be whole again.
    span = max(_SPAN.get(device, 512), rows.capacity if isinstance(rows, PackedRows) else 0)
    return Passes(pad_id, max(size * longest, span), apart, span)


def _lengths(rows: Any) -> list[int]:
    """Tokens of each item of a set."""
    if isinstance(rows, TokenRows):
        lengths: list[int] = rows.lengths.tolist()
        return lengths
    if isinstance(rows, PackedRows):
        return [rows.capacity] * len(rows)
    return [len(row) for row in rows]


def _rows_in(batches: Sequence[Any]) -> list[TokenRow]:
    """Rows of the loader's batches, of which packed sequences may be items."""
    items = [item for batch in batches for item in batch]
    return [row for item in items for row in ([item] if isinstance(item, TokenRow) else item)]


class _HeldPasses(Dataset[list[TokenRow]]):
    """Held-out rows by passes; one without rows has the shortest row, without its loss."""

    def __init__(self, rows: Any, groups: list[list[int]]) -> None:
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[TokenRow]:
        group = self.groups[index]
        if group:
            return _rows_in([[self.rows[row] for row in group]])
        lengths = _lengths(self.rows)
        return [weightless(self.rows[lengths.index(min(lengths))])]


def _only(batch: list[Any]) -> Any:
    return batch[0]


class _Sums:
    """Loss, weight, right guesses and guesses, then loss and weight by channel, summed on the device: no wait for it at
    every step."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, sums: LossOutput, weight: Tensor, channels: Tensor) -> None:
        assert sums.loss is not None
        assert sums.correct is not None
        assert sums.losses is not None
        parts = (sums.loss.detach(), weight.sum(), sums.correct, (weight > 0).sum())
        codes = torch.arange(len(CHANNELS), device=weight.device)
        belongs_TC = (channels[:, 1:].flatten()[:, None] == codes).double()
        both_2T = torch.stack([sums.losses[:, :-1].flatten(), weight.flatten()]).double()
        by_channel = both_2T @ belongs_TC
        self.parts.append(torch.cat([torch.stack([part.double() for part in parts]), by_channel.flatten()]))

    def tensor(self, device: torch.device) -> Tensor:
        if self.parts:
            return torch.stack(self.parts).sum(0).to(device)
        return torch.zeros(4 + 2 * len(CHANNELS), device=device).double()


def _split(sums: Tensor) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """The four sums, and (loss, weight) of each channel that has weight."""
    values = sums.tolist()
    losses, weights = values[4 : 4 + len(CHANNELS)], values[4 + len(CHANNELS) : 4 + 2 * len(CHANNELS)]
    both = zip(CHANNELS, zip(losses, weights, strict=True), strict=True)
    return values[:4], {name: (loss, weight) for name, (loss, weight) in both if weight > 0}


class _Window(_Sums):
    """The steps since the last log line."""

    def __init__(self) -> None:
        super().__init__()
        self.started: float | None = None
        self.tokens: list[Tensor | int] = []

    def start(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """What happens inside does not count."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        yield
        if self.started is not None:
            self.started += time.perf_counter() - began

    def add(self, sums: LossOutput, weight: Tensor, channels: Tensor, tokens: Tensor | int = 0) -> None:
        super().add(sums, weight, channels)
        self.tokens.append(tokens)

    def metrics(self, device: torch.device, accelerator: Any) -> dict[str, float]:
        tokens = torch.as_tensor(sum(self.tokens), device=device).double()
        sums = accelerator.reduce(torch.cat([self.tensor(device), tokens[None]]))
        (_, weight, correct, count), channels = _split(sums)
        seconds = time.perf_counter() - self.started if self.started else 0.0
        return {
            "token_accuracy": round(correct / max(count, 1), 5),
            "tokens_per_second": round(float(sums[-1]) / max(seconds, 1e-9), 1),
            "memory_gb": round(_peak_bytes(device) / 1e9, 3),
            _TRAINED: int(count),
            **{f"loss/{name}": round(loss / of, 5) for name, (loss, of) in channels.items()},
            **{f"weight_share/{name}": round(of / weight, 5) for name, (_, of) in channels.items()},
        }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
