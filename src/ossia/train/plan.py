"""How a gpt-oss run uses a GPU's memory: chosen before the model loads, from sizes alone. Nothing here needs a GPU.

Bytes throughout. T tokens of a batch, K experts a token, E experts, H hidden, I intermediate, R columns of a tail.

The largest moment of a step is either the loss (everything kept lies in memory, and a chunk of logits) or the backward
of one layer (what it and the layers below keep, its own intermediates, the gradients of the layers above). Both follow
from the shapes; `peak` is their maximum, `parts` what it is made of. Measured peaks lie within a few per cent
(docs/train.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ossia.config import SftConfig
from ossia.config.base import parse_bytes
from ossia.errors import OssiaError

GB = 1e9
PLANNED = ("auto", "flash")
"""Values of `--attn_impl` whose memory is planned."""

KINDS = ("none", "experts", "layer")
"""What a layer's backward makes again: nothing; its experts' first projection; the layer, from its input."""

_LIBRARIES = 80 * 2**20
_LOADING = 2_300_000_000
"""Host memory beside what rests there: Python, its libraries, buffers of the loader (measured 2.2 to 2.4 GB)."""


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on.

    Args:
        tokens: of the largest pass, padding included.
        eval_tokens: of the largest pass of held-out rows.
        rank: of the experts' adapters; 0: they have none.
        adapters: parameters that train, all layers together.
        accumulates: whether gradients outlive a forward pass (steps of several).
        parallel: whether several processes train, each with a second copy of its gradients to exchange.
        quantized: experts in MXFP4, else in bfloat16.
        fused: whether experts take the fused path; without it plans are rough, on the safe side.
    """

    layers: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tokens: int
    rank: int
    adapters: int
    eval_tokens: int = 0
    accumulates: bool = False
    parallel: bool = False
    quantized: bool = True
    fused: bool = True

    @classmethod
    def of(cls, config: dict[str, Any], **more: Any) -> Sizes:
        """From a gpt-oss config.json."""
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            experts=config["num_local_experts"],
            top_k=config.get("num_experts_per_tok", config.get("experts_per_token", 4)),
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_size=config["head_dim"],
            vocabulary=config["vocab_size"],
            **more,
        )

    @property
    def tail(self) -> int:
        return -(-self.rank // 16) * 16

    @property
    def table(self) -> int:
        """The embedding, or the head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def expert_weights(self) -> int:
        """Of one layer."""
        values = 3 * self.experts * self.hidden * self.inner
        return values * 17 // 32 if self.quantized else 2 * values

    @property
    def layer_rest(self) -> int:
        """Of one layer: attention, norms, biases, router."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        biases = self.experts * (2 * self.inner + self.hidden) + self.head_size * (self.heads + 2 * self.kv_heads)
        return 2 * (attention + biases + 4 * self.hidden) + 4 * self.experts * (self.hidden + 1)

    @property
    def frozen(self) -> int:
        """All that an adapter leaves as it is."""
        return 2 * self.table + self.layers * (self.layer_rest + self.expert_weights)

    def expanded(self, experts: int) -> tuple[int, int]:
        """Both projections of so many experts (0: all) in bfloat16 with their tails: gate_up, down."""
        count = min(experts or self.experts, self.experts)
        inputs, inner = self.hidden + self.tail, self.inner + self.tail
        return 2 * count * (2 * self.inner + self.tail) * inputs, 2 * count * inputs * inner

    @property
    def kept_input(self) -> int:
        """A layer's input."""
        return 2 * self.hidden * self.tokens

    @property
    def kept_gate_up(self) -> int:
        """The experts' first projection, with the adapter's thin product; or all that PyTorch's operations keep."""
        if not self.fused:
            return self.top_k * self.tokens * (12 * self.hidden + 38 * self.inner)
        return self.top_k * self.tokens * (4 * self.inner + 4 * self.tail)

    @property
    def kept_rest(self) -> int:
        """All else that a layer keeps."""
        heads = 4 * self.head_size * (self.heads + self.kv_heads) + 4 * self.heads
        return self.tokens * (3 * 2 * self.hidden + heads + 28 * self.top_k)


class Parts(NamedTuple):
    """Bytes on the GPU at the largest moment of a step.

    weights: frozen, as they are on disk.
    expanded: experts in bfloat16, for good or for the moment.
    adapters: float32.
    gradients: theirs, float32; of several processes with the copy that is exchanged.
    optimizer: AdamW's two moments, float32.
    kept: activations that wait for backward.
    made: activations of the moment itself: a layer made again, its gradients.
    loss: a chunk of logits.
    libraries: cuBLAS workspaces and small tensors that PyTorch's allocator counts.
    """

    weights: int = 0
    expanded: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    made: int = 0
    loss: int = 0
    libraries: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run does with memory.

    Args:
        recompute: for each layer one of `KINDS`.
        experts_at_once: experts expanded to bfloat16 at a time; 0: all of a layer.
        reuse_expanded: where a layer's experts are computed again, their first projection is expanded once for that and
            for its gradient.
        loss_chunk: positions whose logits exist at a time.
        embedding_on_host: the embedding rests in pinned host memory, and the GPU reads the rows it needs.
        inputs_on_host: inputs of layers that are made again wait in pinned host memory.
        host_layers: so many layers' expert weights, from the first, rest in pinned host memory.
        held_layers: so many layers' experts, from the last, are expanded for good.
    """

    sizes: Sizes
    recompute: tuple[str, ...]
    budget: int
    experts_at_once: int = 0
    reuse_expanded: bool = False
    loss_chunk: int = 1024
    embedding_on_host: bool = False
    inputs_on_host: bool = False
    host_layers: int = 0
    held_layers: int = 0

    @property
    def slow(self) -> bool:
        """Whether it works on few experts at a time, or reads them from host memory: far from the others' speed."""
        return bool(self.experts_at_once or self.host_layers)

    def offload(self) -> list[str]:
        """Names of tensors that rest in pinned host memory."""
        names = [
            f"model.layers.{layer}.mlp.experts.{projection}_proj_{half}"
            for layer in range(self.host_layers)
            for projection in ("gate_up", "down")
            for half in ("blocks", "scales")
        ]
        return [*names, *(["model.embed_tokens.weight"] if self.embedding_on_host else [])]

    @property
    def weights(self) -> int:
        """Frozen weights on the GPU, experts that are expanded for good among them."""
        return self._as_stored + self._held

    @property
    def host(self) -> int:
        """Host memory of the run."""
        s = self.sizes
        inputs = s.kept_input * self.recompute.count("layer") if self.inputs_on_host else 0
        return _LOADING + self.embedding_on_host * s.table + self.host_layers * s.expert_weights + inputs

    @property
    def peak(self) -> int:
        """Largest memory of a training step."""
        return sum(self.parts)

    @property
    def parts(self) -> Parts:
        """What the peak is made of."""
        s = self.sizes
        gradients = 4 * s.adapters
        kept = {kind: self._kept(kind) for kind in KINDS}
        working = {(kind, held): self._working(kind, held) for kind in KINDS for held in (False, True)}
        below = sum(kept[kind] for kind in self.recompute)
        logits = min(self.loss_chunk, s.tokens) * s.vocabulary * 2
        moments = [
            Parts(kept=below, made=2 * s.kept_input, loss=logits, gradients=gradients if s.accumulates else 0),
            self._evaluation(),
        ]
        for layer in reversed(range(s.layers)):
            kind = self.recompute[layer]
            share = gradients if s.accumulates else gradients * (s.layers - layer) // s.layers
            made, expanded = working[kind, layer >= s.layers - self.held_layers]
            moments.append(Parts(kept=below, made=made, expanded=expanded, gradients=share))
            below -= kept[kind]
        largest = max(moments, key=sum)
        return Parts(
            weights=self._as_stored,
            expanded=self._held + largest.expanded,
            adapters=4 * s.adapters,
            gradients=largest.gradients + (gradients if s.parallel else 0),
            optimizer=8 * s.adapters,
            kept=largest.kept,
            made=largest.made,
            loss=largest.loss,
            libraries=_LIBRARIES,
        )

    @property
    def _as_stored(self) -> int:
        s = self.sizes
        experts = (s.layers - self.host_layers - self.held_layers) * s.expert_weights
        return s.table * (1 if self.embedding_on_host else 2) + s.layers * s.layer_rest + experts

    @property
    def _held(self) -> int:
        return self.held_layers * sum(self.sizes.expanded(0))

    def _kept(self, kind: str) -> int:
        s = self.sizes
        if kind == "layer":
            return 0 if self.inputs_on_host else s.kept_input
        return s.kept_input + s.kept_rest + (s.kept_gate_up if kind == "none" else 0)

    def _evaluation(self) -> Parts:
        """A layer's forward over held-out rows, of which nothing is kept."""
        s = self.sizes
        rows = 2 * s.top_k * s.eval_tokens * (s.hidden + 2 * s.inner + 2 * s.tail)
        stream = 4 * 2 * s.hidden * s.eval_tokens
        heads = 4 * s.eval_tokens * s.head_size * (s.heads + s.kv_heads)
        experts = Parts(made=rows + stream, expanded=s.expanded(self.experts_at_once)[0])
        return max(experts, Parts(made=heads + stream), key=sum)

    def _working(self, kind: str, held: bool) -> tuple[int, int]:
        """Activations of a layer's own backward, beside what is kept, and experts expanded for it: none where they are
        `held` expanded."""
        s = self.sizes
        again = {"none": 0, "experts": s.kept_gate_up, "layer": s.kept_rest + s.kept_gate_up}[kind]
        if kind == "layer" and self.inputs_on_host:
            again += 2 * s.kept_input  # this layer's, and the next one's on its way
        if not s.fused:
            again += s.top_k * s.tokens * 16 * s.inner
        gate_up, down = (0, 0) if held else s.expanded(self.experts_at_once)
        if self.reuse_expanded and kind != "none":
            down += gate_up
        rows = s.top_k * s.tokens * 2
        back, hidden = rows * s.inner, rows * s.hidden
        # Products of a few experts are copied into the whole.
        copied = self.experts_at_once
        through_down = hidden + rows * s.tail + back + back * copied // s.experts
        through_gate_up = hidden + hidden * copied // s.experts
        made, expanded = max((through_down, down), (through_gate_up, gate_up), key=sum)
        return again + 2 * s.kept_input + made, expanded

    def lines(self) -> list[str]:
        """What is said before the run."""
        s = self.sizes
        count = {kind: self.recompute.count(kind) for kind in ("none", "experts", "layer")}
        what = {
            "none": "keep everything",
            "experts": "compute their experts' first product again in backward",
            "layer": "are computed again in backward",
        }
        kinds = ", ".join(f"{count[kind]} {what[kind]}" for kind in what if count[kind])
        lines = [
            f"plan: {self.peak / GB:.1f} GB at the peak of {self.budget / GB:.1f} GB "
            f"(weights {self.weights / GB:.1f}, adapters and optimizer {16 * s.adapters / GB:.1f}, "
            f"passes of up to {s.tokens:,} tokens)",
            f"plan: of {s.layers} layers {kinds}",
        ]
        moved = []
        if self.embedding_on_host:
            moved.append("the embedding")
        if self.inputs_on_host:
            moved.append("inputs of layers")
        if self.host_layers:
            moved.append(f"the experts of {self.host_layers} layers (slower: they cross the bus in every pass)")
        if moved:
            lines.append(f"plan: in host memory: {', '.join(moved)}")
        if self.held_layers:
            lines.append(f"plan: the experts of {self.held_layers} layers stay expanded to bfloat16")
        if self.experts_at_once:
            lines.append(f"plan: {self.experts_at_once} of {s.experts} experts expanded at a time (slower)")
        return lines


def sizes_of(
    config: SftConfig,
    model: dict[str, Any],
    quantized: bool,
    targets: tuple[list[str], list[int]],
    *,
    parallel: bool,
    triton: bool,
) -> Sizes:
    """What the plan of a run depends on, but for the tokens of its passes: `ossia.train.pace.plan_passes` finds those.

    Args:
        config: adapters.
        model: gpt-oss's config.json.
        quantized: whether experts stay in MXFP4.
        targets: adapted linear layers, and layers whose experts are adapted.
        parallel: whether several processes train.
        triton: whether it is installed where the run is.
    """
    return Sizes.of(
        model,
        tokens=0,
        rank=config.lora_rank if targets[1] else 0,
        adapters=adapter_parameters(model, config.lora_rank, *targets),
        parallel=parallel,
        quantized=quantized,
        fused=not (config.lora_dropout and targets[1]) and triton,
    )


def budget_of(config: SftConfig, free: int) -> int:
    """Bytes that a run may plan for: `--memory_budget`, else 94 % of what is free.

    The rest is lost between blocks of the allocator, or is the libraries' own.
    """
    return parse_bytes(config.memory_budget, "--memory_budget") if config.memory_budget else int(free * 0.94)


def leanest(sizes: Sizes, checkpointing: str = "auto") -> Plan:
    """The plan of least memory, whatever it costs."""
    least = ("none" if checkpointing == "false" else "layer",) * sizes.layers
    return min(_leaner(Plan(sizes, least, 0)), key=lambda plan: plan.peak)


def make_plan(sizes: Sizes, budget: int, checkpointing: str = "auto") -> Plan:
    """The fastest plan that fits.

    Args:
        sizes: of model and batch.
        budget: bytes the run may take.
        checkpointing: `auto`; `true`: every layer is made again; `false`: none is.

    Raises:
        OssiaError: nothing fits; with the numbers and what to change.
    """
    least = ("none" if checkpointing == "false" else "layer",) * sizes.layers
    plan = next((plan for plan in _leaner(Plan(sizes, least, budget)) if plan.peak <= budget), None)
    if plan is None:
        raise OssiaError(_does_not_fit(sizes, budget, checkpointing))
    if sizes.fused and not plan.experts_at_once and plan.recompute.count("none") < sizes.layers:
        reusing = replace(plan, reuse_expanded=True)
        plan = reusing if reusing.peak <= budget else plan
    if checkpointing != "auto":
        return plan
    for kind in ("none", "experts") if sizes.fused else ("none",):
        for layer in reversed(range(sizes.layers)):
            if plan.recompute[layer] == "layer":
                kinds = (*plan.recompute[:layer], kind, *plan.recompute[layer + 1 :])
                if replace(plan, recompute=kinds).peak > budget:
                    break
                plan = replace(plan, recompute=kinds)
    roomy = sizes.fused and not plan.experts_at_once and plan.recompute.count("none") == sizes.layers
    while roomy and plan.held_layers < sizes.layers:
        richer = replace(plan, held_layers=plan.held_layers + 1)
        if richer.peak > budget:
            break
        plan = richer
    return plan


def adapter_parameters(config: dict[str, Any], rank: int, linear: Iterable[str], expert_layers: Iterable[int]) -> int:
    """Trained parameters of a gpt-oss run.

    Args:
        config: config.json.
        rank: of the adapters.
        linear: names of adapted linear layers.
        expert_layers: layers whose experts are adapted.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    both = {"q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": queries + hidden}
    attention = sum(both.get(name.rpartition(".")[2], 0) for name in linear)
    experts = len(list(expert_layers)) * config["num_local_experts"] * (2 * hidden + 3 * inner)
    return rank * (attention + experts)


def _leaner(plan: Plan) -> Iterable[Plan]:
    """Plans of falling memory, each step costing more time than the one before."""
    yield plan
    plan = replace(plan, embedding_on_host=True)
    yield plan
    if "layer" in plan.recompute:
        plan = replace(plan, inputs_on_host=True)
        yield plan
    plan = replace(plan, loss_chunk=256)
    yield plan
    for experts in (16, 8, 4) if plan.sizes.fused else ():
        if experts < plan.sizes.experts:
            plan = replace(plan, experts_at_once=experts)
            yield plan
    if plan.sizes.quantized:
        for layers in range(1, plan.sizes.layers + 1):
            yield replace(plan, host_layers=layers)


def _does_not_fit(sizes: Sizes, budget: int, checkpointing: str) -> str:
    smallest = leanest(sizes, checkpointing).peak
    more = "" if checkpointing != "false" else ", or leave --gradient_checkpointing at auto"
    return (
        f"out of GPU memory before it starts: the leanest plan takes {smallest / GB:.1f} GB, {budget / GB:.1f} GB are "
        f"there (the longest row has {sizes.tokens:,} tokens). Lower --max_length or --lora_rank{more}; ossia plan "
        "with the same flags says what would fit"
    )
