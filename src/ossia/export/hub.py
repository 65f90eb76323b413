"""Pushing to Hugging Face or ModelScope: what of a folder goes there, whether it may, and the sending.

Weights are stored by their hash before the commit that names them. So a stopped push changes nothing that others see,
and the same command sends only what is not stored yet.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ossia.adapters.files import CONFIG as ADAPTER_CONFIG
from ossia.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from ossia.config import ExportConfig
from ossia.console import Advance, counted, plain, progress, say, shown_bytes
from ossia.errors import OssiaError, UsageError
from ossia.export.card import CARD, CURVE, write_card
from ossia.export.folder import BESIDE_WEIGHTS, INDEX, REPORT, write_json, write_json_of
from ossia.export.verify import RESULT
from ossia.model.folder import HUB_ID, read_json

MODEL_FILES = (
    "config.json", "*.safetensors", INDEX, "*.gguf", "Modelfile", CARD, CURVE, RESULT, REPORT, *BESIDE_WEIGHTS,
)  # fmt: skip
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *BESIDE_WEIGHTS)

_TO_RESUME = ("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state.json", "training_args.bin")
_ALONE_FROM = 4_000_000
"""Bytes from which a file is sent by itself, so that progress has something to tell."""
_AGAIN = "the same command sends what is missing"


class Hub(Protocol):
    """A repository that may be written to."""

    title: str
    url: str
    private: bool

    def send(self, files: list[Path], advance: Advance) -> None:
        """Send files into the repository's root; `advance` is told MB."""


def open_hub(config: ExportConfig) -> Hub:
    """Check the token, make the repository where it is missing, and check that it may be written to.

    Raises:
        UsageError: no token, or a public repository where a private one was asked for.
        OssiaError: what the hub says against it.
    """
    hub: Hub = _HuggingFace(config) if config.use_hf else _ModelScope(config)
    if not hub.private and config.hub_private_repo:
        raise UsageError(
            f"{hub.url} is there already and public, so everyone would see this; give --hub_private_repo false if "
            "that is meant, or push to another name"
        )
    say(f"pushing to {hub.url} ({_seen(hub.private)})")
    return hub


def push(hub: Hub, folder: Path) -> None:
    """Send a staged folder."""
    files = sorted(folder.iterdir())
    total = sum(file.stat().st_size for file in files)
    say(f"sending {counted(len(files), 'file')}, {shown_bytes(total)}")
    started = time.monotonic()
    try:
        with _progress(total) as advance:
            hub.send(files, advance)
    except KeyboardInterrupt:
        say(f"stopped; {_AGAIN}")
        raise
    say(f"pushed: {hub.url} ({_seen(hub.private)}; {shown_bytes(total)} in {time.monotonic() - started:.0f} s)")


@contextmanager
def staged_model(folder: Path) -> Iterator[Path]:
    """What of a model folder is pushed, as a folder of links."""
    with TemporaryDirectory() as name:
        _stage(folder, MODEL_FILES, Path(name))
        yield Path(name)


@contextmanager
def staged_adapter(adapter: Path, base: str, repo: str) -> Iterator[Path]:
    """What of a checkpoint is pushed, with a card; its configuration names the base by its name on a hub."""
    if not HUB_ID.fullmatch(base) or Path(base).exists():
        raise UsageError(
            f"{adapter / ADAPTER_CONFIG} names its base by a folder of this machine ({base}), where nobody else finds "
            "it; give the base's name on the hub, such as --model openai/gpt-oss-20b"
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        _stage(adapter, ADAPTER_FILES, folder)
        write_json(folder / ADAPTER_CONFIG, read_json(adapter / ADAPTER_CONFIG) | {"base_model_name_or_path": base})
        write_card(folder, base, adapter, None, repo)
        yield folder


def show(config: ExportConfig, files: dict[str, str], source: Path | None) -> None:
    """Print what a dry run finds: files and their sizes, where they would go, and what stays in `source` and why."""
    if config.pushes:
        title = _HuggingFace.title if config.use_hf else _ModelScope.title
        seen = _seen(config.hub_private_repo)
        say(f"would push to {config.hub_model_id} on {title} ({seen}, or as it is where it is there already)")
    width = max(map(len, files))
    for name, size in files.items():
        say(f"  {name:<{width}}  {size}")
    for name, reason in staying(source, files).items() if source is not None else ():
        say(f"  {name} stays here: {reason}")
    say("dry run: nothing was written or sent")


def sizes(folder: Path) -> dict[str, str]:
    """Each file of a staged folder, and their total."""
    found = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return {name: shown_bytes(size) for name, size in found.items()} | {
        f"total: {counted(len(found), 'file')}": shown_bytes(sum(found.values()))
    }


def staying(folder: Path, going: dict[str, str]) -> dict[str, str]:
    """Why each other thing in a folder is not pushed."""
    return {path.name: _reason(path) for path in sorted(folder.iterdir()) if path.name not in going}


def _seen(private: bool) -> str:
    return "private" if private else "public"


def _reason(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if any(fnmatch(path.name, pattern) for pattern in _TO_RESUME):
        return "only needed to resume the run"
    return "no part of the model"


def _stage(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """Links to the files that match; JSON files are copied, without paths of this machine."""
    for file in source.iterdir():
        if not file.is_file() or not any(fnmatch(file.name, pattern) for pattern in patterns):
            continue
        if file.suffix == ".json":
            write_json_of(file, folder, read_json(file))
        else:
            (folder / file.name).symlink_to(file.resolve())


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """A hub's own bars on a terminal, which know the bytes within a file; elsewhere plain lines."""
    if sys.stderr.isatty():
        yield lambda amount: None
    else:
        with progress("sending", total / 1e6, "MB") as advance:
            yield advance


def _token(token: str | None, where: str) -> str:
    token = (token or "").strip()
    if not token:
        raise UsageError(f"no token to push with: {where}")
    if not re.fullmatch(r"[!-~]+", token):
        raise UsageError(f"the token to push with holds spaces or characters that no token has: {where}")
    return token


def _said(hub: Any, status: int | None, error: object) -> OssiaError:
    """What a hub's answer means, and what to do."""
    title, url, text = hub.title, hub.url, _text(error, hub.token)
    if status == 401:
        return OssiaError(f"{title} does not take the token (401); {hub.where}")
    if status == 403:
        return OssiaError(
            f"the token may not write to {url} (403: {text}); take one that may, or push to a name of yours"
        )
    if status == 404:
        return OssiaError(
            f"{url}: not found (404); is the user or organisation spelled right, and may this token see it?"
        )
    if status in (409, 412):
        return OssiaError(f"{url} is being changed by somebody else ({status}); {_AGAIN}")
    if status is not None and status >= 500:
        return OssiaError(f"{title} is out of order ({status}); {_AGAIN}")
    if status is not None:
        return OssiaError(f"{url}: refused ({status}: {text})")
    if isinstance(error, ValueError):
        return OssiaError(f"{url}: refused ({text})")
    if isinstance(error, OSError) and error.filename:
        return OssiaError(f"{error.filename}: not readable ({error.strerror})")
    return OssiaError(f"{title} cannot be reached ({text}); with a network, {_AGAIN}")


class _HuggingFace:
    title = "Hugging Face"
    where = "set HF_TOKEN or run `hf auth login`, with a token that may write (https://huggingface.co/settings/tokens)"

    def __init__(self, config: ExportConfig) -> None:
        import huggingface_hub
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        # Its retries are told with addresses that are as good as a token for an hour.
        huggingface_hub.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        self.repo = str(config.hub_model_id)
        self.token = _token(config.hub_token or huggingface_hub.get_token(), self.where)
        self.api = HfApi(token=self.token)
        self.url = f"{self.api.endpoint}/{self.repo}"
        with self._errors():
            access = (self.api.whoami().get("auth") or {}).get("accessToken") or {}
            if access.get("role") == "read":
                raise UsageError(f"this token may only read; {self.where}")
            try:
                self.private = bool(self.api.model_info(self.repo).private)
            except RepositoryNotFoundError:
                self.api.create_repo(self.repo, private=config.hub_private_repo, exist_ok=True)
                self.private = config.hub_private_repo
            # Asks how a small file would be sent, which needs leave to write, and sends nothing.
            self.api.preupload_lfs_files(self.repo, [CommitOperationAdd(CARD, b"\n")])

    def send(self, files: list[Path], advance: Advance) -> None:
        from huggingface_hub import CommitOperationAdd

        with self._errors():
            operations = [CommitOperationAdd(file.name, str(file.resolve())) for file in files]
            large = [operation for operation in operations if operation.upload_info.size >= _ALONE_FROM]
            for operation in large:
                self.api.preupload_lfs_files(self.repo, [operation], free_memory=False)
                advance(operation.upload_info.size / 1e6)
            self.api.create_commit(self.repo, operations, commit_message="Push with Ossia")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled:
            raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from None
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause: BaseException = error
            while getattr(cause, "response", None) is None and cause.__cause__ is not None:
                cause = cause.__cause__
            status = getattr(getattr(cause, "response", None), "status_code", None)
            raise _said(self, status, getattr(cause, "server_message", None) or cause) from None


class _ModelScope:
    title = "ModelScope"
    where = (
        "set MODELSCOPE_API_TOKEN or run `modelscope login`, with a token that may write "
        "(https://modelscope.cn/my/myaccesstoken)"
    )

    def __init__(self, config: ExportConfig) -> None:
        try:
            from modelscope_hub import HubApi
            from modelscope_hub.config import HubConfig
            from modelscope_hub.errors import NotExistError
            from modelscope_hub.types import Visibility
        except ImportError as error:
            raise UsageError(
                f"--use_hf false: needs modelscope 1.40 or later ({error}); pip install 'modelscope>=1.40'"
            ) from error
        self.repo = str(config.hub_model_id)
        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
        settings = HubConfig(token=config.hub_token)
        self.token = _token(settings.token, self.where)
        self.api = HubApi(settings)
        self.url = f"{settings.endpoint}/models/{self.repo}"
        with self._errors():
            self.api.whoami()
            try:
                self.private = self.api.get_repo(self.repo, "model").visibility == Visibility.PRIVATE
            except NotExistError:
                self.private = config.hub_private_repo
                self.api.create_repo(self.repo, "model", visibility="private" if self.private else "public")

    def send(self, files: list[Path], advance: Advance) -> None:
        def told(event: dict[str, Any]) -> None:
            if event.get("event") == "batch_committed":
                advance(event.get("batch_bytes", 0) / 1e6)

        with self._errors():
            self.api.upload_folder(
                self.repo,
                "model",
                files[0].parent,
                commit_message="Push with Ossia",
                use_cache=False,
                disable_tqdm=not sys.stderr.isatty(),
                progress_callback=told,
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from modelscope_hub.errors import HubError

        try:
            yield
        except (HubError, OSError, RuntimeError, ValueError) as error:
            raise _said(self, getattr(error, "status_code", None), error) from None


def _text(error: object, token: str) -> str:
    """An error in one line, without the token, addresses' secrets and control characters."""
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", str(error).replace(token, "***"))
    return plain(" ".join(text.split()))[:300] or type(error).__name__
