"""A run to be planned: its options, its model, the lengths of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ossia.adapters.targets import match_targets
from ossia.config import PlanConfig
from ossia.plan.base import Base
from ossia.train.pace import Steps, mean_tokens
from ossia.train.plan import Sizes, sizes_of
from ossia.train.schedule import optimizer_steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Epoch:
    """What an epoch is made of.

    Args:
        batches: of rows, of each process.
        tokens: of all rows.
        padded: with the padding of passes.
    """

    batches: int
    tokens: int
    padded: int


@dataclass(frozen=True)
class Job:
    """A run.

    Args:
        config: its options.
        base: its model.
        lengths: tokens of each row; None: no data, rows of --max_length are planned for.
        held: of each held-out row.
        processes: that train together.
        margin: how many times as long as `lengths` say a row may be.
    """

    config: PlanConfig
    base: Base
    lengths: NDArray[np.int32] | None = None
    held: NDArray[np.int32] | None = None
    processes: int = 1
    margin: float = 1.0

    def with_options(self, **options: Any) -> Job:
        """The same with some options changed."""
        return replace(self, config=replace(self.config, **options))

    @cached_property
    def targets(self) -> tuple[list[str], list[int]]:
        """Adapted linear layers, and layers whose experts are adapted."""
        config = self.config
        return match_targets(self.base.linear, self.base.config, config.target_modules, config.target_experts)

    @property
    def quantized(self) -> bool:
        """Whether experts stay in MXFP4."""
        return self.base.quantized and self.config.experts != "dequantized"

    def sizes(self) -> Sizes:
        """What a plan depends on, but for the tokens of a pass."""
        parallel = self.processes > 1
        return sizes_of(self.config, self.base.config, self.quantized, self.targets, parallel=parallel, triton=True)

    @cached_property
    def steps(self) -> Steps:
        """What optimizer steps are made of; rows may be longer than `lengths` say by the margin."""
        config, limit = self.config, self.config.max_length
        if self.lengths is None:
            rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
            return Steps.alike(self.longest, rows)
        lengths = self._within(self.lengths, limit)
        held = None if self.held is None else self._within(self.held, limit)
        found = Steps.of_run(config, lengths, held)
        if self.margin == 1:
            return found
        longest, held_longest = self._longest(self.lengths), 0 if self.held is None else self._longest(self.held)
        most = math.ceil(self.margin * found.most)
        return replace(found, longest=max(found.longest, longest), most=most, held_longest=held_longest)

    def stored(self, *, quantized: bool) -> int:
        """Bytes of the model on disk, experts in MXFP4 or in bfloat16."""
        return replace(self.sizes(), quantized=quantized).frozen

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of a batch."""
        if self.config.packing:
            return self.config.packing_length or self.config.max_length
        return self.config.max_length if self.lengths is None else self._longest(self.lengths)

    @property
    def length(self) -> float:
        """Tokens of a row as a token sees it, on average."""
        if self.lengths is None:
            return self.config.max_length
        lengths = self._within(self.lengths, self.config.max_length).astype(float)
        return float((lengths**2).sum() / lengths.sum())

    @property
    def left_out(self) -> int:
        """Rows over --max_length: dropped or cut, as --truncation says."""
        return 0 if self.lengths is None else int((self.lengths > self.config.max_length).sum())

    @cached_property
    def epoch(self) -> Epoch | None:
        """None without data."""
        if self.lengths is None:
            return None
        lengths = self._within(self.lengths, self.config.max_length)
        tokens, items = int(lengths.sum()), len(lengths)
        if self.config.packing:
            from ossia.data.packing import fill

            items = fill(lengths.tolist(), self.longest).packs
        batches = math.ceil(math.ceil(items / self.config.per_device_train_batch_size) / self.processes)
        padding = mean_tokens(self.steps.passes(self.steps.most)) / self.steps.tokens
        return Epoch(batches, tokens, round(tokens * padding))

    def optimizer_steps(self) -> tuple[int | None, int | None]:
        """(of an epoch, of the run); None where only data tells."""
        if self.epoch is None:
            return None, self.config.max_steps if self.config.max_steps > 0 else None
        return optimizer_steps(self.config, self.epoch.batches)

    def _longest(self, lengths: NDArray[np.int32]) -> int:
        limit = self.config.max_length
        return min(limit, math.ceil(self.margin * int(self._within(lengths, self.margin * limit).max())))

    def _within(self, lengths: NDArray[np.int32], limit: float) -> NDArray[np.int32]:
        """Lengths as a --max_length of `limit` leaves them."""
        if self.config.truncation == "delete" and bool((lengths <= limit).any()):
            return lengths[lengths <= limit]
        return lengths.clip(max=limit)
