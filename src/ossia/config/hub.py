"""Options of a push to a hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ossia.config.base import FALSE, TRUE, opt
from ossia.errors import UsageError

HUB_TITLES = {"hub": "push to a hub"}

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@dataclass
class HubOptions:
    """Where a result is pushed to, and who may see it there."""

    push_to_hub: str = opt("false", "org/name to push to; or true, with --hub_model_id", group="hub")
    hub_model_id: str | None = opt(None, "org/name of the repository", group="hub")
    hub_token: str | None = opt(
        None,
        "token that may write; better kept in HF_TOKEN or by `hf auth login`, for ModelScope in MODELSCOPE_API_TOKEN",
        group="hub",
        secret=True,
    )
    hub_private_repo: bool = opt(
        True, "new repositories are private; false: public, and pushing to a public one is meant", group="hub"
    )
    use_hf: bool = opt(True, "Hugging Face; false: ModelScope", group="hub")

    @property
    def pushes(self) -> bool:
        return self.push_to_hub == "true"

    def validate_hub(self) -> None:
        """Of all forms, `push_to_hub` is left as true or false, and `hub_model_id` says where to."""
        word = self.push_to_hub.lower()
        if word not in TRUE + FALSE:
            if self.hub_model_id not in (None, self.push_to_hub):
                raise UsageError(f"--push_to_hub {self.push_to_hub} and --hub_model_id {self.hub_model_id}: give one")
            self.hub_model_id = self.push_to_hub
        self.push_to_hub = "false" if word in FALSE else "true"
        if self.pushes and self.hub_model_id is None:
            raise UsageError("--push_to_hub true needs --hub_model_id org/name")
        if self.hub_model_id is None:
            return
        if not self.pushes:
            raise UsageError("--hub_model_id goes with --push_to_hub true")
        name = self.hub_model_id
        if not _REPO.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            raise UsageError(
                f"--push_to_hub got {name!r}; it takes org/name in letters, digits, - _ and ., such as me/my-model"
            )
