"""Folders of runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ossia.errors import UsageError
from ossia.train.folder import new_run_folder, numbered_runs


def test_runs_that_begin_in_the_same_moment_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder(str(tmp_path / "out"), True), range(8)))
    assert len(set(folders)) == 8
    assert sorted(path for _, path in numbered_runs(tmp_path / "out")) == sorted(folders)


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match=r"--output_dir .*out: cannot be written"):
        new_run_folder(str(tmp_path / "out"), True)
