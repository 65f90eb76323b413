"""`--backend vllm`: the command that serves an exported model with vLLM."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil

from ossia.config import ServeConfig
from ossia.console import say, tool
from ossia.errors import OssiaError, UsageError
from ossia.model.folder import read_json, resolve_model

CARRIED = {"config", "debug", "backend", "dry_run", "model", "adapters", "host", "port", "api_key", "torch_dtype"}
CARRIED |= {"max_batch_size", "max_length"}
"""Options that reach vLLM, or are settled before it starts."""


def run_vllm(config: ServeConfig, key: str | None) -> None:
    """Print the command; unless `--dry_run`, become it.

    Raises:
        UsageError: an adapter, which vLLM cannot put on the experts, or an option that it has no flag for.
        OssiaError: vLLM is not installed.
    """
    if config.adapters:
        raise UsageError(
            "--backend vllm serves exported models: vLLM puts no adapter on the experts; first "
            f"{tool('ossia')} export --adapters {config.adapters[0]} --merge_lora true --format mxfp4 "
            "--output_dir DIR, then --model DIR"
        )
    for field in dataclasses.fields(config):
        if field.name not in CARRIED and getattr(config, field.name) != field.default:
            raise UsageError(f"--{field.name} is not for --backend vllm; leave it out")
    command = vllm_command(config)
    say(shlex.join(command))
    if config.dry_run:
        return
    program = shutil.which(command[0])
    if program is None:
        raise OssiaError("vllm is not installed; pip install vllm (it needs a GPU), in an environment of its own")
    # By the environment: arguments are seen by every user of the machine.
    environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
    os.execve(program, command, environment)


def vllm_command(config: ServeConfig) -> list[str]:
    """`vllm serve` with the flags that fit the model and the options."""
    assert config.model is not None
    folder = resolve_model(config.model)
    command = ["vllm", "serve", str(folder), "--served-model-name", config.base_name(folder)]
    command += ["--host", config.host, "--port", str(config.port)]
    if config.max_batch_size != ServeConfig.max_batch_size:
        command += ["--max-num-seqs", str(config.max_batch_size)]
    if config.max_length is not None:
        command += ["--max-model-len", str(config.max_length)]
    if config.torch_dtype != "auto":
        command += ["--dtype", config.torch_dtype]
    if read_json(folder / "config.json").get("model_type") == "gpt_oss":
        command += ["--reasoning-parser", "openai_gptoss", "--tool-call-parser", "openai", "--enable-auto-tool-choice"]
    return command
