"""Bodies that nobody meant, from schemathesis on the server's own OpenAPI document; none may give a 500.

python -m benchmarks.serve.fuzz [--cases 5000] [--out FILE.json]

Cases are spread over the operations that take a body and over well-formed and ill-formed ones; the engine behind is the
scripted one of the tests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
import torch
from benchmarks.serve.load import finish
from schemathesis.generation import GenerationMode
from tests import tiny
from tests.served import Server, scripted

GOOD = {
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}], "logprobs": True},
    "/v1/completions": {"model": "base", "prompt": "hi"},
    "/v1/responses": {"model": "base", "input": "hi"},
}


def fuzz(server: Server, cases: int, seed: int = 0) -> dict[str, Any]:
    """Counts by status of about `cases` requests, and the bodies that gave 500 or above."""
    document = json.loads(server.get("/openapi.json"))
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.method.lower() == "post"]
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    share = max(cases // (2 * len(operations)), 1)
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=share,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                if isinstance(case.body, dict) and len(case.body) % 2:
                    # Said well, so that the rest of the body is looked at.
                    case.body |= GOOD[case.operation.path]
                answer = case.call(base_url=server.url, timeout=60)
                statuses[str(answer.status_code)] += 1
                if answer.status_code >= 500:
                    failures.append(case.as_curl_command()[:2000])

            one()
    return {"cases": sum(statuses.values()), "statuses": dict(sorted(statuses.items())), "failures": failures[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.gpt_oss(Path(folder) / "model")
        started = time.monotonic()
        with scripted(model) as server:
            found = fuzz(server, args.cases)
            assert server.process.poll() is None
    finish(args.out, torch.device("cpu"), {"seconds": round(time.monotonic() - started, 1), **found})


if __name__ == "__main__":
    main()
