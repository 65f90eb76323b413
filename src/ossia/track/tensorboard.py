"""TensorBoard's event files, written by its own package; neither torch nor TensorFlow takes part."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ossia.console import tool
from ossia.track.base import RunInfo
from ossia.track.child import ChildTracker, Ending


class TensorBoardTracker(ChildTracker):
    """Event files in the run's folder, under `tensorboard`."""

    name = "TensorBoard"
    extra = "tensorboard"

    def options(self, run: RunInfo) -> dict[str, Any]:
        self._folder = (run.run_dir / "tensorboard").resolve()
        facts = {"name": run.name, "project": run.project, "tags": list(run.tags)}
        return {"folder": str(self._folder), "facts": {**facts, **run.config, "environment": run.environment}}

    def where(self, reply: dict[str, str]) -> str:
        return f"TensorBoard: {tool('tensorboard')} --logdir {self._folder}"


class _Session:
    def __init__(self, folder: str, facts: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(folder, flush_secs=10)
        self.reply: dict[str, str] = {"id": ""}
        self.text("options", f"```json\n{json.dumps(facts, indent=1, ensure_ascii=False)}\n```", 0)

    def log(self, metrics: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Summary(value=values), step)

    def text(self, name: str, value: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        # tensorboard's own helper for this imports TensorFlow.
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[value.encode()], tensor_shape=shape)
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(Summary(value=[Summary.Value(tag=name, metadata=plugin, tensor=tensor)]), step)

    def page(self, name: str, path: Path, step: int) -> None:
        """TensorBoard shows no HTML."""

    def close(self, ending: Ending) -> None:
        self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def connect(options: dict[str, Any]) -> _Session:
    """A writer on its folder."""
    return _Session(options["folder"], options["facts"])
