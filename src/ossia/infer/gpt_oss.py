"""gpt-oss decoded from pages: one forward for every request of an adapter, a CUDA graph of it on a GPU.

B requests, R an adapter's ranks together, N query and M key-value heads, D head size, P pages of PAGE positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ossia.adapters.experts import ExpertsLora
from ossia.adapters.linear import LinearLora
from ossia.compat import cache_name
from ossia.errors import OssiaError
from ossia.infer.runner import with_adapter
from ossia.kernels.expert_decode import MAX_SCALE, expert_decode
from ossia.kernels.expert_mlp import Adapter, Memory
from ossia.kernels.paged_attention import Pages, append, attend, fill
from ossia.kernels.rms_norm import add_rms_norm, rms_norm
from ossia.kernels.route import route
from ossia.kernels.sizes import ceil_div, power_of_two
from ossia.model import attention
from ossia.model.experts import Experts, fuses
from ossia.model.gpt_oss import OssiaGptOssForCausalLM
from ossia.model.names import PROJECTIONS

PAGE = 128
_FULL, _WINDOW = "full_attention", "sliding_attention"
_PROJECTED = ("q_proj", "k_proj", "v_proj")
_ADAPTED = (*_PROJECTED, "o_proj", "mlp.experts")
_GROUP = 16384
"""Tokens of prompts in one forward, at most."""
_LEAST_FILLED = 0.75
"""Of the longest prompt of a forward, the length of the shortest."""
_SHARE = 0.5
"""Of the free memory, for keys and values; prompts need the rest."""


class _Linear(NamedTuple):
    """A weight [O, I] with its bias, and an adapter's A [R, I] and B times its scale [O, R]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None

    def __call__(self, x_BI: Tensor) -> Tensor:
        out_BO = F.linear(x_BI, self.weight, self.bias)
        return out_BO if self.a is None or self.b is None else out_BO.addmm_(x_BI @ self.a.T, self.b.T)


class _Layer(NamedTuple):
    """What decoding reads of a layer, for one adapter or none."""

    module: Any
    qkv: _Linear
    out: _Linear
    experts: Experts
    adapters: tuple[Adapter, Adapter] | None
    scale: float


def runs(model: Any) -> bool:
    """Whether `GptOssRunner` computes this model: ours, on its own device, with plain LoRA on attention and experts."""
    base = _base(model)
    if not isinstance(base, OssiaGptOssForCausalLM):
        return False
    if any(tensor.device != base.device for tensor in (*base.parameters(), *base.buffers())):
        return False
    adapted = [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    return all(name.endswith(_ADAPTED) and _is_plain(module) for name, module in adapted)


class GptOssRunner:
    """See `Runner`. Layers with a window keep that window alone."""

    def __init__(self, model: Any, max_length: int, places: int) -> None:
        self._model = model
        self._base = base = _base(model)
        config, device = base.config, base.device
        self._config, self._places = config, places
        kinds = config.layer_types
        shape = (config.num_key_value_heads, PAGE, config.head_dim)
        like = {"dtype": base.dtype, "device": device}
        page_bytes = 2 * kinds.count(_FULL) * PAGE * shape[0] * shape[2] * base.dtype.itemsize
        held = int(_SHARE * _free_bytes(device)) // max(page_bytes, 1)
        # One page of each kind belongs to no request: rows that fill up a batch write there.
        pages = min(held, places * ceil_div(max_length, PAGE)) + 1
        self.max_length = min(max_length, (pages - 1) * PAGE)
        if self.max_length < 2:
            raise OssiaError(f"{held * PAGE} tokens of keys and values fit into the free memory; more of it is needed")
        self._free_pages = list(range(pages - 1, 0, -1))
        self._owned: dict[int, list[int]] = {}
        table = torch.zeros(places + 1, ceil_div(self.max_length, PAGE), dtype=torch.int32, device=device)
        ring = ceil_div(config.sliding_window, PAGE)
        window = torch.arange((places + 1) * ring, dtype=torch.int32, device=device).view(-1, ring)
        count = {_FULL: pages, _WINDOW: window.numel()}
        tables = {_FULL: (table, None), _WINDOW: (window, config.sliding_window)}
        self._table = table
        self._pages = [
            Pages(torch.empty(count[kind], *shape, **like), torch.empty(count[kind], *shape, **like), *tables[kind])
            for kind in kinds
        ]
        self._cos, self._sin = (
            x[0] for x in base.model.rotary_emb(base.lm_head.weight, torch.arange(self.max_length, device=device)[None])
        )
        self._lengths: dict[int, int] = {}
        self._layers: dict[str | None, list[_Layer]] = {}
        self._graphs: dict[tuple[str | None, int], _Graph] = {}
        experts = [_experts(layer) for layer in base.model.layers]
        self._from_blocks = fuses(base.lm_head.weight) and all(map(_has_small_blocks, experts))
        self._group = self._fit_prompts(experts, _free_bytes(device))

    def _fit_prompts(self, experts: Sequence[Experts], free: int) -> int:
        """How many tokens of prompts one forward may take; where little memory is left, experts are expanded for it in
        parts."""
        config = self._config
        hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_local_experts
        values = config.num_experts_per_tok * (hidden + 3 * inner)
        values += 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        expanded = 3 * hidden * inner * count * self._base.dtype.itemsize
        if free < 2 * expanded:
            for module in experts:
                module.memory = Memory(experts=max(1, count // 8))
        return max(1, min(_GROUP, free // (4 * values * self._base.dtype.itemsize)))

    def reserve(self, place: int, tokens: int) -> bool:
        count = ceil_div(tokens, PAGE)
        if count > len(self._free_pages):
            return False
        owned = self._owned[place] = [self._free_pages.pop() for _ in range(count)]
        self._table[place, :count] = torch.tensor(owned, dtype=torch.int32)
        return True

    def start(self, places: Sequence[int], prompts: Sequence[list[int]], adapter: str | None) -> Tensor:
        logits_BV = self._base.lm_head.weight.new_empty(len(prompts), self._config.vocab_size)
        # Our attention sees no padding on the right; any other would take a mask for it.
        least = _LEAST_FILLED if self._config._attn_implementation == attention.NAME else 1.0
        for rows in _groups([len(prompt) for prompt in prompts], least, self._group):
            logits_BV[rows] = self._prefill([places[row] for row in rows], [prompts[row] for row in rows], adapter)
        return logits_BV

    def _prefill(self, places: list[int], prompts: list[list[int]], adapter: str | None) -> Tensor:
        """Logits [B, V] after prompts of about one length, in one forward."""
        lengths, device = [len(prompt) for prompt in prompts], self._base.device
        ids_BS = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts], device=device)
        ours, cache = self._config._attn_implementation == attention.NAME, DynamicCache()
        with with_adapter(self._model, adapter):
            hidden_BSH = self._base.model(
                input_ids=ids_BS,
                attention_mask=dict.fromkeys(self._config.layer_types) if ours else None,
                use_cache=True,
                **{cache_name(self._base.model.forward): cache},
            ).last_hidden_state
        layers: list[Any] = list(cache.layers)
        for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
            self._lengths[place] = length
            for pages, layer in zip(self._pages, layers, strict=True):
                keys_and_values = (x[row, :, :length].transpose(0, 1) for x in (layer.keys, layer.values))
                fill(pages, place, *keys_and_values)
        last = torch.tensor(lengths, device=device) - 1
        return self._base.lm_head(hidden_BSH[torch.arange(len(lengths), device=device), last])

    def step(self, places: Sequence[int], tokens: Sequence[int], adapter: str | None) -> Tensor:
        positions = [self._lengths[place] for place in places]
        for place in places:
            self._lengths[place] += 1
        count = len(places)
        if not self._from_blocks:
            inputs = torch.tensor([list(tokens), positions, list(places)], device=self._base.device)
            return self._decode(inputs, adapter)
        size = power_of_two(count)
        spare = size - count
        inputs = torch.tensor([[*tokens, *[0] * spare], [*positions, *[0] * spare], [*places, *[self._places] * spare]])
        if (adapter, size) not in self._graphs:
            start, other = inputs.to(self._base.device), next(iter(self._graphs.values()), None)
            self._graphs[adapter, size] = _Graph(lambda x: self._decode(x, adapter), start, other)
        return self._graphs[adapter, size](inputs)[:count]

    def free(self, place: int) -> None:
        self._free_pages += self._owned.pop(place, [])
        self._lengths.pop(place, None)

    def _decode(self, inputs_3B: Tensor, adapter: str | None) -> Tensor:
        """Logits [B, V] of tokens at positions of places, the rows of `inputs_3B`."""
        base, config = self._base, self._config
        token_B, position_B, place_B = inputs_3B.unbind()
        hidden_BH = base.model.embed_tokens(token_B)
        for layer, pages in zip(self._layers_of(adapter), self._pages, strict=True):
            before, after = layer.module.input_layernorm, layer.module.post_attention_layernorm
            hidden_BH, normal_BH = add_rms_norm(hidden_BH, None, before.weight, before.variance_epsilon)
            qkv_BHD = layer.qkv(normal_BH).view(len(normal_BH), -1, config.head_dim)
            q_BND = append(qkv_BHD, self._cos, self._sin, pages, place_B, position_B)
            heads = layer.module.self_attn
            said_BND = attend(q_BND, pages, place_B, position_B, heads.sinks, heads.scaling)
            attended_BH = layer.out(said_BND.flatten(1))
            total_BH, normal_BH = add_rms_norm(attended_BH, hidden_BH, after.weight, after.variance_epsilon)
            router, experts = layer.module.mlp.router, layer.experts
            index_BK, weight_BK, normal_BH = route(normal_BH, router.weight, router.bias, router.top_k)
            hidden_BH = expert_decode(
                normal_BH, index_BK, weight_BK, experts.frozen("gate_up_proj"), experts.frozen("down_proj"),
                experts.alpha, experts.limit, total_BH, layer.adapters, layer.scale, self._from_blocks,
            )  # fmt: skip
        norm = base.model.norm
        return base.lm_head(rms_norm(hidden_BH, norm.weight, norm.variance_epsilon))

    def _layers_of(self, adapter: str | None) -> list[_Layer]:
        if adapter not in self._layers:
            self._layers[adapter] = [_layer(module, adapter) for module in self._base.model.layers]
        return self._layers[adapter]


class _Graph:
    """A function of one tensor, captured: calls copy the tensor in and replay.

    A graph shares memory with the `other`: the result of one lasts until the next call of any.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: Tensor, other: _Graph | None) -> None:
        self._inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Twice: kernels are compiled and chosen before the capture, which may do neither.
            for _ in range(2):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=None if other is None else other._graph.pool()):
            self._result = function(inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._result


def _groups(lengths: list[int], least: float, tokens: int) -> list[list[int]]:
    """Rows of one forward each: at most so many tokens with padding, or one row; none shorter than `least` of the
    longest."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= least * longest and (len(groups[-1]) + 1) * longest <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_plain(module: Any) -> bool:
    """Whether an adapted module is one thin product beside its own, as `_layer` takes it."""
    if module.merged:
        return False
    if isinstance(module, ExpertsLora):
        return True
    return isinstance(module, LinearLora) and not module.lora_variant and not any(module.lora_bias.values())


def _experts(layer: Any) -> Experts:
    experts = layer.mlp.experts
    return getattr(experts, "base_layer", experts)


def _has_small_blocks(experts: Experts) -> bool:
    scales = [experts.frozen(name).scales for name in PROJECTIONS]
    return all(x is not None and int(x.max()) <= MAX_SCALE for x in scales)


def _layer(module: Any, adapter: str | None) -> _Layer:
    heads = module.self_attn
    weight, bias = heads.stacked()
    qkv = _adapted(weight, bias, [getattr(heads, name) for name in _PROJECTED], adapter)
    linear = getattr(heads.o_proj, "base_layer", heads.o_proj)
    out = _adapted(linear.weight, linear.bias, [heads.o_proj], adapter)
    lora, pair, scale = module.mlp.experts, None, 1.0
    if adapter is not None and isinstance(lora, ExpertsLora) and adapter in lora.r:
        *sides, scale = lora.pair(adapter)
        first, second = (Adapter(*(x.detach().to(out.weight.dtype).contiguous() for x in side)) for side in sides)
        pair = first, second
    return _Layer(module, qkv, out, _experts(module), pair, scale)


def _adapted(weight_OI: Tensor, bias_O: Tensor | None, parts: Sequence[Any], adapter: str | None) -> _Linear:
    """Parts whose outputs lie one behind another: each one's B in its own rows and columns of one matrix."""
    a, b, start = [], [], 0
    for part in parts:
        base = getattr(part, "base_layer", part)
        if adapter in getattr(part, "lora_A", ()):
            a.append(part.lora_A[adapter].weight)
            own = part.lora_B[adapter].weight * part.scaling[adapter]
            b.append(F.pad(own, (0, 0, start, len(weight_OI) - start - base.out_features)))
        start += base.out_features
    if not a:
        return _Linear(weight_OI, bias_O)
    a_RI, b_OR = (torch.cat(x, dim).detach().to(weight_OI.dtype) for x, dim in ((a, 0), (b, 1)))
    return _Linear(weight_OI, bias_O, a_RI, b_OR)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
