"""Options of `ossia sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ossia.config.base import Config, opt, parse_bytes, parse_seconds
from ossia.config.parts import DATA_TITLES, MODEL_TITLES, AdapterOptions, DataOptions, ModelOptions, TemplateOptions
from ossia.errors import UsageError

ZERO = ("zero2", "zero3")
FSDP = ("full_shard", "shard_grad_op", "auto_wrap", "offload")


@dataclass
class SftConfig(DataOptions, TemplateOptions, AdapterOptions, ModelOptions, Config):
    """Supervised fine-tuning with LoRA."""

    group_titles: ClassVar[dict[str, str]] = {
        **MODEL_TITLES,
        **DATA_TITLES,
        "lora": "LoRA",
        "train": "training",
        "eval": "logging, evaluation, checkpoints",
        "track": "output and tracking",
        "compat": "accepted from other tools (each says in one line what it means here)",
        "run": "run",
    }

    val_dataset: list[str] = opt([], "rows held out for evaluation; same forms as --dataset", group="data")
    split_dataset_ratio: float = opt(
        0.0,
        "share of --dataset held out when --val_dataset is not given; near duplicates stay on one side",
        group="data",
    )
    packing: bool = opt(False, "several rows in one sequence, each seeing only itself", group="data")
    packing_length: int | None = opt(None, "tokens of a packed sequence; default: --max_length", group="data")
    load_from_cache_file: bool = opt(True, "reuse rows tokenised before, if nothing changed", group="data")
    dataset_num_proc: int | None = opt(
        None, "processes that tokenise; default: every core for 2,000 rows or more", group="data"
    )

    train_type: str = opt("lora", "what is trained", group="lora", choices=["lora"])
    lora_rank: int = opt(8, "rank r of every adapter", group="lora")
    lora_alpha: float = opt(32.0, "adapters are scaled by alpha / r", group="lora")
    lora_dropout: float = opt(0.0, "share of adapter inputs zeroed while training", group="lora")
    use_rslora: bool = opt(False, "scale by alpha / sqrt(r) instead", group="lora")
    target_modules: list[str] = opt(
        ["all-linear"], "linear layers to adapt, by name ending (q_proj …), or all-linear", group="lora"
    )
    target_experts: str = opt(
        "auto",
        "expert weights to adapt: all, none, or layers such as 7,15,23; auto: all for gpt-oss",
        group="lora",
    )

    num_train_epochs: float = opt(1.0, "passes over the data", group="train")
    max_steps: int = opt(-1, "stop after this many optimizer steps; -1: --num_train_epochs decides", group="train")
    per_device_train_batch_size: int = opt(1, "rows per device and batch", group="train")
    gradient_accumulation_steps: int = opt(
        1,
        "batches per optimizer step; all rows of a step go through the model in as few passes as memory allows",
        group="train",
    )
    learning_rate: float = opt(1e-4, "peak learning rate", group="train")
    lr_scheduler_type: str = opt(
        "cosine", "schedule, by transformers' name (cosine_with_min_lr, linear …)", group="train"
    )
    lr_scheduler_kwargs: dict = opt({}, "more for the schedule, such as '{\"min_lr_rate\": 0.1}'", group="train")
    warmup_ratio: float = opt(
        0.05, "share of the optimizer steps spent warming up; the first of n has 1/n of the peak", group="train"
    )
    warmup_steps: int = opt(0, "optimizer steps of warm-up; wins over --warmup_ratio", group="train")
    weight_decay: float = opt(0.0, "AdamW weight decay", group="train")
    adam_beta1: float = opt(0.9, "AdamW beta 1", group="train")
    adam_beta2: float = opt(0.999, "AdamW beta 2", group="train")
    adam_epsilon: float = opt(1e-8, "AdamW epsilon", group="train")
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm", group="train")
    label_smoothing_factor: float = opt(
        0.0, "share of the training loss that asks for every token alike; held-out loss is without it", group="train"
    )
    optim: str = opt("adamw_torch_fused", "optimizer, by transformers' name", group="train")
    gradient_checkpointing: str = opt(
        "auto",
        "layers computed again in backward, which saves memory: all (true), none (false), or as many as the GPU's "
        "memory asks for (auto; gpt-oss on a GPU, elsewhere all)",
        group="train",
        choices=["auto", "true", "false"],
    )
    memory_budget: str | None = opt(
        None, "GPU memory a gpt-oss run may take, such as 16GB; default: what is free", group="train"
    )
    max_time: str | None = opt(
        None, "stop after so long, such as 90m or 1h30m, with a checkpoint and the line that goes on", group="train"
    )
    deterministic: bool = opt(
        False, "the same numbers from the same run, at some cost; operations that cannot are named", group="train"
    )
    deepspeed: str | None = opt(
        None,
        "with several processes: DeepSpeed by zero2, zero3, or a JSON file of its options; in the place of the first "
        "two gpt-oss trains data-parallel",
        group="train",
    )
    deepspeed_force: bool = opt(False, "keep DeepSpeed where data-parallel would be faster", group="train")
    fsdp: str | None = opt(
        None,
        "with several processes: shard weights by FSDP2; full_shard (gathered again in backward) or shard_grad_op "
        "(kept), with or without offload",
        group="train",
    )
    dataloader_num_workers: int = opt(0, "processes that assemble batches", group="train")

    logging_steps: int = opt(5, "optimizer steps between log lines", group="eval")
    per_device_eval_batch_size: int = opt(1, "rows per device in evaluation, where memory is not planned", group="eval")
    eval_strategy: str | None = opt(
        None,
        "when to evaluate; default: by steps where there is held-out data",
        group="eval",
        choices=["no", "steps", "epoch"],
    )
    eval_steps: int = opt(50, "optimizer steps between evaluations", group="eval")
    early_stopping_patience: int | None = opt(
        None, "stop after this many evaluations in a row without a lower held-out loss", group="eval"
    )
    eval_on_start: bool = opt(False, "evaluate once before training", group="eval")
    sample_prompts: int = opt(
        2, "held-out prompts answered at the start by the base, at each evaluation by the tuned model", group="eval"
    )
    log_expert_load: bool = opt(True, "log how many tokens each expert gets, and the drift from the base", group="eval")
    save_strategy: str = opt("steps", "when to save a checkpoint", group="eval", choices=["no", "steps", "epoch"])
    save_steps: int = opt(50, "optimizer steps between checkpoints", group="eval")
    save_total_limit: int | None = opt(None, "checkpoints kept; the best one is never deleted", group="eval")
    resume: str | None = opt(
        None,
        "go on in the same run folder: auto (the newest run of these options in --output_dir; none: start one), a run "
        "folder, or its checkpoint-N",
        group="eval",
    )
    resume_from_checkpoint: str | None = opt(
        None, "go on from a checkpoint-N folder in a new run folder, also with other options", group="eval"
    )

    output_dir: str = opt("output", "parent of the run's folder", group="track")
    add_version: bool = opt(True, "make output_dir/vN-<time>/; false: write into output_dir itself", group="track")
    report_to: list[str] = opt(
        ["none"], "trackers besides metrics.jsonl and report.html: swanlab, trackio, tensorboard, wandb", group="track"
    )
    run_name: str | None = opt(None, "name for people and trackers; default: the folder's", group="track")
    run_tags: list[str] = opt([], "tags of the run", group="track")
    swanlab_project: str = opt("ossia", "project, for every tracker", group="track")
    swanlab_workspace: str | None = opt(None, "SwanLab workspace (cloud)", group="track")
    swanlab_exp_name: str | None = opt(None, "same as --run_name, for SwanLab alone", group="track")
    swanlab_mode: str | None = opt(
        None,
        "default: cloud when SWANLAB_API_KEY is set, else local",
        group="track",
        choices=["local", "cloud", "offline"],
    )

    use_liger_kernel: bool = opt(False, "fused loss and norms", group="compat")
    bf16: bool | None = opt(None, "same as --torch_dtype bfloat16", group="compat")
    fp16: bool | None = opt(None, "refused: gpt-oss overflows in fp16", group="compat")

    dry_run: bool = opt(False, "check everything, print the resolved options, train nothing")

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = str(self.gradient_checkpointing).lower()
        super().__post_init__()

    def validate(self) -> None:
        self.validate_data()
        self.validate_adapters()
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "--memory_budget")
        if self.max_time is not None:
            parse_seconds(self.max_time, "--max_time")
        for name in (
            "lora_rank",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.sample_prompts < 0:
            raise UsageError(f"--sample_prompts is {self.sample_prompts}; it must be 0 or more")
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise UsageError(f"--dataset_num_proc is {self.dataset_num_proc}; it must be at least 1")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UsageError(f"--early_stopping_patience is {self.early_stopping_patience}; it must be at least 1")
            if not (self.val_dataset or self.split_dataset_ratio) or self.eval_strategy == "no":
                raise UsageError(
                    "--early_stopping_patience goes by held-out loss: give --val_dataset or "
                    "--split_dataset_ratio, and not --eval_strategy no"
                )
        if self.packing_length is not None and not self.packing:
            raise UsageError("--packing_length goes with --packing true")
        if self.packing_length is not None and self.packing_length < self.max_length:
            raise UsageError(
                f"--packing_length {self.packing_length} is shorter than --max_length {self.max_length}; "
                "a row of that length would fit nowhere"
            )
        if not 0 <= self.split_dataset_ratio < 1:
            raise UsageError(f"--split_dataset_ratio is {self.split_dataset_ratio}; it must be in [0, 1)")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UsageError(f"--label_smoothing_factor is {self.label_smoothing_factor}; it must be in [0, 1)")
        if self.max_steps == 0:
            raise UsageError("--max_steps 0 trains nothing; give 1 or more, or -1 for --num_train_epochs to decide")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"--warmup_ratio is {self.warmup_ratio}; it must be in [0, 1)")
        if self.warmup_steps < 0:
            raise UsageError(f"--warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UsageError("nothing to train: give --num_train_epochs or --max_steps above 0")
        if self.learning_rate <= 0:
            raise UsageError(f"--learning_rate is {self.learning_rate}; it must be above 0")
        self._validate_sharding()
        if self.resume and self.resume_from_checkpoint:
            raise UsageError("--resume goes on in the same run, --resume_from_checkpoint in a new one: give one")
        if self.fp16:
            raise UsageError("--fp16: gpt-oss overflows in fp16; use --torch_dtype bfloat16")
        if self.bf16:
            self.torch_dtype, self.bf16 = "bfloat16", None
        experts = self.target_experts
        if experts not in ("auto", "all", "none") and not all(part.strip().isdigit() for part in experts.split(",")):
            raise UsageError(f"--target_experts got {experts!r}; it takes all, none or layer numbers such as 7,15,23")

    def notes(self, processes: int = 1) -> list[str]:
        """One line for each flag given that means something else here than where it comes from."""
        notes = []
        if self.use_liger_kernel:
            notes.append(
                "--use_liger_kernel: not needed, the loss is chunked here and logits are never whole in memory"
            )
        for name in ("deepspeed", "fsdp"):
            if getattr(self, name) and processes == 1:
                notes.append(f"--{name} {getattr(self, name)}: one process has nothing to shard; going on without it")
        return notes

    def _validate_sharding(self) -> None:
        if self.deepspeed and self.fsdp:
            raise UsageError("--deepspeed and --fsdp both shard; give one of them")
        if self.deepspeed_force and not self.deepspeed:
            raise UsageError("--deepspeed_force keeps DeepSpeed: give --deepspeed too")
        if self.deepspeed and self.deepspeed not in ZERO and not self.deepspeed.endswith(".json"):
            raise UsageError(f"--deepspeed got {self.deepspeed!r}; it takes {', '.join(ZERO)} or a .json file")
        unknown = set((self.fsdp or "").split()) - set(FSDP)
        if unknown:
            raise UsageError(f"--fsdp got {sorted(unknown)[0]!r}; it takes {', '.join(FSDP)}")
