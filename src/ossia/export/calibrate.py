"""What experts meet on a run's rows, kept on disk layer by layer, for `ossia.kernels.mxfp4.calibrated`.

T tokens, H hidden, K experts per token, E experts of a piece, I inputs of a projection.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ossia.config import InferConfig
from ossia.console import counted, progress, say
from ossia.export.tensors import Spec, Writer
from ossia.infer.reading import readings
from ossia.infer.run import model_of
from ossia.kernels.expert_mlp.reference import swiglu
from ossia.kernels.mxfp4.calibrated import Inputs
from ossia.model.experts import SWIGLU_ALPHA, SWIGLU_LIMIT, Experts
from ossia.model.folder import read_json

_TOKENS = 4096
"""Of a pass over the texts."""

Given = Callable[[int, int], Inputs]
"""Of a first and last expert (exclusive)."""
FirstProduct = Callable[[int, int], tuple[Tensor, Tensor]]
"""Of the same: weights [E, O, I] and bias [E, O] of the experts' first projection, float32."""


class Calibration:
    """What a model's experts are given on some texts.

    Args:
        options: which adapter, and where it runs.
        base: folder of its base model.
        texts: token ids.
    """

    def __init__(self, options: InferConfig, base: Path, texts: list[list[int]]) -> None:
        self._options, self._base, self._texts = options, base, texts
        config = read_json(base / "config.json")
        self._swiglu = partial(
            swiglu, alpha=config.get("swiglu_alpha", SWIGLU_ALPHA), limit=config.get("swiglu_limit", SWIGLU_LIMIT)
        )
        self.tokens = sum(map(len, texts))
        self._specs = {
            "hidden": Spec(torch.bfloat16, (self.tokens, config["hidden_size"])),
            "index": Spec(torch.int32, (self.tokens, config["num_experts_per_tok"])),
            "weight": Spec(torch.float32, (self.tokens, config["num_experts_per_tok"])),
        }
        self.nbytes = config["num_hidden_layers"] * sum(spec.nbytes for spec in self._specs.values())
        """Of the files."""
        self.key = hashlib.sha256(repr(texts).encode()).hexdigest()
        self.folder: Path | None = None

    def collect(self, folder: Path) -> None:
        """Let the model read the texts and write what its experts are given to `folder`, a file a layer; a folder that
        is there already is taken as it is."""
        self.folder = folder
        if folder.is_dir():
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self._read(part)
        part.rename(folder)

    def _read(self, folder: Path) -> None:
        started = time.perf_counter()
        model = model_of(self._options, self._base)
        with ExitStack() as files, torch.inference_mode():

            def keep(file: Writer, module: Any, given: tuple[Tensor, ...]) -> None:
                for (name, spec), rows in zip(self._specs.items(), given, strict=False):
                    file.write(name, rows.to(spec.dtype))

            for name, module in model.named_modules():
                if isinstance(module, Experts):
                    plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                    file = files.enter_context(Writer(folder / f"{plain}.safetensors", self._specs))
                    module.register_forward_pre_hook(partial(keep, file))
            with progress("calibrating", len(self._texts), "rows") as advance:
                for reading in readings(model, self._texts, _TOKENS):
                    model(**reading.inputs, use_cache=False, logits_to_keep=1)
                    advance(len(reading.places))
        seconds = time.perf_counter() - started
        rows = counted(len(self._texts), "row")
        say(f"calibrated on {self.tokens:,} tokens of {rows}: {seconds:.1f} s with loading the model")
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def given(self, experts: str, device: torch.device, first_product: FirstProduct | None = None) -> Given:
        """What some experts' first projection is given, or their second where the first one's merged weights are at
        hand; an input's importance is the square of its weight in its token's sum.

        Args:
            experts: name of the module in the checkpoint.
            device: where it is computed.
            first_product: weights and bias of the first projection.
        """
        assert self.folder is not None, "collected first"
        seen = load_file(self.folder / f"{experts}.safetensors", device=str(device))
        hidden_TH, index_TK, weight_TK = seen["hidden"], seen["index"], seen["weight"]

        def given(first: int, last: int) -> Inputs:
            product = first_product(first, last) if first_product else None
            rows, importance = [], []
            for expert in range(first, last):
                token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
                rows_NI = hidden_TH[token_N].float()
                if product is not None:
                    weight_OI, bias_O = (side[expert - first] for side in product)
                    rows_NI = self._swiglu(torch.addmm(bias_O, rows_NI, weight_OI.T))
                rows.append(rows_NI)
                importance.append(weight_TK[token_N, slot_N].square())
            return Inputs.of(rows, importance)

        return given
