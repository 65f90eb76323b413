"""Error of a training step's logits and LoRA gradients against float32, beside transformers' own bfloat16 and Unsloth.

python benchmarks/train/fidelity.py --model FOLDER --out FILE.json [--unsloth]

FOLDER holds few layers at true size (checkpoint.py --layers 2). The reference is transformers with stock PEFT in
float32 on dequantized weights; its routing is forced on the others, so that a near tie of two experts decides nothing
(not on Unsloth, whose routers are out of reach: its figure holds what near ties do too).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.bench.run import measured_on

Grads = dict[str, Tensor]


def compare(
    model: Path, device: str, tokens: tuple[int, int], experts: str = "all", std: float = 0.02
) -> dict[str, Any]:
    """Relative errors ‖x − exact‖ / ‖exact‖ of ours and of transformers in bfloat16: logits, loss, all gradients.

    Args:
        model: an MXFP4 checkpoint.
        device: `cuda`.
        tokens: rows and their length.
        experts: `all` or `none`: whether experts are adapted too.
        std: of the adapters' B.
    """
    torch.manual_seed(0)
    ids = torch.randint(0, 250, tokens, device=device)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder)
        make_adapter(model, adapter, experts, std)
        routes: list[Tensor] = []
        exact = transformers_step(model, adapter, ids, torch.float32, routes, forced=False)
        ours = ossia_step(model, adapter, ids, list(routes))
        theirs = transformers_step(model, adapter, ids, torch.bfloat16, list(routes), forced=True)
    return {"ossia": errors(ours, exact), "transformers bfloat16": errors(theirs, exact)}


def make_adapter(model: Path, folder: Path, experts: str, std: float) -> None:
    from ossia.adapters.inject import add_lora
    from ossia.adapters.io import save_adapter
    from ossia.model.load import load_model

    adapted = add_lora(load_model(model, device="cpu", experts="mxfp4"), target_experts=experts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, std, generator=generator)
    save_adapter(adapted, folder, str(model))


def errors(got: tuple[Tensor, float, Grads], exact: tuple[Tensor, float, Grads]) -> dict[str, float]:
    names = sorted(exact[2])
    assert names == sorted(got[2]), "gradients of other tensors"
    mine, want = (torch.cat([grads[name].double().flatten().cpu() for name in names]) for grads in (got[2], exact[2]))
    worst = max(relative(got[2][name], exact[2][name]) for name in names)
    return {
        "logits": relative(got[0], exact[0]),
        "loss": abs(got[1] - exact[1]) / abs(exact[1]),
        "gradients": relative(mine, want),
        "worst_gradient": worst,
        "tensors": len(names),
    }


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def ossia_step(model: Path, adapter: Path, ids: Tensor, routes: list[Tensor]) -> tuple[Tensor, float, Grads]:
    from ossia.adapters.io import adapter_tensors, load_adapter
    from ossia.model.gpt_oss import Router
    from ossia.model.load import load_model

    base = load_model(model, torch_dtype="bfloat16", device=ids.device.type)
    network = load_adapter(base, adapter, trainable=True)

    def route(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = routes.pop(0)
        return index, F.linear(hidden.float(), self.weight, self.bias).gather(1, index).softmax(-1), hidden

    weights = torch.ones_like(ids, dtype=torch.float32)
    with mock.patch.object(Router, "forward", route):
        with torch.no_grad():
            kept, logits = list(routes), network(ids, use_cache=False).logits
        routes[:] = kept
        loss = network(input_ids=ids, labels=ids, loss_weights=weights).loss / (ids.numel() - len(ids))
    loss.backward()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    result = logits.cpu(), loss.item(), adapter_tensors(network)
    free(network)
    return result


def transformers_step(
    model: Path, adapter: Path, ids: Tensor, dtype: torch.dtype, routes: list[Tensor], *, forced: bool
) -> tuple[Tensor, float, Grads]:
    """`routes` is filled, or followed where forced."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Mxfp4Config

    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        device_map={"": str(ids.device)},
    )
    base.config.output_router_logits = False
    base.to(dtype)  # dequantized experts come as bfloat16, whatever was asked for
    if dtype == torch.float32:
        base.set_experts_implementation("eager")
    network = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with routing(base, routes, forced), torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    named = network.named_parameters()
    grads = {name.replace(".default", ""): p.grad.float().cpu() for name, p in named if p.grad is not None}
    result = logits.detach().cpu(), loss.item(), grads
    free(network, base)
    return result


@contextlib.contextmanager
def routing(model: Any, routes: list[Tensor], forced: bool) -> Iterator[None]:
    """Takes down which experts transformers' routers choose, or makes them choose those."""
    kind = next(type(module) for name, module in model.named_modules() if name.endswith("mlp.router"))
    original = kind.forward

    def route(self: Any, hidden: Tensor) -> Any:
        logits, scores, index = original(self, hidden)
        if not forced:
            routes.append(index)
            return logits, scores, index
        index = routes.pop(0)
        return logits, logits.gather(1, index).softmax(-1).to(scores.dtype), index

    with mock.patch.object(kind, "forward", route):
        yield


def free(*models: Any) -> None:
    for model in models:
        model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def unsloth_step(model: str, adapter: str, out: str) -> None:
    """In a process of its own, since Unsloth replaces parts of transformers."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    import unsloth
    from safetensors.torch import load_file

    ids = torch.load(f"{out}.ids").cuda()
    load = unsloth.FastLanguageModel.from_pretrained
    base, _ = load(model, max_seq_length=ids.shape[1], load_in_4bit=False, dtype=torch.bfloat16, local_files_only=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    network = unsloth.FastLanguageModel.get_peft_model(
        base, r=8, lora_alpha=32, lora_dropout=0, target_modules=names, use_gradient_checkpointing="unsloth"
    )
    values = load_file(f"{adapter}/adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in network.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.data.copy_(values[name])
    network.train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    torch.save((loss.item(), {name: p.grad.float().cpu() for name, p in trained.items()}), out)


def unsloth_error(model: Path, tokens: tuple[int, int]) -> dict[str, float]:
    """Error of Unsloth's gradients, adapters on attention alone, beside ours and transformers', routing left free."""
    torch.manual_seed(0)
    ids = torch.randint(0, 250, tokens)
    with tempfile.TemporaryDirectory() as folder:
        adapter, out = Path(folder) / "adapter", Path(folder) / "grads"
        make_adapter(model, adapter, "none", 0.02)
        torch.save(ids, f"{out}.ids")
        command = [sys.executable, __file__, "--unsloth_step", str(model), str(adapter), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            return {"failed": done.stderr[-800:]}  # type: ignore[dict-item]
        loss, grads = torch.load(out)
        exact = transformers_step(model, adapter, ids.cuda(), torch.float32, [], forced=False)
    nothing = exact[0]
    result = errors((nothing, loss, grads), exact)
    return {key: value for key, value in result.items() if key != "logits"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--unsloth", action="store_true")
    parser.add_argument("--unsloth_step", nargs=3)
    args = parser.parse_args()
    if args.unsloth_step:
        return unsloth_step(*args.unsloth_step)
    tokens = (2, 512)
    result: dict[str, Any] = {
        "environment": measured_on(torch.device("cuda")),
        "tokens": tokens,
        "attention and experts": compare(args.model, "cuda", tokens),
        "attention": compare(args.model, "cuda", tokens, "none"),
    }
    if args.unsloth:
        result["attention"]["unsloth"] = unsloth_error(args.model, tokens)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
