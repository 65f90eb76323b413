"""Data sets on a hub: `hf::org/name` through datasets, `ms::org/name` through modelscope; never loaded unless named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ossia.data.readers import Record
from ossia.errors import OssiaError, UsageError

_NAME = re.compile(
    r"(?P<hub>hf|ms)::(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.-]+(?:\[[\w:%-]*\])?))?"
)


@dataclass(frozen=True)
class HubSet:
    """One split of a data set on a hub."""

    hub: str
    id: str
    config: str | None
    split: str

    @classmethod
    def named(cls, word: str, flag: str) -> HubSet:
        """From `hf::org/name[:config][:split]`; the split is `train` unless given."""
        found = _NAME.fullmatch(word)
        if not found:
            raise UsageError(f"{flag} {word}: a hub data set is written {word[:4]}org/name, :split behind it if needed")
        return cls(found["hub"], found["id"], found["config"], found["split"] or "train")

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.hub}::{self.id}:{self.split}"

    def count(self) -> int:
        """Rows of the split."""
        return len(_load(self))

    def records(self) -> Iterator[Record]:
        """Its rows in order."""
        for number, row in enumerate(_load(self), start=1):
            yield Record(row, f"{self.name} row {number}")

    def digest(self) -> str:
        """The fingerprint that datasets keeps of the content."""
        return str(_load(self)._fingerprint)


@cache
def _load(name: HubSet) -> Any:
    """The data set, downloaded into its hub's own cache on first use."""
    package = {"hf": "datasets", "ms": "modelscope"}[name.hub]
    try:
        if name.hub == "hf":
            import datasets

            return datasets.load_dataset(name.id, name.config, split=name.split)
        from modelscope.msdatasets import MsDataset

        found = MsDataset.load(name.id, subset_name=name.config or "default", split=name.split)
        return found.to_hf_dataset() if hasattr(found, "to_hf_dataset") else found
    except ImportError as error:
        raise OssiaError(f"{name.name}: needs {package} ({error}); pip install {package}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise OssiaError(f"{name.name}: cannot be loaded ({' '.join(str(error).split()):.300})") from error
