"""What a run's record says of its data."""

from __future__ import annotations

from typing import Any

from ossia.data.report import histogram
from ossia.data.store import TokenRows

_BINS = 40


def summary(rows: TokenRows) -> dict[str, Any]:
    """`samples`, `tokens`, `trained` tokens, `bins` of lengths, and `channels`: (tokens, trained) of each."""
    channels = rows.by_channel()
    return {
        "samples": len(rows),
        "tokens": int(rows.lengths.sum()),
        "trained": sum(trained for _, trained in channels.values()),
        "bins": [one._asdict() for one in histogram(rows.lengths.tolist(), _BINS)],
        "channels": channels,
    }
