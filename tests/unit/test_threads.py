"""Threads that share cores: the wait policy before torch loads, and how many cores there are to use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ossia.threads import WAIT_VARIABLES, allowed_cores, share_cores

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def free(monkeypatch):
    """An environment in which nothing is chosen yet."""
    for name in (*WAIT_VARIABLES, "OMP_NUM_THREADS", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_threads_sleep_unless_the_user_chose(free):
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    for name in WAIT_VARIABLES:
        free.delenv("OMP_WAIT_POLICY", raising=False)
        free.setenv(name, "ACTIVE")
        share_cores()
        assert {key: os.environ.get(key) for key in WAIT_VARIABLES if key in os.environ} == {name: "ACTIVE"}
        free.delenv(name)


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_openmp_hears_it_before_torch_loads(free, chosen):
    """GNU's OpenMP shows what it goes by when it loads."""
    code = (
        "import sys; from ossia.cli import main; assert 'torch' not in sys.modules; main(['--version']); import torch"
    )
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE", **chosen}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not have GNU's OpenMP")
    assert f"OMP_WAIT_POLICY = '{chosen.get('OMP_WAIT_POLICY', 'PASSIVE')}'" in done.stderr
    assert ("GOMP_SPINCOUNT = '0'" in done.stderr) == (not chosen)


def cgroup(root, groups):
    """Files of cgroup v2, by group: what `cpu.max` says."""
    for name, text in groups.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "cpu.max").write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ({}, "", HERE),
        ({".": "max 100000"}, "0::/\n", HERE),
        ({".": "50000 100000"}, "0::/\n", 1),
        ({"a": "100000 100000", "a/b": "max 100000"}, "0::/a/b\n", 1),
        ({"a": "6400000 100000", "a/b": "150000 100000"}, "12:cpu:/x\n0::/a/b\n", min(2, HERE)),
        ({"a": "10000 100000"}, "0::/elsewhere\n", HERE),
        ({"a": "nonsense"}, "0::/a\n", HERE),
        ({".": "100000 100000"}, "0::/../../outside\n", 1),
    ],
)
def test_a_quota_of_a_container(tmp_path, groups, own, expected):
    file = tmp_path / "own"
    file.write_text(own)
    assert allowed_cores(cgroup(tmp_path / "cgroup", groups), file) == expected


def test_a_quota_of_the_older_kind(tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 100_000), ("period", 100_000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert allowed_cores(tmp_path, tmp_path / "none") == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert allowed_cores(tmp_path, tmp_path / "none") == HERE


def test_a_quota_sets_torchs_threads_but_not_those_of_a_user(free):
    free.setattr("ossia.threads.allowed_cores", lambda: 1)
    free.setattr("ossia.threads._cores_to_run_on", lambda: 8)
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    free.setenv("OMP_NUM_THREADS", "5")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "5"
    free.delenv("OMP_NUM_THREADS")
    free.setenv("NPROC_PER_NODE", "2")
    share_cores()
    assert "OMP_NUM_THREADS" not in os.environ
