"""TRL's trainers take the model as it is: adapters learn, and the released configuration adds no router loss."""

from __future__ import annotations

import pytest
import torch

from ossia.adapters.inject import add_lora
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

ROWS = {
    "SFT": {"text": ["one row of text", "another, longer row of text"] * 4},
    "DPO": {"prompt": ["2+2? "] * 8, "chosen": ["4 it is"] * 8, "rejected": ["5 perhaps"] * 8},
}


@pytest.mark.parametrize("method", list(ROWS))
def test_trainers_of_trl_train_adapters(tiny_gpt_oss, tmp_path, method):
    model = add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(ROWS[method]),
        processing_class=load_tokenizer(tiny_gpt_oss),
    )
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)
    # DPO puts a second adapter beside ours, for its reference.
    after = {name: p for name, p in model.named_parameters() if name in before}
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("experts.lora_B" in name for name in changed)
