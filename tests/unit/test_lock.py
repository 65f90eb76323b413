"""A run's folder belongs to one process, until that process ends."""

from __future__ import annotations

import os
import time

import pytest

from ossia.errors import UsageError
from ossia.track import lock


def test_a_lock_ends_with_its_process(tmp_path, held_by_another):
    assert lock.holder(tmp_path) is None
    process = held_by_another(tmp_path)
    assert lock.holder(tmp_path).startswith(f"process {process.pid} on ")
    with pytest.raises(UsageError, match=f"process {process.pid} on .* trains there; wait for its end, or stop it"):
        lock.hold(tmp_path)
    process.kill()
    process.wait()
    assert lock.holder(tmp_path) == ""
    lock.hold(tmp_path).close()


def test_a_process_that_the_holder_started_does_not_keep_it(tmp_path, held_by_another):
    mine = lock.hold(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    mine.close()
    try:
        held_by_another(tmp_path)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_where_there_are_no_locks_nothing_is_known(tmp_path, held_by_another, monkeypatch):
    held_by_another(tmp_path)
    monkeypatch.setattr(lock, "fcntl", None)
    assert lock.holder(tmp_path) is None
    lock.hold(tmp_path).close()
