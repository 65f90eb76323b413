"""Treatment of each field of PEFT's `LoraConfig` in an adapter, whoever wrote it. docs/adapters.md shows this table.

Whatever is not listed is refused: a newer PEFT may mean anything by it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ossia.errors import OssiaError, nearest

MERGE = "merge it with PEFT (merge_and_unload, then save_pretrained) and give that model with --model"
_CONVERT = (
    "save it again with PEFT's save_pretrained and path_initial_model_for_weight_conversion, which makes plain LoRA of "
    f"it, or {MERGE}"
)
_CONVERT_THERE = (
    "save it from the process that trained it, by PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion, which makes plain LoRA of it; these files do not tell what was taken "
    "from the base"
)


class Rule(NamedTuple):
    """Treatment of one field.

    `says`: its effect, or why values outside `allowed` are refused; `instead`: what to do then. Without `allowed` any
    value is taken."""

    says: str
    allowed: tuple[Any, ...] | None = None
    instead: str = ""


_OFF = (False, None)
_NONE: tuple[Any, ...] = (None, [], {})
FIELDS = {
    "peft_type": Rule("only LoRA is read", ("LORA",), "train LoRA, or, where PEFT can merge that type, " + MERGE),
    # Taken: they decide where the adapter is and what it computes.
    "r": Rule("rank"),
    "lora_alpha": Rule("scale: alpha / r"),
    "use_rslora": Rule("scale: alpha / √r"),
    "rank_pattern": Rule("ranks of single modules"),
    "alpha_pattern": Rule("alphas of single modules"),
    "target_modules": Rule("linear layers but the head: endings of names, whole names, or an expression"),
    "exclude_modules": Rule("linear layers that are left out"),
    "layers_to_transform": Rule("layers whose linear layers are adapted"),
    "layers_pattern": Rule("where layers_to_transform finds the number"),
    "target_parameters": Rule("experts: both projections or one, of all layers or some"),
    # No part in what a finished adapter computes.
    "init_lora_weights": Rule(
        "how the adapter began; it is plain LoRA where that left the base as it was",
        (True, False, None, "gaussian", "eva", "orthogonal"),
        "it is not known what that start leaves of the base",
    ),
    "lora_dropout": Rule("--lora_dropout holds when training goes on"),
    "inference_mode": Rule("set by what is done"),
    "base_model_name_or_path": Rule("the base where --model is not given"),
    "revision": Rule("a version of a hub's base: give --model with that version's folder"),
    "task_type": Rule("not needed"),
    "auto_mapping": Rule("not needed"),
    "peft_version": Rule("not needed"),
    "runtime_config": Rule("not needed"),
    "megatron_core": Rule("not needed"),
    "eva_config": Rule("not needed after the start"),
    "corda_config": Rule("not needed after the start"),
    "loftq_config": Rule("not needed after the start"),
    "lora_ga_config": Rule("not needed after the start"),
    "qalora_group_size": Rule("not needed without use_qalora"),
    "ensure_weight_tying": Rule("not needed without adapters on head or embeddings"),
    # Refused where they are set.
    "bias": Rule("biases of the base were trained, and PEFT changes them in the base itself", ("none", None), MERGE),
    "modules_to_save": Rule("whole modules were trained beside the adapter", _NONE, MERGE),
    "trainable_token_indices": Rule("rows of the embeddings were trained", _NONE, MERGE),
    "use_dora": Rule("DoRA scales outputs by trained magnitudes, which are not computed here", _OFF, MERGE),
    "lora_bias": Rule("lora_B has trained biases, which are not computed here", _OFF, MERGE),
    "kasa_config": Rule("KaSA takes components out of the base's weights", _NONE, MERGE),
    "use_bdlora": Rule("factors of BD-LoRA are block-diagonal", _OFF, MERGE),
    "monteclora_config": Rule("MonteCLoRA draws its factors at random", _NONE, MERGE),
    "layer_replication": Rule("layers of the base are used several times", _NONE, MERGE),
    "use_qalora": Rule("QALoRA sums groups of inputs, which is not computed here", _OFF, "train plain LoRA"),
    "alora_invocation_tokens": Rule(
        "the adapter is to be active after these tokens alone, which is not computed here", (None,), "run it with PEFT"
    ),
    "arrow_config": Rule("Arrow mixes other adapters token by token", _NONE, "give one of those adapters"),
    "velora_config": Rule("VeLoRA needs a backward pass of its own, which is not implemented here", _NONE, MERGE),
    "megatron_config": Rule("Megatron's layers are not these", _NONE, "save it from a model of transformers"),
    "fan_in_fan_out": Rule(
        "no linear layer here has its weight transposed", _OFF, "set it to false in that file if the base has nn.Linear"
    ),
}
"""Rules by the name of the field."""

_MOVED = "this start moves a part of the base's weights into the adapter, so it belongs to another base"
STARTS = {
    "pissa": Rule(_MOVED, (), _CONVERT),
    "pissa_niter": Rule(f"{_MOVED}, and the part is drawn at random", (), _CONVERT_THERE),
    "olora": Rule(_MOVED, (), _CONVERT),
    "corda": Rule(_MOVED, (), _CONVERT_THERE),
    "lora_ga": Rule(_MOVED, (), _CONVERT_THERE),
    "loftq": Rule("the adapter belongs to a quantized copy of the base", (), MERGE),
    "mica": Rule(
        "MiCA trains lora_A alone",
        (),
        "set it to true in that file: the adapter computes the same, and training goes on with both factors",
    ),
}
"""Values of `init_lora_weights` that are refused, by how they begin."""

_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


def check_fields(values: dict[str, Any], file: Path) -> None:
    """OssiaError names the first field of an `adapter_config.json` that asks for what is not done here."""
    for name in sorted(values, key=lambda name: name != "peft_type"):
        value, rule = values[name], FIELDS.get(name)
        if rule is None:
            if value in _EMPTY:
                continue
            by = f"; it was written by PEFT {values['peft_version']}" if values.get("peft_version") else ""
            raise OssiaError(
                f"{file}: {name} is {shown(value)}, and that field of LoRA is not known here"
                f"{nearest(name, list(FIELDS))}{by}; take it out if the adapter computes the same without it"
            )
        if isinstance(value, str) and name == "init_lora_weights":
            value = value.lower()
            start = max((start for start in STARTS if value.startswith(start)), key=len, default=None)
            rule = STARTS[start] if start else rule
        if rule.allowed is not None and not any(value == fine and type(value) is type(fine) for fine in rule.allowed):
            raise OssiaError(f"{file}: {name} is {shown(values[name])}: {rule.says}; {rule.instead}")
    if "peft_type" not in values:
        raise OssiaError(f"{file}: no peft_type in it, so it is no adapter's configuration; copy the file again")


def shown(value: Any) -> str:
    """A value as the file has it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
