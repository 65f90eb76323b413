"""The training step that a peer's user writes, timed."""

from __future__ import annotations

import time
from typing import Any

import torch


def measure(model: torch.nn.Module, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Seconds of each step on random tokens, under autocast with fused AdamW, and the peak of memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, 199998, (batch, length), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 4))
    return {
        "seconds": seconds,
        "tokens": batch * length,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "trained_parameters": sum(p.numel() for p in trained),
    }
