"""Options of `ossia serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ossia.config.base import Config, opt, parse_bytes
from ossia.config.parts import MODEL_TITLES, ModelOptions, TemplateOptions
from ossia.errors import UsageError


@dataclass
class ServeConfig(TemplateOptions, ModelOptions, Config):
    """Serve models over HTTP, as OpenAI's API does."""

    group_titles: ClassVar[dict[str, str]] = {
        **MODEL_TITLES,
        "template": "template",
        "serve": "address",
        "limits": "limits",
        "run": "run",
    }

    adapters: list[str] = opt(
        [],
        "checkpoint folders, or NAME=folder; each is a model of its own name, beside the base",
        group="model",
    )
    backend: str = opt(
        "ossia", "ossia: this process; vllm: vLLM on an exported model", group="model", choices=["ossia", "vllm"]
    )
    host: str = opt("127.0.0.1", "address to listen on; any but this machine's own needs --api_key", group="serve")
    port: int = opt(8000, "port; 0 takes a free one", group="serve")
    api_key: str | None = opt(
        None, "what clients must show; better in OSSIA_API_KEY, where others cannot see it", group="serve", secret=True
    )
    shutdown_timeout: float = opt(30.0, "seconds that running answers have when the server is stopped", group="serve")

    max_batch_size: int = opt(8, "answers generated at a time", group="limits")
    max_queue: int = opt(64, "answers that may wait; more are told to come back (429)", group="limits")
    max_length: int | None = opt(
        None, "tokens that a prompt and its answer may have; default: as the model", group="limits"
    )
    max_prompt_tokens: int | None = opt(None, "tokens that a prompt may have; default: --max_length", group="limits")
    max_new_tokens: int = opt(4096, "tokens that an answer may have", group="limits")
    max_messages: int = opt(1000, "messages that a conversation may have", group="limits")
    max_body_size: str = opt("4MB", "size that a request may have", group="limits")

    dry_run: bool = opt(False, "check everything, print what would be served, load nothing")

    def validate(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port is {self.port}; it must be in 0 to 65535")
        for name in ("max_batch_size", "max_new_tokens", "max_messages", "max_length", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1")
        for name in ("max_queue", "shutdown_timeout"):
            if not 0 <= getattr(self, name) < 1e9:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be 0 or more")
        parse_bytes(self.max_body_size, "--max_body_size")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("--api_key must be printable ASCII, and not empty")
        if self.model is None and not self.adapters:
            raise UsageError("give --model DIR, or --adapters RUN/checkpoint-N")

    def base_name(self, folder: Path) -> str:
        """The name under which requests ask the base model: its hub id, or the name of its folder."""
        local = self.model is None or Path(self.model).expanduser().is_dir()
        return folder.name if local else str(self.model)
