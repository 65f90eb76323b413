"""`--deepspeed` and `--fsdp`: transformers' arguments for them, and adapters made whole again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ossia.config import SftConfig
from ossia.config.sft import ZERO
from ossia.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def prefer_data_parallel(config: SftConfig, model_type: str) -> str:
    """Leave DeepSpeed out where it only costs time; what to say then, or nothing.

    gpt-oss's frozen weights are no parameters that ZeRO knows: each card holds all of them, and a plan that fits holds
    the adapters' optimizer too. Four H100 did 3.6 times as many steps data-parallel as with zero3, in the same memory.
    """
    if config.deepspeed not in ZERO or config.deepspeed_force or model_type != "gpt_oss":
        return ""
    asked, config.deepspeed = config.deepspeed, None
    return (
        f"--deepspeed {asked}: left out, frozen weights are not its to shard and everything fits on each card; "
        "processes train data-parallel, which is faster (--deepspeed_force true keeps DeepSpeed)"
    )


def check_sharding(config: SftConfig, model_type: str) -> None:
    """UsageError where several processes cannot shard as asked."""
    if config.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"--deepspeed {config.deepspeed}: the package deepspeed is not installed (pip install deepspeed); without "
            "the flag processes train data-parallel"
        )
    if config.fsdp and model_type == "gpt_oss":
        raise UsageError(
            f"--fsdp {config.fsdp}: gpt-oss's loss reads the output layer outside its forward, for which FSDP2 does "
            "not gather it; leave the flag out (data-parallel), or give --deepspeed zero3"
        )
    if config.fsdp and _on_cpu(config.device):
        raise UsageError(
            f"--fsdp {config.fsdp}: accelerate shards by FSDP on GPUs only; on a CPU leave the flag out "
            "(data-parallel), or give --deepspeed zero3"
        )
    sharding_arguments(config)


def sharding_arguments(config: SftConfig) -> dict[str, Any]:
    """`deepspeed`, or `fsdp` and `fsdp_config`, of TrainingArguments."""
    if config.deepspeed:
        named = config.deepspeed.endswith(".json")
        return {"deepspeed": _options_in(config.deepspeed) if named else _zero(int(config.deepspeed[-1]))}
    if config.fsdp:
        words = config.fsdp.split()
        options = {
            "version": 2,
            "reshard_after_forward": "shard_grad_op" not in words,
            "cpu_offload": "offload" in words,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        return {"fsdp": True, "fsdp_config": options}
    return {}


def _on_cpu(device: str) -> bool:
    from ossia.model.load import pick_device

    return pick_device(device).type == "cpu"


def lay_out(model: nn.Module) -> None:
    """Before weights are sharded: DeepSpeed and FSDP take them in one piece."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, ZeRO-3's trainable weights are whole on every process."""
    sharded = [parameter for parameter in model.parameters() if parameter.requires_grad and hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def _zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def _options_in(path: str) -> dict[str, Any]:
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--deepspeed {path}: not a JSON file that can be read ({error})") from None
    if not isinstance(options, dict):
        raise UsageError(f"--deepspeed {path}: a JSON object is needed")
    if "scheduler" in options:
        raise UsageError(
            f"--deepspeed {path}: take out its entry 'scheduler', whose first step has a rate of 0; learning rates "
            "come from --lr_scheduler_type and --warmup_ratio"
        )
    return options
