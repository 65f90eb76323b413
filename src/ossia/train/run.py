"""`ossia sft`: checks, data, model, adapters, training, in this order."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ossia.adapters.files import base_model_of, check_adapter
from ossia.adapters.targets import check_targets
from ossia.compat import quiet_libraries
from ossia.config import SftConfig
from ossia.config.base import parse_seconds
from ossia.console import counted, say, tool, world_size
from ossia.data.packing import PackedRows
from ossia.data.prepare import prepare, split
from ossia.data.sources import find_datasets
from ossia.data.store import TokenRows
from ossia.data.summary import summary
from ossia.errors import OssiaError, UsageError
from ossia.kernels.available import HAS_TRITON
from ossia.model.folder import holds_mxfp4, read_json, resolve_model, weight_files
from ossia.model.tokenizer import load_tokenizer
from ossia.template.options import template_from
from ossia.threads import allowed_cores
from ossia.track import read_metrics
from ossia.track.files import RUN, facts_of, note
from ossia.track.jsonl import METRICS
from ossia.track.lock import hold
from ossia.train.adapters import check_scale, one_adapter, take_settings
from ossia.train.checkpoint import checkpoints
from ossia.train.deterministic import before_cuda, deterministic
from ossia.train.folder import new_run_folder, save_options
from ossia.train.gpus import of_device
from ossia.train.launch import launch, launched_here, nodes_wanted, processes_wanted
from ossia.train.pace import Steps, plan_passes
from ossia.train.plan import PLANNED, Plan, budget_of, sizes_of
from ossia.train.resume import Start, check_facts, data_facts, find_start, resume_command, take_back
from ossia.train.schedule import factor_of, optimizer_steps, schedule_lines, warmup_steps
from ossia.train.sharding import check_sharding, lay_out, prefer_data_parallel, sharding_arguments

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback, TrainingArguments

    from ossia.data.passes import Passes
    from ossia.track import Trackers
    from ossia.train.callbacks import StopCallback
    from ossia.train.trainer import SftTrainer, UnsoundStep


BAD_BATCH = "bad_batch.jsonl"


@dataclass(frozen=True)
class SftResult:
    """Where the run is, its last checkpoint (None where none was saved) and its last metrics."""

    run_dir: Path
    checkpoint: Path | None
    metrics: dict[str, float]


def run(config: SftConfig) -> SftResult | None:
    """Fine-tune; None after `--dry_run` and in the process that only starts others.

    Raises:
        UsageError, OssiaError: before any model loads where that is possible.
    """
    began = time.monotonic()
    _check(config)
    processes, nodes = processes_wanted(), nodes_wanted()
    for line in config.notes(int(os.environ.get("WORLD_SIZE", processes * nodes))) if "RANK" not in os.environ else []:
        say(line)
    folder = resolve_model(str(config.model))
    if Path(str(config.model)).is_dir():
        config.model = str(folder)
    if processes * nodes > 1 or world_size() > 1:
        model_type = str(read_json(folder / "config.json").get("model_type"))
        note_left_out = prefer_data_parallel(config, model_type)
        if note_left_out and not launched_here():
            say(note_left_out)
        check_sharding(config, model_type)
    if processes * nodes > 1 and not config.dry_run:
        say(f"starting {processes} processes" + (f" on each of {nodes} machines" if nodes > 1 else ""))
        launch(processes)
        return None
    # A checkpoint has all that is needed; a run without one begins again, with its adapter.
    start = find_start(config) if _goes_on(config) else None
    starts = config.adapters and not (start and start.checkpoint)
    with one_adapter(config.adapters, config.adapter_weights) if starts else nullcontext() as adapter:
        return _run(config, folder, adapter, start, began)


def _run(config: SftConfig, folder: Path, adapter: Path | None, start: Start | None, began: float) -> SftResult | None:
    if adapter is not None:
        from ossia.adapters.origin import check_origin

        take_settings(config, adapter)
        check_origin(adapter, folder)
    start = start or find_start(config)
    if start.checkpoint is not None:
        # A run that began with an adapter has that one's configuration in its checkpoints.
        (take_settings if config.adapters else check_scale)(config, start.checkpoint)
    targets = check_targets(folder, config.target_modules, config.target_experts)
    template = template_from(load_tokenizer(folder), config)
    rows, held = read_rows(config, template)
    if config.dry_run:
        say(config.to_yaml().rstrip())
        return None
    facts = {"processes": world_size(), **data_facts(rows, held)}
    if start.checkpoint is not None:
        check_facts(start.checkpoint, facts)
    if start.run is not None and facts_of(start.run).get("status") == "finished":
        say(f"{start.run} is finished")
        return _result(start.run)
    parts = (config, folder, adapter, targets, template, rows, held, start, facts, began)
    if not config.deterministic:
        return _train(*parts)
    before_cuda()
    with deterministic():
        return _train(*parts)


def _goes_on(config: SftConfig) -> bool:
    """Whether a run or a checkpoint is named to go on from."""
    return bool(config.resume_from_checkpoint or (config.resume and config.resume != "auto"))


def _check(config: SftConfig) -> None:
    """What can be known to be wrong from the flags and the files' names."""
    if config.model is None or not _goes_on(config):
        folders = [check_adapter(name) for name in config.adapters]
        if config.model is None and folders:
            config.model = base_model_of(folders[0])
    if config.model is None:
        raise UsageError("give --model DIR, or a hub id such as openai/gpt-oss-20b")
    if not config.dataset:
        raise UsageError("give --dataset FILE")
    find_datasets(config.dataset)
    find_datasets(config.val_dataset, "--val_dataset")
    from ossia.track import check_names

    check_names(config.report_to)


def read_rows(config: SftConfig, template: Any) -> tuple[TokenRows, TokenRows | None]:
    """Rows to train on and rows held out, tokenised; says what was found."""
    keep: dict[str, Any] = {"cache": config.load_from_cache_file, "processes": config.dataset_num_proc}
    ratio = 0 if config.val_dataset else config.split_dataset_ratio
    rows = prepare(config.dataset, template, config, "training data", for_split=ratio > 0, **keep)
    if config.val_dataset:
        return rows, prepare(config.val_dataset, template, config, "held-out data", "--val_dataset", **keep)
    if not ratio:
        return rows, None
    rows, held, groups = split(rows, ratio, config.seed)
    same = f"; {groups:,} groups of near duplicates, each on one side" if groups else ""
    say(f"held out: {counted(len(held), 'sample')}, {len(rows):,} left to train on{same}")
    return rows, held


def _passes(
    config: SftConfig, model: Any, pad_id: int, rows: TokenRows | PackedRows, held: TokenRows | None, plan: Plan | None
) -> tuple[Passes, Passes]:
    """How rows become passes, to train on and held out: as planned; else about as large as the batches asked for."""
    from ossia.data.passes import Passes
    from ossia.model.packed import keeps_apart
    from ossia.train.trainer import default_passes

    if plan is not None:
        return Passes(pad_id, plan.sizes.tokens), Passes(pad_id, plan.sizes.eval_tokens or 1)
    apart = keeps_apart(model)
    if not apart:
        name = type(model.get_base_model()).__name__
        say(f"rows are padded, short ones apart from long: {name} lets rows that lie end to end see each other")
    sizes = ((rows, config.per_device_train_batch_size), (held, config.per_device_eval_batch_size))
    training, evaluation = (default_passes(model, pad_id, apart, *size) for size in sizes)
    return training, evaluation


def _packed(config: SftConfig, rows: TokenRows) -> PackedRows:
    packed = PackedRows(rows, config.packing_length or config.max_length)
    samples, sequences = counted(len(rows), "sample"), counted(len(packed), "sequence")
    say(f"packing: {samples} in {sequences} of {packed.capacity:,}, {packed.fill:.1%} full")
    return packed


def _plan(
    config: SftConfig,
    folder: Path,
    targets: tuple[list[str], list[int]],
    rows: TokenRows,
    held: TokenRows | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan | None:
    quantized = config.experts != "dequantized" and holds_mxfp4(weight_files(folder))
    steps = Steps.of_run(config, rows.lengths, held.lengths if held else None)
    return plan_for(config, read_json(folder / "config.json"), quantized, targets, steps, device, dtype)


def plan_for(
    config: SftConfig,
    model: dict[str, Any],
    quantized: bool,
    targets: tuple[list[str], list[int]],
    steps: Steps,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan | None:
    """How a run uses the GPU's memory, said in lines; None where that is not ours to choose.

    Args:
        config: rank, budget.
        model: its config.json.
        quantized: whether experts stay in MXFP4.
        targets: adapted linear layers, and layers whose experts are adapted.
        steps: what its optimizer steps are made of.
        device: where it trains.
        dtype: in what.

    Raises:
        OssiaError: nothing fits.
        UsageError: a budget over what is free.
    """
    import torch

    from ossia.model.attention import supports_flash

    if model.get("model_type") != "gpt_oss" or not supports_flash(device, dtype) or config.attn_impl not in PLANNED:
        if config.memory_budget:
            say("--memory_budget: no effect here; it plans gpt-oss with flash attention on a GPU from Ampere on")
        return None
    sizes = sizes_of(config, model, quantized, targets, parallel=world_size() > 1, triton=HAS_TRITON)
    free = torch.cuda.mem_get_info(device)[0]
    budget = budget_of(config, free)
    if budget > free:
        raise UsageError(f"--memory_budget {config.memory_budget}: this GPU has {free / 1e9:.1f} GB free")
    gpu = of_device(torch.cuda.get_device_name(device))
    plan = plan_passes(sizes, budget, steps, model, gpu, config.gradient_checkpointing)
    for line in plan.lines():
        say(line)
    return plan


def needs_autocast(dtype: torch.dtype, plan: Plan | None) -> bool:
    """Whether float32 adapters meet bfloat16 rows in PyTorch's operations; fused steps round for themselves, and do
    without autocast's look at every operation."""
    import torch

    return dtype == torch.bfloat16 and not (plan is not None and plan.sizes.fused)


def expandable_memory() -> None:
    """Before the first tensor reaches a GPU: blocks that grow leave no holes between layers of different needs."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _train(
    config: SftConfig,
    folder: Path,
    adapter: Path | None,
    targets: tuple[list[str], list[int]],
    template: Any,
    rows: TokenRows,
    held: TokenRows | None,
    start: Start,
    facts: dict[str, Any],
    began: float,
) -> SftResult:
    expandable_memory()
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from ossia.adapters.inject import add_lora, base_parameters, coverage_lines
    from ossia.adapters.io import load_adapter, load_adapter_tensors
    from ossia.model.load import load_model, path_lines, pick_device, pick_dtype
    from ossia.track import Status, make_trackers
    from ossia.train.callbacks import INTERRUPT, LinesCallback, StopCallback, TrackCallback
    from ossia.train.panel import PanelCallback, on_terminal
    from ossia.train.recompute import apply_plan
    from ossia.train.trainer import UnsoundStep, check_packing

    quiet_libraries()
    device = pick_device(config.device)
    dtype = pick_dtype(config.torch_dtype, device)
    plan = _plan(config, folder, targets, rows, held, device, dtype)
    train_rows = _packed(config, rows) if config.packing else rows
    args = training_arguments(config, bool(held), dtype, device, plan)
    _check_schedule(config, len(train_rows), start)
    state = PartialState(cpu=device.type == "cpu")
    set_seed(config.seed)
    model = load_model(
        folder,
        torch_dtype=config.torch_dtype,
        device=config.device,
        experts=config.experts,
        attn_impl=config.attn_impl,
        offload=plan.offload() if plan else (),
    )
    say(f"model: {config.model} ({type(model).__name__}, {str(dtype)[6:]} on {device}, {template.name} template)")
    total = base_parameters(model)
    # A run that began with an adapter has that one's configuration in its checkpoints, which flags cannot say in full.
    source = start.checkpoint if config.adapters and start.checkpoint else adapter
    if source is not None:
        wrapped = load_adapter(model, source, trainable=True, dropout=config.lora_dropout)
    else:
        wrapped = add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=config.target_modules,
            target_experts=config.target_experts,
        )
        if start.checkpoint is not None:
            load_adapter_tensors(wrapped, start.checkpoint)
    if adapter is not None and start.checkpoint is None:
        say(f"going on from {' and '.join(config.adapters)} (rank {config.lora_rank}, alpha {config.lora_alpha:g})")
    if plan is not None:
        apply_plan(wrapped, plan, config.lora_dropout > 0)
        for line in path_lines(device, config.lora_dropout > 0):
            say(line)
    if config.packing:
        check_packing(wrapped)
    passes = _passes(config, wrapped, template.pad_id, train_rows, held, plan)
    if args.deepspeed or args.fsdp:
        lay_out(wrapped)
    for line in coverage_lines(wrapped, total):
        say(line)
    run_dir, lock = _run_folder(config, start, state.is_main_process)
    earlier = facts_of(run_dir).get("run_ids", {}) if start.run else {}
    trackers = make_trackers(
        config.report_to if state.is_main_process else None,
        run_dir=run_dir,
        config=config.to_dict(),
        environment=environment(device),
        project=config.swanlab_project,
        name=config.run_name or run_dir.name,
        tags=config.run_tags,
        swanlab_exp_name=config.swanlab_exp_name,
        swanlab_mode=config.swanlab_mode,
        swanlab_workspace=config.swanlab_workspace,
        data=_summaries(rows, held) if state.is_main_process else None,
        run_ids=earlier,
        say=say,
    )
    if state.is_main_process:
        note(run_dir, status="running", run_ids={**earlier, **trackers.run_ids})
    args.output_dir = str(run_dir)
    args.eval_on_start = start.evaluation_due if start.checkpoint else config.eval_on_start
    shown = PanelCallback() if on_terminal() else LinesCallback()
    stop = StopCallback(parse_seconds(config.max_time, "--max_time") if config.max_time else None, began, shown.tell)
    watch = _insight(config, folder, args, wrapped, template, rows, held, passes, trackers, shown)
    watch += [shown, TrackCallback(trackers)]
    trainer = _trainer(config, folder, args, wrapped, template, train_rows, held, passes, watch, facts, stop)
    say(f"run: {run_dir}")
    if start.checkpoint is not None:
        say(f"going on from {start.checkpoint}")
    status: Status = "failed"
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        ended = trainer.state.global_step >= trainer.state.max_steps or not stop.reason
        status = "finished" if ended else "interrupted"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except UnsoundStep as error:
        raise OssiaError(_unsound(error, trainer, template, run_dir)) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OssiaError(f"{_out_of_memory(config, error, plan)}. {_safe(run_dir)}") from error
    finally:
        shown.close()
        trackers.finish(status)
        if lock is not None:
            _note_end(run_dir, status)
            lock.close()
    if stop.unsaved:
        raise OssiaError(f"the last checkpoint is not saved: {stop.unsaved}. {_safe(run_dir)}")
    if status == "interrupted":
        done = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        say(f"stopped at step {done} ({stop.reason}). {_safe(run_dir)}")
    elif trainer.state.global_step < trainer.state.max_steps:
        patience, best = config.early_stopping_patience, trainer.state.best_metric
        say(f"stopped early: no lower held-out loss than {best:.4f} for {patience} evaluations")
    if stop.reason == INTERRUPT:
        raise KeyboardInterrupt
    if plan is not None:
        peak = torch.cuda.max_memory_allocated(device)
        say(f"memory: {peak / 1e9:.1f} GB at the peak, {plan.peak / 1e9:.1f} planned")
    return _result(run_dir, status == "finished")


def _check_schedule(config: SftConfig, sequences: int, start: Start) -> None:
    """Say what is unusual about the learning rates of a run over so many rows or packed sequences.

    Raises:
        UsageError: a step without a rate, or a checkpoint behind which no step is left.
    """
    batches = math.ceil(math.ceil(sequences / config.per_device_train_batch_size) / world_size())
    _, steps = optimizer_steps(config, batches)
    if config.resume_from_checkpoint and start.step >= steps:
        raise UsageError(
            f"--resume_from_checkpoint {config.resume_from_checkpoint}: it has done {start.step} optimizer steps, and "
            f"this run has {steps}; give more by --num_train_epochs or --max_steps"
        )
    warmup, options = warmup_steps(config, steps), config.lr_scheduler_kwargs
    factor = factor_of(config.lr_scheduler_type, config.learning_rate, warmup, steps, options)
    for line in schedule_lines(config, steps, factor):
        say(line)


def _note_end(run_dir: Path, status: str) -> None:
    """A full disk must not hide how the run ended."""
    try:
        note(run_dir, status=status)
    except OSError as error:
        say(f"{RUN} still says running: {error.strerror}")


def _run_folder(config: SftConfig, start: Start, is_main_process: bool) -> tuple[Path, IO[str] | None]:
    """The run's folder, made or brought back to where it goes on from by the main process, which holds its lock."""
    from accelerate.utils import broadcast_object_list

    folder, lock = start.run, None
    if is_main_process:
        folder = folder or new_run_folder(config.output_dir, config.add_version)
        lock = hold(folder)
        if start.run is None:
            save_options(folder, dataclasses.replace(config, resume=None))
        else:
            take_back(start)
    return Path(broadcast_object_list([str(folder)])[0]), lock


def _safe(run: Path) -> str:
    """Which checkpoint there is, and how to go on from it."""
    found = checkpoints(run)
    return f"{found[-1].name} is safe; go on:  {resume_command(run)}" if found else "No checkpoint was saved yet"


def _trainer(
    config: SftConfig,
    folder: Path,
    args: TrainingArguments,
    model: Any,
    template: Any,
    rows: TokenRows | PackedRows,
    held: TokenRows | None,
    passes: tuple[Passes, Passes],
    watch: list[TrainerCallback],
    facts: dict[str, Any],
    stop: StopCallback,
) -> SftTrainer:
    from transformers import EarlyStoppingCallback, PrinterCallback

    from ossia.adapters.origin import fingerprint
    from ossia.data.collate import Collator
    from ossia.train.callbacks import LinkCallback
    from ossia.train.trainer import SftTrainer

    trainer = SftTrainer(
        model,
        base_model=str(config.model),
        origin=fingerprint(folder),
        facts=facts,
        stop=stop,
        args=args,
        train_dataset=rows,
        eval_dataset=held,
        data_collator=Collator(template.pad_id),
        passes=passes[0],
        held_passes=passes[1],
        tokenizer=template.tokenizer,
        callbacks=[
            *watch,
            LinkCallback(Path(str(args.output_dir))),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    return trainer


def _summaries(rows: TokenRows, held: TokenRows | None) -> dict[str, Any]:
    return {name: summary(part) for name, part in (("training data", rows), ("held-out data", held)) if part}


def _insight(
    config: SftConfig,
    folder: Path,
    args: TrainingArguments,
    model: Any,
    template: Any,
    rows: TokenRows,
    held: TokenRows | None,
    passes: tuple[Passes, Passes],
    trackers: Trackers,
    shown: Any,
) -> list[TrainerCallback]:
    """What looks at training from beside it; these come before those that read logs."""
    import torch

    from ossia.train import insight
    from ossia.train.rate import flops_per_token, peak_flops

    found: list[TrainerCallback] = [insight.GradientCallback()]
    lengths = rows.lengths.astype("float64")
    work = flops_per_token(read_json(folder / "config.json"), float((lengths**2).sum() / lengths.sum()))
    peak = peak_flops(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
    if work and peak:
        found.append(insight.RateCallback(work, peak * args.world_size))
    run_dir, whole = Path(str(args.output_dir)), not (args.fsdp or args.deepspeed)
    if config.log_expert_load and whole and insight.has_experts(model):
        probed = (held, passes[1]) if held else (rows, passes[0])
        found.append(insight.ExpertCallback(run_dir, model, *probed))
    if config.sample_prompts and whole and held:
        prompts = (held, config.sample_prompts)
        found.append(insight.SampleCallback(run_dir, *prompts, template, trackers, shown))
    return found


def training_arguments(
    config: SftConfig, has_eval: bool, dtype: torch.dtype, device: torch.device, plan: Plan | None
) -> TrainingArguments:
    """transformers' arguments for a run; UsageError where a value is none of its own (a schedule, an optimizer)."""
    from transformers import TrainingArguments

    on_cpu = device.type == "cpu"

    same = (
        "num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "learning_rate lr_scheduler_type weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim seed "
        "label_smoothing_factor logging_steps eval_steps save_strategy save_steps save_total_limit eval_on_start"
    )
    try:
        return TrainingArguments(
            output_dir=config.output_dir,
            **(sharding_arguments(config) if world_size() > 1 else {}),
            **{name: getattr(config, name) for name in same.split()},
            # A plan says it layer by layer.
            gradient_checkpointing=plan is None and config.gradient_checkpointing != "false",
            eval_strategy=config.eval_strategy or ("steps" if has_eval else "no"),
            warmup_steps=config.warmup_steps or config.warmup_ratio,
            lr_scheduler_kwargs=config.lr_scheduler_kwargs or None,
            bf16=needs_autocast(dtype, plan),
            use_cpu=on_cpu,
            # Rows come as they are; `SftTrainer` makes tensors of them.
            dataloader_pin_memory=False,
            dataloader_num_workers=_workers(config.dataloader_num_workers),
            gradient_checkpointing_kwargs={"use_reentrant": False},
            metric_for_best_model="eval_loss" if has_eval else None,
            greater_is_better=False if has_eval else None,
            logging_nan_inf_filter=False,
            logging_first_step=True,
            remove_unused_columns=False,
            label_names=["labels"],
            restore_callback_states_from_checkpoint=True,
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        )
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _workers(wanted: int) -> int:
    """Processes that assemble batches: no more than this process's share of the cores."""
    share = max(1, allowed_cores() // world_size())
    if wanted > share:
        say(f"--dataloader_num_workers {wanted}: {share} used, one per core that a process has here")
    return min(wanted, share)


def _result(run_dir: Path, finished: bool = True) -> SftResult:
    """Of a run; where it is finished, what to do next is said."""
    metrics = {key: value for row in read_metrics(run_dir / METRICS) for key, value in row.items()}
    last = run_dir / "last"
    checkpoint = last.resolve() if last.is_dir() else None
    if not finished:
        return SftResult(run_dir, checkpoint, metrics)
    if checkpoint:
        say(f"adapter: {checkpoint}")
        best = (run_dir / "best").resolve()
        if best != checkpoint:
            say(f"lowest held-out loss:  {best}")
        say(f"talk to it:  {tool('ossia')} infer --adapters {checkpoint}")
        say(f"merge it:    {tool('ossia')} export --adapters {checkpoint} --merge_lora true")
    else:
        say("no checkpoint was saved (--save_strategy no)")
    return SftResult(run_dir, checkpoint, metrics)


def environment(device: Any) -> dict[str, Any]:
    """Versions and hardware, for a run's record."""
    import peft
    import torch
    import transformers

    import ossia

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "ossia": ossia.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
    }


def _unsound(error: UnsoundStep, trainer: SftTrainer, template: Any, run: Path) -> str:
    """Log the step that was held back, keep its batch, and say so."""
    from ossia.train.bad_batch import keep_batches

    step = error.step
    trainer.log({"loss": step.loss, "grad_norm": step.norm, "learning_rate": trainer._get_learning_rate()})
    sources = keep_batches(run / BAD_BATCH, step, trainer.train_dataset, template.tokenizer)
    when = "right after DeepSpeed's update" if trainer.is_deepspeed_enabled else "before the weights changed"
    return (
        f"{error}: stopped {when}. Its rows ({', '.join(sources[:3])}{' …' * (len(sources) > 3)}) "
        f"are in {run / BAD_BATCH}: look at them, or lower --learning_rate. {_safe(run)}"
    )


def _out_of_memory(config: SftConfig, error: Exception, plan: Plan | None) -> str:
    first = " ".join(str(error).split())[:200]
    fix = [f"--max_length (now {config.max_length})", f"--lora_rank (now {config.lora_rank})"]
    if plan is not None:
        fix.append(f"--memory_budget (planned {plan.peak / 1e9:.1f} GB)")
    else:
        fix.insert(0, f"--per_device_train_batch_size (now {config.per_device_train_batch_size})")
    more = "" if config.gradient_checkpointing != "false" else ", or leave --gradient_checkpointing at auto"
    return f"out of memory ({first}). Lower {', '.join(fix)}{more}"
