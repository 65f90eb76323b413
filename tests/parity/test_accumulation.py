"""One optimizer step is the same whether its rows come as 1×8, 8×1 or in between: losses and gradients, in float32."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ossia.config import SftConfig
from ossia.track import read_metrics
from ossia.train import trainer
from ossia.train.run import run


@pytest.fixture
def uneven(tmp_path):
    """Sixteen rows of different lengths, so that a mean of means would be another number."""
    path = tmp_path / "uneven.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "x" * (n * 7 % 31 + 1)},
                {"role": "assistant", "thinking": "y" * (n * 5 % 23 + 1), "content": "z" * (n * 11 % 41 + 1)},
            ]
        }
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_batch_and_accumulation_give_one_gradient(tiny_gpt_oss, uneven, tmp_path, monkeypatch):
    config = SftConfig(
        model=str(tiny_gpt_oss),
        dataset=[str(uneven)],
        loss_scale="default+reasoning:0.3",
        device="cpu",
        torch_dtype="float32",
        num_train_epochs=1,
        learning_rate=1e-2,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        load_from_cache_file=False,
    )
    found, real = [], trainer.SftTrainer._get_grad_norm

    def keep(this, model, grad_norm=None):
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        return real(this, model, grad_norm)

    monkeypatch.setattr(trainer.SftTrainer, "_get_grad_norm", keep)
    losses, gradients = {}, {}
    for batch, accumulated in ((8, 1), (1, 8), (4, 2)):
        found.clear()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        done = run(dataclasses.replace(config, output_dir=str(tmp_path / f"{batch}x{accumulated}"), **options))
        losses[batch] = [row["loss"] for row in read_metrics(done.run_dir / "metrics.jsonl") if "loss" in row]
        gradients[batch] = found[0]
    assert len(losses[8]) == 2
    for batch in (1, 4):
        assert losses[batch] == pytest.approx(losses[8], rel=1e-5)
        for one, other in zip(gradients[batch], gradients[8], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-9)
