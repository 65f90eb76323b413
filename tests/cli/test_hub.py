"""`--push_to_hub`, by the hubs' own clients, against stand-ins of their servers on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from tests import hubs
from tests.hubs import TOKEN

from ossia.config import ExportConfig
from ossia.errors import OssiaError
from ossia.export import run as export_run

BASE = "openai/gpt-oss-20b"


@pytest.fixture
def hub():
    with hubs.served(hubs.HuggingFace) as stand:
        yield stand


@pytest.fixture
def at(hub, tmp_path):
    """The environment in which a command meets the stand-in."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }  # fmt: skip


def adapter_at(folder, base, size=8):
    """A checkpoint as a run leaves it, with two megabytes and more where `size` is large."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["a"],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.rand(size, 1024)}, folder / "adapter_model.safetensors")
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(folder), "pad_token": "x"}))
    (folder / "README.md").write_text(f"base_model: {base}")
    (folder / "global_step7").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("private")
    return folder


@pytest.fixture
def adapter(tmp_path):
    return adapter_at(tmp_path / "run" / "checkpoint-7", BASE)


@pytest.fixture
def model(tiny_gpt_oss, tmp_path):
    """A model folder with two weight files that are sent one by one."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for file in tiny_gpt_oss.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        save_file({name: torch.rand(1100, 1024)}, folder / f"{name}.safetensors")
    (folder / "README.md").write_text("---\ntags:\n- lora\n---\n# A model\n")
    (folder / "notes.txt").write_text("private")
    return folder


def test_an_adapter_goes_up_without_what_is_private(ossia, hub, at, adapter, tmp_path):
    out = ossia("export", "--adapters", adapter, "--push_to_hub", "me/adapter", env=at)
    assert out.returncode == 0, out.stderr
    assert hub.repos == {"me/adapter": True}
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "README.md"}
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (adapter / weights).read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(hub.files["tokenizer_config.json"]) == {"pad_token": "x"}
    card = hub.files["README.md"].decode()
    assert f"base_model: {BASE}\nlibrary_name: peft" in card
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card
    for body in hub.bodies:
        assert b"private\n" not in body
        assert str(tmp_path).encode() not in body
        assert TOKEN.encode() not in body
    assert TOKEN not in out.stdout + out.stderr
    assert "\r" not in out.stderr
    assert f"pushed: {hub.url}/me/adapter (private; " in out.stdout


def test_a_base_in_a_folder_is_asked_for_by_its_name(ossia, hub, at, tiny_gpt_oss, tmp_path):
    adapter = adapter_at(tmp_path / "checkpoint-1", tiny_gpt_oss)
    said = ossia.fails(2, "export", "--adapters", adapter, "--push_to_hub", "me/adapter", env=at)
    assert "--model openai/gpt-oss-20b" in said
    assert hub.requests == []
    ossia.ok("export", "--adapters", adapter, "--push_to_hub", "true", "--hub_model_id", "me/adapter", "--model", BASE,
             env=at)  # fmt: skip
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_a_dry_run_asks_nobody(ossia, hub, at, adapter):
    del at["HF_TOKEN"]
    out = ossia.ok("export", "--adapters", adapter, "--push_to_hub", "me/adapter", "--dry_run", "true", env=at)
    assert hub.requests == []
    assert "would push to me/adapter on Hugging Face (private, or as it is" in out
    assert "total: 4 files" in out
    assert re.search(r"adapter_model.safetensors +32\.8 kB", out)
    assert "optimizer.pt stays here: only needed to resume the run" in out
    assert "global_step7 stays here: a folder" in out


def test_a_broken_push_goes_on_with_what_is_missing(ossia, hub, at, model):
    command = ("export", "--model", model, "--push_to_hub", "me/model", "--hub_private_repo", "false")
    hub.refuse_blobs_after = 1
    assert "403" in ossia.fails(1, *command, env=at)
    assert len(hub.stored) == 1
    assert hub.files == {}, "nobody sees half a model"
    hub.refuse_blobs_after = None
    hub.drop_next_blob = True
    ossia.ok(*command, env=at)
    assert len(hub.stored) == len(set(hub.stored)) == 2
    going = {file.name for file in model.iterdir()} - {"notes.txt"}
    assert hub.files == {name: (model / name).read_bytes() for name in going}
    assert hub.repos == {"me/model": False}


def test_a_public_repository_is_not_pushed_to_by_default(ossia, hub, at, adapter):
    hub.repos["me/adapter"] = False
    command = ("export", "--adapters", adapter, "--push_to_hub", "me/adapter")
    assert "--hub_private_repo false" in ossia.fails(2, *command, env=at)
    assert hub.files == {}
    ossia.ok(*command, "--hub_private_repo", "false", env=at)
    assert "README.md" in hub.files
    assert hub.repos == {"me/adapter": False}


def test_a_private_repository_stays_private(ossia, hub, at, adapter):
    hub.repos["me/adapter"] = True
    ossia.ok("export", "--adapters", adapter, "--push_to_hub", "me/adapter", "--hub_private_repo", "false", env=at)
    assert hub.repos == {"me/adapter": True}
    assert "create" not in " ".join(hub.requests)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"whoami": 401}, "does not take the token (401); set HF_TOKEN or run `hf auth login`"),
        ({"repos/create": 403}, "may not write to"),
        ({"preupload": 403}, "may not write to"),
        ({"repos/create": 404}, "not found (404)"),
        ({"commit": 409}, "is being changed by somebody else (409)"),
        ({"commit": 500}, "is out of order (500); the same command sends what is missing"),
    ],
)
def test_what_a_hub_says_against_it_is_one_line(ossia, hub, at, adapter, answers, message):
    hub.answers = answers
    said = ossia.fails(1, "export", "--adapters", adapter, "--push_to_hub", "me/adapter", env=at)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    done = ossia("export", "--adapters", adapter, "--push_to_hub", "me/adapter", "--debug", env=at)
    assert TOKEN not in said + done.stdout + done.stderr


def test_tokens_are_asked_for_and_never_shown(ossia, hub, at, adapter, tmp_path):
    command = ("export", "--adapters", adapter, "--push_to_hub", "me/adapter")
    without = {**at, "HF_TOKEN": ""}
    assert "no token to push with: set HF_TOKEN" in ossia.fails(2, *command, env=without)
    assert hub.requests == []
    hub.role = "read"
    assert "may only read" in ossia.fails(2, *command, "--hub_token", TOKEN, env=without)
    hub.role = "write"
    assert TOKEN not in ossia.ok(*command, "--hub_token", TOKEN, env=without)
    done = ossia(*command, "--hub_token", f"{TOKEN} {TOKEN}", "--debug", env=without)
    assert done.returncode == 2
    assert TOKEN not in done.stdout + done.stderr
    (tmp_path / "c.yaml").write_text(f"hub_token: {TOKEN}: x\n")
    assert TOKEN not in ossia.fails(2, *command, "--config", tmp_path / "c.yaml")
    config = ExportConfig(adapters="a", push_to_hub="me/adapter", hub_token=TOKEN)
    assert TOKEN not in repr(config) + config.to_yaml()


def test_no_network_is_said(ossia, at, adapter):
    command = ("export", "--adapters", adapter, "--push_to_hub", "me/adapter")
    said = ossia.fails(1, *command, env={**at, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "cannot be reached" in said
    assert "HF_HUB_OFFLINE" in ossia.fails(2, *command, env={**at, "HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--push_to_hub", "me"], "it takes org/name"),
        (["--push_to_hub", "me/a--b"], "it takes org/name"),
        (["--push_to_hub", "https://huggingface.co/me/x"], "it takes org/name"),
        (["--push_to_hub", "true"], "needs --hub_model_id"),
        (["--push_to_hub", "me/a", "--hub_model_id", "me/b"], "give one"),
        (["--hub_model_id", "me/b"], "goes with --push_to_hub true"),
        ([], "--push_to_hub org/name"),
    ],
)
def test_bad_flags_are_said(ossia, adapter, args, message):
    assert message in ossia.fails(2, "export", "--adapters", adapter, *args)


def test_folders_that_are_no_models_are_not_pushed(ossia, model, adapter):
    command = ("export", "--push_to_hub", "me/model", "--dry_run", "true", "--model")
    assert "no such folder" in ossia.fails(2, *command, "me/other")
    assert "--adapters" in ossia.fails(2, *command, adapter)
    (model / "verification.json").write_text('{"verified": false}')
    assert "not verified" in ossia.fails(1, *command, model)
    out = ossia.ok(*command, model, "--verify", "false")
    assert "notes.txt stays here: no part of the model" in out
    assert "verification.json" in out


@pytest.fixture
def trained(tiny_gpt_oss, tmp_path):
    """An adapter of the tiny model that changes nothing."""
    from ossia.adapters.inject import add_lora
    from ossia.adapters.io import save_adapter
    from ossia.model.load import load_model

    save_adapter(add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=3), tmp_path / "ck", str(tiny_gpt_oss))
    return tmp_path / "ck"


@pytest.mark.slow
def test_a_merged_model_is_proved_and_pushed_and_not_merged_twice(ossia, hub, at, trained, tmp_path):
    command = ("export", "--adapters", trained, "--merge_lora", "true", "--format", "bf16", "--torch_dtype", "float32",
               "--output_dir", tmp_path / "out", "--push_to_hub", "me/merged")  # fmt: skip
    assert "*.safetensors" in ossia.ok(*command, "--dry_run", "true", env=at)
    assert not (tmp_path / "out").exists()
    hub.answers = {"repos/create": 403}
    ossia.fails(1, *command, env=at)
    assert not (tmp_path / "out").exists(), "leave to write is asked for before anything is merged"
    hub.answers = {"/commit/": 500}
    assert "is not merged again" in ossia.fails(1, *command, env=at)
    assert hub.files == {}
    hub.answers = {}
    assert "merged before" in ossia.ok(*command, env=at)
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert json.loads(hub.files["verification.json"])["verified"]
    assert 'from_pretrained("me/merged"' in hub.files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(hub.bodies)
    assert "already there" in ossia.fails(2, *command, env=at)


def test_what_is_not_verified_is_not_pushed(trained, tmp_path, monkeypatch):
    def fail(*args):
        raise OssiaError("not verified")

    monkeypatch.setattr(export_run, "_verify", fail)
    monkeypatch.setattr(export_run, "open_hub", lambda config: None)
    monkeypatch.setattr(export_run, "push", lambda *args: pytest.fail("pushed"))
    config = ExportConfig(
        adapters=[str(trained)], merge_lora=True, push_to_hub="me/x", output_dir=str(tmp_path / "out")
    )
    with pytest.raises(OssiaError, match="not verified"):
        export_run.run(config)


class TestModelScope:
    """The same on ModelScope, whose client takes an endpoint without TLS."""

    pytestmark = pytest.mark.skipif(
        importlib.util.find_spec("modelscope_hub") is None, reason="modelscope 1.40 or later is not installed"
    )

    @pytest.fixture
    def hub(self):
        with hubs.served(hubs.ModelScope) as stand:
            yield stand

    @pytest.fixture
    def at(self, hub, tmp_path):
        return {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_API_TOKEN": TOKEN, "MODELSCOPE_HOME": str(tmp_path / "ms"),
                "HOME": str(tmp_path)}  # fmt: skip

    def test_an_adapter_goes_up_without_what_is_private(self, ossia, hub, at, adapter, tmp_path):
        out = ossia("export", "--adapters", adapter, "--push_to_hub", "me/a", "--use_hf", "false", env=at)
        assert out.returncode == 0, out.stderr
        assert hub.repos == {"me/a": True}
        assert set(hub.files) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer_config.json",
            "README.md",
        }
        assert hub.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
        assert str(tmp_path).encode() not in b"".join(hub.bodies)
        assert TOKEN not in out.stdout + out.stderr
        assert "\r" not in out.stderr

    def test_a_broken_push_goes_on_with_what_is_missing(self, ossia, hub, at, model):
        command = ("export", "--model", model, "--push_to_hub", "me/model", "--use_hf", "false")
        hub.answers = {"/commit/": 403}
        assert "403" in ossia.fails(1, *command, env=at)
        sent = list(hub.stored)
        assert len(sent) == 2
        hub.answers = {}
        ossia.ok(*command, env=at)
        assert hub.stored == sent
        assert hub.files == {f.name: f.read_bytes() for f in model.iterdir() if f.name != "notes.txt"}

    def test_tokens_and_public_repositories(self, ossia, hub, at, adapter):
        command = ("export", "--adapters", adapter, "--push_to_hub", "me/a", "--use_hf", "false")
        said = ossia.fails(2, *command, env={**at, "MODELSCOPE_API_TOKEN": ""})
        assert "MODELSCOPE_API_TOKEN" in said
        assert "(401)" in ossia.fails(1, *command, "--hub_token", "wrong", env=at)
        hub.repos["me/a"] = False
        assert "--hub_private_repo false" in ossia.fails(2, *command, env=at)
        assert "dry run" in ossia.ok(*command, "--dry_run", "true", env={**os.environ, "MODELSCOPE_API_TOKEN": ""})
        assert hub.files == {}


def test_modelscope_is_named_where_it_is_missing(ossia, adapter, tmp_path):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError('none')")
    said = ossia.fails(
        2, "export", "--adapters", adapter, "--push_to_hub", "me/a", "--use_hf", "false",
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert "pip install 'modelscope>=1.40'" in said
