"""Plans for a GPU's memory: from sizes to choices, and held against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig

from ossia.adapters.inject import add_lora
from ossia.config.base import parse_bytes
from ossia.errors import OssiaError, UsageError
from ossia.model.folder import read_json
from ossia.model.load import load_model
from ossia.model.sizes import SIZES
from ossia.train.plan import KINDS, Plan, Sizes, adapter_parameters, make_plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "train" / "results"
LINEAR = [
    f"layers.{layer}.self_attn.{name}" for layer in range(24) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
]


def sizes(tokens, rank=8, **more):
    return Sizes.of(
        SIZES["20b"],
        tokens=tokens,
        rank=rank,
        adapters=adapter_parameters(SIZES["20b"], rank, LINEAR, range(24)),
        **more,
    )


def measured():
    for file in sorted(RESULTS.glob("*.json")):
        for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
            if result["program"] == "ossia sft" and "peak_bytes" in result:
                yield pytest.param(result, id=f"{file.stem} {result['case']}")


@pytest.mark.parametrize("result", list(measured()))
def test_predicted_peak_is_within_a_tenth_of_the_measured_one(result):
    said = result["said"][0]
    planned = float(said.removeprefix("plan: ").partition(" GB")[0]) * 1e9
    assert abs(planned - result["peak_bytes"]) < 0.1 * result["peak_bytes"]


@pytest.mark.parametrize(
    ("kind", "tokens", "peak"),
    # One H100, torch 2.11, weights made on the GPU: torch.cuda.max_memory_allocated over steps.
    [("layer", 16384, 20.20e9), ("none", 16384, 51.19e9)],
)
def test_formula_gives_the_peaks_measured_without_a_planner(kind, tokens, peak):
    assert Plan(sizes(tokens), (kind,) * 24, 0).peak == pytest.approx(peak, rel=0.02)


def test_20b_has_its_known_size():
    plan = Plan(sizes(1), ("layer",) * 24, 0)
    assert plan.weights == pytest.approx(13.76e9, rel=0.003)
    assert plan.sizes.adapters == 92_454_912
    assert replace(plan, embedding_on_host=True).weights == plan.weights - 2 * 201088 * 2880


def test_known_sizes_are_those_of_transformers():
    assert GptOssConfig(**SIZES["120b"]).to_dict() == GptOssConfig().to_dict()
    assert SIZES["20b"]["layer_types"] == ["sliding_attention", "full_attention"] * 12


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 200_000),
    rank=st.sampled_from([1, 8, 64]),
    more=st.fixed_dictionaries(
        {
            "accumulates": st.booleans(),
            "parallel": st.booleans(),
            "quantized": st.booleans(),
            "fused": st.booleans(),
            "eval_tokens": st.integers(0, 400_000),
        }
    ),
    choices=st.fixed_dictionaries(
        {
            "recompute": st.lists(st.sampled_from(KINDS), min_size=24, max_size=24).map(tuple),
            "experts_at_once": st.sampled_from([0, 4, 16]),
            "reuse_expanded": st.booleans(),
            "loss_chunk": st.sampled_from([256, 1024]),
            "embedding_on_host": st.booleans(),
            "inputs_on_host": st.booleans(),
            "host_layers": st.integers(0, 12),
            "held_layers": st.integers(0, 12),
        }
    ),
)
def test_parts_add_up_to_the_peak(tokens, rank, more, choices):
    made = sizes(tokens, rank, **more)
    plan = Plan(made, budget=0, **choices)
    parts = plan.parts
    assert sum(parts) == plan.peak
    assert min(parts) >= 0
    assert (parts.adapters, parts.optimizer) == (4 * made.adapters, 8 * made.adapters)
    held = plan.held_layers * sum(made.expanded(0))
    assert parts.weights + held == plan.weights
    assert held <= parts.expanded <= held + 2 * sum(made.expanded(0))
    # What is not on the GPU is on the host.
    alone = replace(plan, held_layers=0, inputs_on_host=False)
    assert alone.weights + alone.host - replace(alone, embedding_on_host=False, host_layers=0).host == made.frozen
    # No moment is larger: not the loss, with everything kept, nor the first layer's backward, with all gradients.
    fixed = parts.weights + parts.adapters + parts.optimizer + parts.libraries + held
    gradients = 4 * made.adapters
    inputs = 0 if plan.inputs_on_host else made.kept_input
    assert plan.peak >= fixed + 2 * made.vocabulary * min(tokens, plan.loss_chunk) + gradients * made.accumulates
    assert plan.peak >= fixed + gradients * (1 + made.parallel) + inputs * (plan.recompute[0] == "layer")


def test_weights_and_adapters_of_a_real_model(tiny_gpt_oss):
    config = read_json(tiny_gpt_oss / "config.json")
    model = load_model(tiny_gpt_oss, torch_dtype="bfloat16", experts="mxfp4")
    held = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "rotary" not in n)]
    counted = sum(tensor.nbytes for _, tensor in held)
    linear = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    count = adapter_parameters(config, 3, linear, [1])
    made = Sizes.of(config, tokens=8, rank=3, adapters=count)
    assert Plan(made, ("none",) * 2, 0).weights == pytest.approx(counted, rel=0.02)
    adapted = add_lora(model, rank=3, target_experts="1")
    assert count == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 200_000),
    budget=st.floats(5, 140),
    rank=st.sampled_from([1, 8, 64]),
    more=st.fixed_dictionaries({"accumulates": st.booleans(), "quantized": st.booleans(), "fused": st.booleans()}),
)
def test_a_plan_fits_its_budget_or_is_refused_with_the_numbers(tokens, budget, rank, more):
    made = sizes(tokens, rank, **more)
    try:
        plan = make_plan(made, int(budget * 1e9))
    except OssiaError:
        host = 24 if made.quantized else 0
        leanest = Plan(
            made,
            ("layer",) * 24,
            0,
            experts_at_once=4 if made.fused else 0,
            loss_chunk=256,
            embedding_on_host=True,
            inputs_on_host=True,
            host_layers=host,
        )
        assert leanest.peak > budget * 1e9
        return
    assert plan.peak <= plan.budget
    assert len(plan.recompute) == 24
    assert set(plan.recompute) <= set(KINDS)
    richer = make_plan(made, int(budget * 1.5e9))
    assert richer.host_layers <= plan.host_layers
    assert richer.recompute.count("none") >= plan.recompute.count("none") or richer.host_layers < plan.host_layers


def test_what_fits_nowhere_is_refused_with_the_numbers():
    with pytest.raises(OssiaError, match=r"leanest plan takes \d+\.\d GB, 4\.0 GB are there.*Lower --max_length"):
        make_plan(sizes(4096), int(4e9))


def test_room_goes_first_to_what_saves_most():
    assert make_plan(sizes(16384), int(200e9)).held_layers == 24
    rich = make_plan(sizes(16384), int(76e9))
    assert rich.recompute == ("none",) * 24
    assert 0 < rich.held_layers < 24
    assert not rich.offload()
    poor = make_plan(sizes(4096), int(8e9))
    assert poor.host_layers > 10
    assert "model.embed_tokens.weight" in poor.offload()
    assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in poor.offload()


def test_checkpointing_is_obeyed():
    assert set(make_plan(sizes(4096), int(79e9), "true").recompute) == {"layer"}
    assert set(make_plan(sizes(4096), int(79e9), "false").recompute) == {"none"}
    with pytest.raises(OssiaError, match="leave --gradient_checkpointing at auto"):
        make_plan(sizes(65536), int(40e9), "false")


def test_without_the_fused_path_plans_are_larger_and_plainer():
    made = sizes(4096, fused=False)
    plan = make_plan(made, int(70e9))
    assert "experts" not in plan.recompute
    assert (plan.held_layers, plan.reuse_expanded, plan.experts_at_once) == (0, False, 0)
    assert Plan(made, ("layer",) * 24, 0).peak > Plan(sizes(4096), ("layer",) * 24, 0).peak + 2e9


def test_large_batches_of_held_out_rows_count():
    plain, held = (Plan(sizes(1024, eval_tokens=tokens), ("layer",) * 24, 0) for tokens in (1024, 65536))
    assert plain.peak == Plan(sizes(1024), ("layer",) * 24, 0).peak
    assert held.peak > plain.peak + 3e9


def test_lines_say_what_is_given_up():
    text = "\n".join(make_plan(sizes(2048), int(11e9)).lines())
    assert "11.0 GB" in text
    assert "in host memory: the embedding, inputs of layers, the experts of" in text
    assert "expanded at a time (slower)" in text


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16e9), ("16", 16e9), ("14.5GiB", 14.5 * 2**30), ("16000 mb", 16e9), ("16000000000", 16e9), ("1tb", 1e12)],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text, "--memory_budget") == count


@pytest.mark.parametrize("text", ["lots", "", "-3GB", "0", "16 elephants", "1e9"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="--memory_budget"):
        parse_bytes(text, "--memory_budget")
