"""Figures that are derived beside training and join the Trainer's logs before anyone reads them, and sample answers."""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ossia.console import say
from ossia.data.collate import on_device
from ossia.data.passes import Passes
from ossia.data.store import TokenRow, TokenRows
from ossia.model.gpt_oss import ExpertLoad, Router
from ossia.template.base import Template
from ossia.template.history import readable
from ossia.track import Trackers
from ossia.track.files import write_aside
from ossia.track.report import EXPERTS, SAMPLES
from ossia.train.trainer import sums_of

_PROBE_ROWS, _PROBE_TOKENS = 8, 8_192
_LONGEST_PROMPT = 1024
_ANSWER_TOKENS = 96
_USER = re.compile(r"<\|start\|>user<\|message\|>(.*?)<\|end\|>", re.DOTALL)
_LAYER = re.compile(r"\.layers\.(\d+)\.(.*)")


class RateCallback(TrainerCallback):
    """The share of the card's peak rate, from the work of a token and the FLOP/s of all devices together."""

    def __init__(self, flops_per_token: float, peak_flops: float) -> None:
        self.rate = flops_per_token / peak_flops

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "tokens_per_second" in logs:
            logs["peak_rate_share"] = round(logs["tokens_per_second"] * self.rate, 4)


class GradientCallback(TrainerCallback):
    """Gradient norms of attention's and experts' adapters, in the first, middle and last third of the layers.

    Looked at in steps that are logged only; nothing where gradients are spread over processes.
    """

    def __init__(self) -> None:
        self._groups: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if _will_log(args, state, step=state.global_step + 1):
            self._groups = gradient_groups(model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "grad_norm" in logs and self._groups:
            norms = {name: float(square) ** 0.5 for name, square in self._groups.items()}
            # They were taken after clipping, which keeps their shares.
            scale = logs["grad_norm"] / max(sum(norm**2 for norm in norms.values()) ** 0.5, 1e-30)
            logs |= {f"grad_norm/{name}": norm * scale for name, norm in norms.items()}
            self._groups = {}


def gradient_groups(model: nn.Module) -> dict[str, Tensor]:
    """Squared norms, on the device, by `attention_early` … `experts_late`; empty where a gradient is not at hand."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    layers = 1 + max((int(m[1]) for name, _ in model.named_parameters() if (m := _LAYER.search(name))), default=0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if type(parameter.grad) is not Tensor:
            return {}
        if match := _LAYER.search(name):
            part = "attention" if "attn" in match[2] else "experts" if "experts" in match[2] else "mlp"
            third = ("early", "middle", "late")[3 * int(match[1]) // layers]
            found[f"{part}_{third}"].append(parameter.grad)
        else:
            found["other"].append(parameter.grad)
    return {name: torch.stack(torch._foreach_norm(grads)).square().sum() for name, grads in sorted(found.items())}


class ExpertCallback(TrainerCallback):
    """Load of each expert, and its drift from the base on the same few rows.

    In logged steps routers count what they choose; at the start, at evaluations and at the end a few rows are run
    through the model, once without adapters, and written to `experts.json` for the report.
    """

    def __init__(self, run: Path, model: nn.Module, rows: TokenRows, passes: Passes) -> None:
        self.file = run / EXPERTS
        self.load = ExpertLoad(model)
        self.batches = _probe(rows, passes)
        self.base_LE: Tensor | None = None
        self._step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with _stops_no_run("drift of experts", self.batches), model.disable_adapter():
                self.base_LE = self._measure(model, args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.load.counting = _will_log(args, state, step=state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.load.counting = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        logs = {} if logs is None else logs
        if "loss" in logs:
            load_LE = self.load.take()
            if load_LE.any():
                logs["expert_load/busiest"] = round(float(load_LE.amax(1).mean()), 4)
                logs["expert_load/idle_share"] = round(float((load_LE == 0).float().mean()), 4)
        elif "eval_loss" in logs or ("train_loss" in logs and _at_end(state)):
            self._compare(args, state, model, logs)

    def _compare(self, args: TrainingArguments, state: TrainerState, model: Any, logs: dict[str, float]) -> None:
        if self.base_LE is None or not self.batches or self._step == state.global_step:
            return
        self._step = state.global_step
        with _stops_no_run("drift of experts", self.batches):
            load_LE = self._measure(model, args)
            # Half the sum of differences of shares: the part of a layer's choices that went elsewhere.
            logs["expert_load/drift"] = round(float((load_LE - self.base_LE).abs().mean() / 2), 5)
            self._write(state.global_step, load_LE, self.base_LE)

    def _write(self, step: int, load_LE: Tensor, base_LE: Tensor) -> None:
        found: dict[str, Any] = {"step": step, "layers": [*range(len(load_LE))]}
        for name, part_LE in (("load", load_LE), ("base", base_LE)):
            found[name] = [[round(value, 4) for value in row] for row in part_LE.tolist()]
        write_aside(self.file, json.dumps(found))

    def _measure(self, model: Any, args: TrainingArguments) -> Tensor:
        before = self.load.counts_LEK.clone()
        self.load.counts_LEK.zero_()
        try:
            self.load.counting = True
            with _quietly(model, args):
                for batch in self.batches:
                    sums_of(model, on_device(batch, args.device))
        finally:
            self.load.counting = False
        load_LE = self.load.take()
        self.load.counts_LEK.copy_(before)
        return load_LE


class SampleCallback(TrainerCallback):
    """Greedy answers to the first held-out prompts: the base's at the start, the tuned model's at each evaluation.

    They go to `samples.jsonl`, to the trackers, and to whatever shows the last one. One that fails ends the samples,
    not the run.
    """

    def __init__(
        self, run: Path, rows: TokenRows, count: int, template: Template, trackers: Trackers, shown: Any
    ) -> None:
        self.file = run / SAMPLES
        self.template = template
        self.trackers, self.shown = trackers, shown
        self.prompts = [*_prompts(rows, count, template)]
        self._step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            with model.disable_adapter():
                self._sample(args, state, model, base=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self._sample(args, state, model, base=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if _at_end(state):
            self._sample(args, state, model, base=False)

    def _sample(self, args: TrainingArguments, state: TrainerState, model: Any, base: bool) -> None:
        if not state.is_world_process_zero or (state.global_step == self._step and not base):
            return
        self._step = state.global_step
        with _stops_no_run("sample answers", self.prompts), _quietly(model, args):
            for number, (ids, prompt, label) in enumerate(self.prompts, start=1):
                self._keep(number, state.global_step, base, prompt, label, self._answer(model, ids, args))

    def _answer(self, model: Any, ids: list[int], args: TrainingArguments) -> list[int]:
        prompt = torch.tensor([ids], device=args.device)
        config = GenerationConfig(
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=self.template.stop_ids,
            pad_token_id=self.template.pad_id,
        )
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config, use_cache=True
        )
        answer: list[int] = output[0, len(ids) :].tolist()
        return answer

    def _keep(self, number: int, step: int, base: bool, prompt: str, label: str, ids: list[int]) -> None:
        reply = self.template.parse(ids)
        row = {"step": step, "base": base, "prompt": prompt, "label": label}
        said = readable(reply.content, reply.tool_calls)
        row |= {"reasoning": reply.thinking, "answer": said, "finished": reply.finished}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        answer = f"({reply.thinking}) {said}" if reply.thinking else said
        self.trackers.text(f"sample/{number}", f"{prompt}\n\n{answer}", step)
        self.shown.sample = (prompt, answer)


def _prompts(rows: TokenRows, count: int, template: Template) -> Iterator[tuple[list[int], str, str]]:
    """(tokens up to the first that is trained, the question, the expected answer) of the first rows."""
    for index in range(len(rows)):
        if not count:
            return
        row: TokenRow = rows[index]
        trained = row.loss_weights.nonzero()[0]
        if not 0 < trained[0] <= _LONGEST_PROMPT:
            continue
        count -= 1
        ids = row.input_ids[: trained[0]].tolist()
        asked = _USER.findall(template.tokenizer.decode(ids))
        expected = template.parse(row.labels[trained].tolist())
        yield (
            ids,
            asked[-1] if asked else template.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            readable(expected.content, expected.tool_calls),
        )


def _probe(rows: Sequence[TokenRow], passes: Passes) -> list[dict[str, Any]]:
    """Batches of the first rows, as many as a look at the experts may cost."""
    chosen: list[TokenRow] = []
    room = _PROBE_TOKENS
    for row in rows:
        room -= len(row)
        if len(chosen) == _PROBE_ROWS or (room < 0 and chosen):
            break
        chosen.append(row)
    return passes.batches(chosen)


@contextlib.contextmanager
def _stops_no_run(what: str, needed: list[Any]) -> Iterator[None]:
    """An error inside is one line, and the last of `what`: all that it needs is forgotten."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  a look at the run must not stop it
        say(f"no more {what}: {' '.join(str(error).split())[:200] or type(error).__name__}")
        needed.clear()


@contextlib.contextmanager
def _quietly(model: Any, args: TrainingArguments) -> Iterator[None]:
    """The model in evaluation mode, without gradients, in the types of training."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            yield
    finally:
        model.train(was_training)


def _will_log(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)


def _at_end(state: TrainerState) -> bool:
    """Whether training is over, and not only stopped: a run that goes on tells nothing twice."""
    return state.global_step >= state.max_steps


def has_experts(model: nn.Module) -> bool:
    """Whether there are routers of ours to look at."""
    return isinstance(model, PeftModel) and any(isinstance(module, Router) for module in model.modules())
