"""`ossia verify`: equal models pass, others fail with exit code 1 and a record of how far apart they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ossia.adapters.inject import add_lora
from ossia.adapters.io import save_adapter
from ossia.config import InferConfig, VerifyConfig
from ossia.export import verify
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template
from ossia.template.messages import Conversation, Message, ToolCall

QUICK = ("--max_new_tokens", 4, "--prompts", 2, "--device", "cpu")


@pytest.fixture
def adapter(tiny_gpt_oss, tmp_path):
    """A checkpoint that changes what the model says."""
    torch.manual_seed(0)
    model = add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path / "adapter"
    save_adapter(model, folder, str(tiny_gpt_oss))
    return folder


@pytest.fixture
def exported(ossia, adapter, tmp_path):
    """The adapter merged, in float32."""
    folder = tmp_path / "exported"
    ossia.ok("export", "--adapters", adapter, "--merge_lora", "true", "--format", "bf16", "--torch_dtype", "float32",
             "--verify", "false", "--output_dir", folder)  # fmt: skip
    return folder


def test_what_was_merged_says_the_same(ossia, adapter, exported, rows):
    out = ossia.ok("verify", adapter, exported, "--dataset", rows, *QUICK)
    assert out.splitlines()[-1] == "verified"
    assert "- verified\n" in (exported / "README.md").read_text(encoding="utf-8")
    result = json.loads((exported / "verification.json").read_text(encoding="utf-8"))
    assert result["verified"]
    assert result["logit_error"] < 1e-4
    assert result["same_token"] == result["greedy_agreement"] == 1
    assert result["answers"] == 2
    assert result["positions"] > 100
    assert "0+1?" not in json.dumps(result), "rows stay out of what is published"


def test_the_base_alone_is_not_what_was_merged(ossia, adapter, tiny_gpt_oss, exported):
    out = ossia.fails(1, "verify", tiny_gpt_oss, exported, *QUICK)
    assert "not verified" in out
    result = json.loads((exported / "verification.json").read_text(encoding="utf-8"))
    assert not result["verified"]
    assert result["logit_error"] > 0.05


def test_experts_in_another_order_are_found_out(ossia, adapter, exported):
    for file in exported.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("experts.down_proj")]:
            tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    assert "not verified" in ossia.fails(1, "verify", adapter, exported, *QUICK)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give two folders"),
        (["nothing", "{exported}"], "nothing: no such folder"),
        (["{exported}", "nothing"], "nothing: no such folder"),
        (["{exported}", "{empty}"], "neither a model nor an adapter"),
        (["{exported}", "{exported}", "--rows", "0"], "--rows is 0"),
        (["{exported}", "{exported}", "--model", "x"], "--model is the base of an adapter"),
        (["{exported}", "{exported}", "--dataset", "gone.jsonl"], "gone.jsonl"),
        (["{exported}", "{exported}", "--dataset", "{text}"], "no conversations"),
    ],
)
def test_bad_input_is_said_before_anything_loads(ossia, tiny_gpt_oss, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "only a text"}\n')
    names = {"exported": tiny_gpt_oss, "empty": tmp_path / "empty", "text": tmp_path / "text.jsonl"}
    assert message in ossia.fails(2, "verify", *(arg.format(**names) for arg in args))


def test_calls_are_told_with_the_answers(tiny_gpt_oss, monkeypatch):
    """An engine that always calls; a row that ends in reasoning and a call is asked for all of it."""
    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    said = " to=functions.lamp<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    asked = []

    class Model:
        config, device = SimpleNamespace(), torch.device("cpu")

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 300))

        __call__ = forward

    class Engine:
        def __init__(self, template):
            self.template = template
            self.model = Model()

        def generate(self, prompts, sampling):
            asked.extend(prompts)
            return [self.template.tokenizer(said)["input_ids"]]

    monkeypatch.setattr("ossia.infer.run.load_engine", lambda options: Engine(template))
    question = Message("user", "Light!")
    call = Message("assistant", tool_calls=(ToolCall("lamp", "{}"),))
    row = Conversation([question, Message("assistant", "", "hm"), call])
    config = VerifyConfig(original="a", exported="b", prompts=2)
    reading = verify._read(InferConfig(model=str(tiny_gpt_oss)), [row], config)
    assert reading.shown == ["lamp({})"] * 2
    assert asked[1] == template.prompt([question])
    assert "hm" in template.tokenizer.decode(reading.rows[0])
