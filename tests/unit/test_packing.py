"""Rows packed into sequences."""

from __future__ import annotations

import random

import pytest

from ossia.data.packing import fill, pack


def check(lengths, capacity):
    packs = pack(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert max((sum(lengths[row] for row in rows) for rows in packs), default=0) <= capacity
    return packs


def test_small_cases():
    assert fill([], 10) == (0, 0.0)
    assert fill([6, 4, 5, 5, 10], 10) == (3, 1.0)
    assert fill([6, 6, 6], 10) == (3, 0.6)
    with pytest.raises(ValueError, match="11 tokens does not fit"):
        pack([11], 10)


def best_fit(lengths, capacity):
    """The plain algorithm: look at every sequence."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


def test_is_best_fit_decreasing_and_the_same_every_time():
    for seed in range(200):
        rng = random.Random(seed)
        capacity = rng.randint(1, 300)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 120))]
        packs = check(lengths, capacity)
        assert sorted(capacity - sum(lengths[row] for row in rows) for rows in packs) == best_fit(lengths, capacity)
        assert packs == pack(lengths, capacity)


def test_two_hundred_thousand_rows_are_packed_tightly_in_seconds():
    rng = random.Random(0)
    lengths = [min(4096, int(rng.lognormvariate(5.5, 0.8)) + 1) for _ in range(200_000)]
    packs = check(lengths, 4096)
    assert sum(lengths) / (len(packs) * 4096) > 0.999
