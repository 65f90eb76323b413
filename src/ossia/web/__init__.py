"""Pages that need nothing but themselves: one style, one chart, and a policy that lets only their own script run."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from typing import Any


def render(package: str, template: str, script: str, **values: Any) -> str:
    """A page from two templates of a package's folder; text in `values` is escaped.

    Args:
        package: the package whose folder holds both; they may include `style.css.jinja` and `chart.js.jinja`.
        template: the page. It is given `script`, and `script_hash` for its policy.
        script: what the page runs.
        values: for both templates.
    """
    environment = _environment(package)
    code = environment.get_template(script).render(**values).strip()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(template).render(script=code, script_hash=digest, **values)


@functools.cache
def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("ossia.web", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def to_json(value: Any) -> str:
    """JSON that may stand inside a page's `<script type="application/json">`, whatever text it holds."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
