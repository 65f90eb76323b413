"""`ossia plan`: what it says of memory, time, disk and changes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.train import table
from tests import tiny

from ossia.cli import main
from ossia.config import PlanConfig, SftConfig
from ossia.config.base import parse_bytes
from ossia.model.sizes import SIZES
from ossia.plan import here, rates
from ossia.plan.base import find_base
from ossia.plan.job import Job
from ossia.plan.run import report
from ossia.train import gpus, pace
from ossia.train.plan import Parts

CASES = [
    pytest.param(result, file.name, id=f"{file.stem} {result['case']}")
    for file in sorted(table.RESULTS.glob("*.json"))
    for result in json.loads(file.read_text(encoding="utf-8"))["results"]
    if result["program"].startswith("ossia") and "peak_bytes" in result and not table.is_tutorial(result)
]
TUTORIAL = [
    pytest.param(result, data["row_tokens"], id=f"{file.stem} {result['case']}")
    for file in sorted(table.RESULTS.glob("*.json"))
    if "row_tokens" in (data := json.loads(file.read_text(encoding="utf-8")))
    for result in data["results"]
    if result["program"].startswith("ossia") and table.is_tutorial(result)
]


@pytest.fixture(autouse=True)
def no_gpu_and_no_network(monkeypatch, tmp_path):
    """Nothing of this machine decides a test, and no test reaches out."""

    def refuse(*args, **kwargs):
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(here.shutil, "which", lambda program: None)
    monkeypatch.setenv("OSSIA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def plan(tmp_path, capsys):
    """`plan(*flags)`: exit code, figures (None where there are none), what was printed."""

    def run(*flags):
        out = tmp_path / "plan.json"
        out.unlink(missing_ok=True)
        code = main(["plan", *map(str, flags), "--result_path", str(out), "--output_dir", str(tmp_path / "output")])
        captured = capsys.readouterr()
        figures = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
        return code, figures, captured.out + captured.err

    return run


# memory and rates, against what was measured


def flags_of(result):
    """Those of a benchmark's case."""
    flags = result.get("flags") or [
        f"--{name}={result[name]}" for name in ("gradient_checkpointing", "memory_budget", "lora_rank")
    ]
    if "--packing" not in flags:
        flags = ["--max_length", result["length"], *flags]
    model = f"openai/gpt-oss-{result.get('size', '20b')}"
    return ["--model", model, "--per_device_train_batch_size", result["batch"], *flags]


@pytest.mark.parametrize(("result", "file"), CASES)
def test_memory_is_within_a_tenth_of_what_was_measured(plan, result, file):
    code, figures, said = plan(*flags_of(result), "--gpu", "H100")
    assert code == 0, said
    [gpu] = figures["gpus"]
    assert gpu["peak"] == pytest.approx(result["peak_bytes"], rel=0.1)
    assert sum(gpu["parts"].values()) == gpu["peak"]
    # What a process takes beside the plan grew with the program.
    if file == table.NEWEST and "host_peak_bytes" in result:
        assert gpu["host"] == pytest.approx(result["host_peak_bytes"], rel=0.1)


@pytest.mark.parametrize(("result", "row_tokens"), TUTORIAL)
def test_steps_of_short_rows_are_within_a_twentieth_in_memory(result, row_tokens):
    """And roughly in time: of evaluations nothing is said, and of four cards each waits for the slowest."""
    flags = [*result["flags"], "--per_device_train_batch_size", str(result["batch"])]
    flags += ["--gradient_accumulation_steps", str(result["accumulated"]), "--model", "gpt-oss-20b"]
    config = PlanConfig.from_args(flags, "plan", "")
    job = Job(config, find_base("gpt-oss-20b"), np.array(row_tokens), processes=result.get("processes", 1))
    [place] = here.places(["H100"])
    [gpu] = report(job, [place])["gpus"]
    assert gpu["peak"] == pytest.approx(result["peak_bytes"], rel=0.05)
    if "evaluation" not in result["case"] and "processes" not in result:
        assert gpu["speed"]["tokens_per_second"] == pytest.approx(result["tokens_per_second"], rel=0.2)


def test_rates_that_come_with_ossia_are_the_measured_ones():
    assert table.rates() == rates.RATES.read_text(encoding="utf-8"), "python benchmarks/train/table.py --write"
    expected: dict[str, int] = {}
    for file in table.FILES:
        for result in json.loads((table.RESULTS / file).read_text(encoding="utf-8"))["results"]:
            uneven = "packed" in result["case"] or table.is_tutorial(result)
            if result["program"] == "ossia sft" and "failed" not in result and not uneven:
                expected.setdefault(result["case"], result["tokens_per_second"])
    assert [case.tokens_per_second for case in rates.measured() if case.size == "20b"] == list(expected.values())


def test_a_measured_case_has_its_measured_rate_and_others_an_estimate(plan):
    entry = json.loads(rates.RATES.read_text(encoding="utf-8"))[0]
    flags = ["--model", f"gpt-oss-{entry['size']}", *entry["flags"]]
    _, figures, said = plan(*flags, "--gpu", "H100", "H200")
    measured, estimated = (gpu["speed"] for gpu in figures["gpus"])
    assert measured["tokens_per_second"] == entry["tokens_per_second"]
    assert (measured["measured"], estimated["measured"]) == (True, False)
    assert f"as measured: {entry['tokens_per_second']:,}" in said
    assert f"commit {entry['commit']}" in said
    assert "~ estimated by work, bfloat16 peak and bandwidth, from" in said
    row = next(line for line in said.splitlines() if line.startswith("tokens/s "))
    assert row.count("~") == 1


def test_a_card_of_twice_the_rate_takes_half_the_time():
    case = rates.measured()[0]
    twice = dataclasses.replace(case.gpu, tflops=2 * case.gpu.tflops, bandwidth=2 * case.gpu.bandwidth)
    slow, fast = (rates.rate(case.plan, case.model, gpu, case.length) for gpu in (case.gpu, twice))
    tokens = case.plan.sizes.tokens
    assert slow.seconds(tokens, case.length) == pytest.approx(tokens / case.tokens_per_second)
    assert fast.seconds(tokens, case.length) == pytest.approx(slow.seconds(tokens, case.length) / 2)
    assert not fast.measured


def test_two_processes_train_twice_the_tokens(plan, monkeypatch):
    flags = ["--model", "gpt-oss-20b", "--gpu", "H100", "--max_steps", 10]
    one = plan(*flags)[1]
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    two = plan(*flags)[1]
    assert two["processes"] == 2
    gradients = [figures["gpus"][0]["parts"]["gradients"] for figures in (one, two)]
    assert gradients[1] - gradients[0] == 4 * one["trained_parameters"]
    rate = [figures["gpus"][0]["speed"]["tokens_per_second"] for figures in (one, two)]
    assert rate[1] == pytest.approx(2 * rate[0], rel=0.15)


# what would make it fit


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_length", 16384, "--gradient_checkpointing", "false", "--gpu", "16GB"],
        ["--max_length", 131072, "--gpu", "RTX 3090"],
        ["--per_device_train_batch_size", 6, "--max_length", 100000, "--gpu", "RTX 4080"],
        ["--lora_rank", 256, "--gpu", "24GB"],
        ["--lora_dropout", 0.1, "--max_length", 65536, "--gpu", "RTX 4090"],
        ["--memory_budget", "9GB", "--lora_rank", 64, "--gpu", "RTX 4090"],
        ["--memory_budget", "90GB", "--gpu", "RTX 4090"],
        ["--packing", "--packing_length", 262144, "--gpu", "L4"],
        ["--lora_rank", 512, "--max_length", 131072, "--per_device_train_batch_size", 3, "--gpu", "12GB"],
    ],
)
def test_every_change_that_is_offered_makes_it_fit(plan, flags):
    command = ["--model", "gpt-oss-20b", *flags]
    code, figures, said = plan(*command)
    assert code == 1
    assert "error: does not fit on" in said
    changes = figures["gpus"][0]["changes"]
    assert changes
    for change in changes:
        code, after, _ = plan(*command, *shlex.split(change["flags"]))
        assert code == 0, change
        assert after["gpus"][0]["peak"] == change["peak"]


def test_changes_are_the_mildest_of_their_kind(plan):
    command = ["--model", "gpt-oss-20b", "--max_length", 131072, "--gpu", "RTX 3090"]
    lengths = [
        c["options"]["max_length"] for c in plan(*command)[1]["gpus"][0]["changes"] if "max_length" in c["options"]
    ]
    assert len(lengths) == 1
    assert plan(*command, "--max_length", lengths[0] + 256)[0] == 1


def test_what_is_faster_fits_and_is_faster(plan):
    command = ["--model", "gpt-oss-20b", "--max_length", 4096, "--gpu", "H100", "--gradient_accumulation_steps", 4]
    command += ["--gradient_checkpointing", "true"]
    code, before, said = plan(*command)
    assert code == 0
    assert "--gradient_checkpointing auto" in said
    for change in before["gpus"][0]["changes"]:
        code, after, _ = plan(*command, *shlex.split(change["flags"]))
        assert code == 0
        rate = [figures["gpus"][0]["speed"]["tokens_per_second"] for figures in (before, after)]
        assert rate[1] > rate[0]
    # A pass takes no less than its launches, whatever else is changed.
    short = ["--model", "gpt-oss-20b", "--max_length", 256, "--gpu", "H100", "--per_device_train_batch_size", 4]
    figures = plan(*short)[1]
    assert figures["gpus"][0]["changes"] == []
    assert figures["gpus"][0]["speed"]["seconds_per_optimizer_step"] == pytest.approx(24 * pace.HOST_LAYER)


def test_batch_and_accumulation_are_one_plan(plan):
    """Of 64 rows a step as many go through the model together as is fastest, however the flags divide them."""
    flags = ("--model", "gpt-oss-20b", "--max_length", 512)
    counts = []
    for gpu in ("H100", "RTX 4090"):
        found = []
        for size, times in ((1, 64), (64, 1), (4, 16)):
            batch = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", times)
            found.append(plan(*flags, *batch, "--gpu", gpu)[1]["gpus"][0])
        assert found[0] == found[1] == found[2]
        counts.append(found[0]["passes_per_step"])
        assert counts[-1] >= 64 * 512 / found[0]["pass_tokens"]
    assert 2 <= counts[0] < counts[1] < 16


def test_forced_checkpointing_is_named_where_it_costs_time(plan):
    command = ["--model", "openai/gpt-oss-120b", "--gradient_checkpointing", "false", "--gpu", "H100"]
    assert plan(*command)[1]["gpus"][0]["changes"][0]["flags"] == "--gradient_checkpointing auto"


def test_what_fits_nowhere_here_names_a_gpu_that_takes_it(plan):
    code, figures, said = plan(
        "--model", "gpt-oss-20b", "--gradient_checkpointing", "false", "--gpu", "4090", "--max_length", 16384
    )
    assert code == 1
    larger = figures["gpus"][0]["larger"]
    assert f"as it is, it fits on: {larger}" in said
    assert (
        plan("--model", "gpt-oss-20b", "--gradient_checkpointing", "false", "--max_length", 16384, "--gpu", larger)[0]
        == 0
    )


# GPUs


@pytest.mark.parametrize(
    ("name", "means"),
    [("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("h100-sxm5", "H100"),
     ("H100 80GB HBM3", "H100"), ("h100 pcie", "H100 PCIe"), ("A100-SXM4-40GB", "A100 40GB"), ("A6000", "RTX A6000"),
     ("RTX 6000 Ada", "RTX 6000 Ada"), ("RTX PRO 6000 Blackwell", "RTX PRO 6000"), ("l40s", "L40S")],
)  # fmt: skip
def test_names_that_people_write(name, means):
    assert gpus.named(name).name == means


def test_every_gpu_is_found_by_its_own_name():
    for gpu in gpus.GPUS:
        assert gpus.of_device(f"NVIDIA {gpu.name}") == gpu
    assert gpus.of_device("NVIDIA A100-SXM4-40GB").bandwidth == 1555
    assert gpus.of_device("NVIDIA A100-SXM-64GB").tflops == 312
    assert gpus.of_device("NVIDIA Something 9000") is None
    assert {gpu.name for gpu in gpus.GPUS} >= set(gpus.COMMON)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 4900", "--gpu RTX 4900: unknown; did you mean 'RTX4090'?"),
        ("abacus", "--gpu abacus: unknown (known: B300"),
        ("A100", "--gpu A100: there are several, A100 80GB and A100 40GB; name one"),
        ("B300", "give that, such as --gpu 96GB"),
        ("T4", "T4 (compute capability 7.5) is older than Ampere (8.0): it has no bfloat16"),
        ("V100", "V100 (compute capability 7.0) is older than Ampere"),
        ("0GB", "--gpu got '0GB'"),
    ],
)
def test_gpus_that_are_refused(plan, name, message):
    code, figures, said = plan("--model", "gpt-oss-20b", "--gpu", "H100", name)
    assert (code, figures) == (2, None)
    assert message in said


def smi(monkeypatch, tmp_path, *lines):
    """An nvidia-smi that says this."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setattr(here.shutil, "which", lambda name: str(program))


def test_gpus_of_this_machine(plan, monkeypatch, tmp_path):
    smi(
        monkeypatch,
        tmp_path,
        "NVIDIA GeForce RTX 4090, 23000, 8.9",
        "NVIDIA GeForce RTX 4090, 9000, 8.9",
        "Tesla T4, 15000, 7.5",
    )
    code, figures, _ = plan("--model", "gpt-oss-20b")
    assert code == 0
    [gpu] = figures["gpus"]
    assert gpu["name"] == "NVIDIA GeForce RTX 4090"
    assert gpu["free"] == (23000 - 512) * 2**20
    assert gpu["budget"] == int(gpu["free"] * 0.94)
    assert gpu["speed"]
    # Only a GPU that was named makes the command fail.
    smi(monkeypatch, tmp_path, "NVIDIA GeForce RTX 4090, 5000, 8.9")
    assert plan("--model", "gpt-oss-20b")[0] == 0
    smi(monkeypatch, tmp_path, "Tesla T4, 15000, 7.5")
    code, _, said = plan("--model", "gpt-oss-20b")
    assert code == 2
    assert "Tesla T4 (compute capability 7.5) is older than Ampere" in said


def test_without_a_gpu_common_ones_are_listed(plan):
    code, figures, said = plan("--model", "openai/gpt-oss-120b")
    assert code == 0
    assert len(figures["gpus"]) == len(gpus.COMMON)
    for name in gpus.COMMON:
        assert name in said


# the model and its data


def test_models_that_cannot_be_planned(plan, tiny_llama):
    code, _, said = plan("--model", "someone/gpt-oss-20b-tuned")
    assert code == 2
    assert "not on this machine, and ossia plan downloads nothing. Give a folder" in said
    code, _, said = plan("--model", tiny_llama)
    assert code == 1
    assert "a llama model. Plans are made for gpt-oss" in said
    assert plan()[0] == 2


def test_a_configuration_alone_is_planned_as_the_known_model(plan, tmp_path):
    flags = ["--gpu", "RTX 4090", "--per_device_train_batch_size", 2]
    mxfp4, plain = tmp_path / "mxfp4", tmp_path / "plain"
    for folder, more in ((mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}), (plain, {})):
        folder.mkdir()
        tiny.dump(folder / "config.json", {**SIZES["20b"], **more})
    known, same, dequantized = (plan("--model", name, *flags)[1] for name in ("openai/gpt-oss-20b", mxfp4, plain))
    assert {**known, "model": ""} == {**same, "model": ""}
    assert dequantized["disk"]["weights"] == known["disk"]["merged"]["bf16"] > 3 * known["disk"]["weights"]


def test_rows_are_counted_as_sft_counts_them(plan, ossia, tiny_gpt_oss, rows, tmp_path):
    flags = ["--model", tiny_gpt_oss, "--dataset", rows, "--per_device_train_batch_size", 2,
             "--gradient_accumulation_steps", 3, "--num_train_epochs", 1.5, "--split_dataset_ratio", 0.2]  # fmt: skip
    code, figures, said = plan(*flags, "--gpu", "RTX 3090")
    assert code == 0
    run = tmp_path / "run"
    text = ossia.ok(
        "sft", *flags, "--output_dir", run, "--add_version", "false", "--logging_steps", 1, "--device", "cpu"
    )
    assert f"{figures['tokens_per_epoch']:,} tokens" in said
    counts = next(line for line in text.splitlines() if line.startswith("training data:"))
    assert counts in said
    assert figures["margin"] == 1
    steps = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert figures["optimizer_steps"] == max(filter(None, steps))
    saved = figures["disk"]["checkpoints_at_a_time"]
    assert saved == len(list(run.glob("checkpoint-*")))
    files = [run / "last" / name for name in ("adapter_model.safetensors", "optimizer.pt")]
    assert sum(file.stat().st_size for file in files) == pytest.approx(12 * figures["trained_parameters"], rel=0.25)


def test_rows_without_a_tokenizer_are_estimated_and_it_is_said(plan, tmp_path):
    data = tmp_path / "rows.jsonl"
    text = "The quick brown fox jumps over the lazy dog, and nobody in the village ever asked it why. "
    lines = [
        {"messages": [{"role": "user", "content": text * n}, {"role": "assistant", "content": text}]} for n in (1, 4)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, figures, said = plan("--model", "gpt-oss-20b", "--dataset", data, "--gpu", "H100")
    assert code == 0
    assert "estimated by characters" in said
    # gpt-oss's own tokenizer makes 264 and 162.
    assert figures["tokens_per_epoch"] == pytest.approx(264, rel=0.1)
    assert 162 <= figures["longest"] <= 1.4 * 162
    assert figures["rows"] == 2
    # A row that is perhaps not over the limit counts for memory.
    _, shorter, _ = plan("--model", "gpt-oss-20b", "--dataset", data, "--gpu", "H100", "--max_length", 150)
    assert shorter["longest"] == 150


def test_packing_and_padding_are_counted(plan, tiny_gpt_oss, rows):
    flags = ["--model", tiny_gpt_oss, "--dataset", rows, "--gpu", "H100", "--max_length", 512]
    _, padded, _ = plan(*flags, "--per_device_train_batch_size", 12)
    assert padded["tokens_per_epoch"] < padded["padded_tokens_per_epoch"] <= 1.03 * padded["tokens_per_epoch"]
    assert padded["longest"] < 512
    _, packed, _ = plan(*flags, "--packing")
    assert packed["longest"] == 512
    assert packed["padded_tokens_per_epoch"] <= 1.03 * packed["tokens_per_epoch"]


def test_a_hub_data_set_is_refused(plan):
    code, _, said = plan("--model", "gpt-oss-20b", "--dataset", "hf::HuggingFaceH4/Multilingual-Thinking")
    assert code == 2
    assert "ossia plan downloads nothing" in said


# the command


def test_it_takes_every_flag_of_sft(plan, tmp_path):
    known = {field.name for field in dataclasses.fields(PlanConfig)}
    assert known - {field.name for field in dataclasses.fields(SftConfig)} == {"gpu", "result_path"}
    SftConfig(model="openai/gpt-oss-20b", learning_rate=3e-4, report_to=["tensorboard"]).save(tmp_path / "config.yaml")
    assert plan("--config", tmp_path / "config.yaml", "--gpu", "H100", "--warmup_ratio", 0.1, "--bf16")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "--device cpu: plans are made for gpt-oss in bfloat16"),
        (["--attn_impl", "eager"], "--attn_impl eager: plans are made"),
        (["--target_experts", "30"], "no layer 30; this model's layers are 0 to 23"),
        (["--target_modules", "q_prok"], "did you mean 'q_proj'?"),
        (["--target_modules", "none", "--target_experts", "none"], "nothing to train"),
        (["--lora_rank", "0"], "--lora_rank is 0"),
        (["--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl: no such file"),
        (["--gpus", "H100"], "unknown flag --gpus; did you mean '--gpu'?"),
        (["--result_path", "nowhere/f.json"], "--result_path nowhere/f.json: no such folder"),
    ],
)
def test_bad_flags(capsys, flags, message):
    assert main(["plan", "--model", "gpt-oss-20b", *flags]) == 2
    assert message in capsys.readouterr().err


def test_figures_are_complete(plan):
    code, figures, said = plan(
        "--model", "openai/gpt-oss-20b", "--gpu", "RTX 4090", "--max_steps", 120, "--save_total_limit", 1
    )
    assert code == 0
    assert figures["trained_parameters"] == 92_454_912
    disk = figures["disk"]
    assert disk["weights"] == pytest.approx(13.76e9, rel=0.003)
    assert disk["merged"]["bf16"] == pytest.approx(41.8e9, rel=0.003)
    assert disk["checkpoints_at_a_time"] == 2
    assert disk["needed"] == disk["weights"] + disk["checkpoints"]
    [gpu] = figures["gpus"]
    assert set(gpu["parts"]) == set(Parts._fields)
    assert gpu["speed"]["seconds"] == pytest.approx(120 * gpu["speed"]["seconds_per_optimizer_step"])
    assert sum(gpu["recompute"].values()) == figures["layers"]
    for part in ("weights, as stored", "optimizer", "peak", "host memory", "fits"):
        assert part in said


def test_it_starts_without_torch():
    command = "from ossia.cli import main; main(['plan', '--model', 'openai/gpt-oss-20b', '--gpu', '4090'])"
    check = "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{command}; {check}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_budget_is_what_sft_reads():
    assert parse_bytes("24GB", "--gpu") == here.places(["24GB"])[0].free
    assert Path(rates.RATES).is_file()
