"""One dataclass per command: it is the command line, the YAML file and the Python call at once.

Precedence in one sentence: defaults, then the file given with `--config`, then flags. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union

from ossia.errors import UsageError, nearest

C = TypeVar("C", bound="Config")

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def opt(
    default: Any,
    help: str,
    *,
    group: str = "run",
    choices: Sequence[str] | None = None,
    positional: bool = False,
    secret: bool = False,
) -> Any:
    """A field with its help text, its group in `--help`, the values it may take, whether it goes without a flag, and
    whether its value is never shown or written."""
    metadata = {"help": help, "group": group, "choices": choices, "positional": positional, "secret": secret}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass
class Config:
    """Base of every command's options."""

    group_titles: ClassVar[dict[str, str]] = {"run": "run"}

    config: str | None = opt(None, "YAML file with any of these options; flags win over it")
    debug: bool = opt(False, "show tracebacks")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["secret"] and not isinstance(value, str | None):
                raise UsageError(f"--{field.name} takes a text")
            setattr(self, field.name, _convert(value, self._hints()[field.name], field.name))
            choices = field.metadata.get("choices")
            for item in _as_list(getattr(self, field.name)):
                if choices and item not in choices:
                    raise UsageError(
                        f"--{field.name} got {item!r}; it takes one of: {', '.join(choices)}"
                        + nearest(str(item), choices)
                    )
        self.validate()

    def validate(self) -> None:
        """Check combinations; raise UsageError naming the flag."""

    def to_dict(self) -> dict[str, Any]:
        """Every option but `config`, `debug` and secrets, as plain values that `from_dict` reads back."""
        left_out = {"config", "debug", *(f.name for f in dataclasses.fields(self) if f.metadata["secret"])}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}

    def to_yaml(self) -> str:
        """The resolved options as YAML, which `--config` reads back exactly."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        """Write `to_yaml` to a file."""
        path.write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    @functools.cache
    def _hints(cls) -> dict[str, Any]:
        return typing.get_type_hints(cls)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], origin: str = "options") -> C:
        """Build from plain values; an unknown key is a UsageError that names the nearest."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"{origin}: unknown option '{key}'{nearest(str(key), known)}")
        return cls(**values)

    @classmethod
    def from_args(cls: type[C], argv: Sequence[str], prog: str, description: str) -> C:
        """Parse a command line (without the command's name)."""
        parser = _parser(cls, prog, description)
        namespace, rest = parser.parse_known_args(list(argv))
        _reject(rest, [f.name for f in dataclasses.fields(cls)], prog)
        flags = vars(namespace)
        values = read_yaml(flags["config"]) if flags.get("config") else {}
        return cls.from_dict({**values, **flags}, origin=flags.get("config") or "flags")


def parse_bytes(text: str, flag: str) -> int:
    """`16GB`, `14.5GiB`, `16000MB` or a number of bytes; a bare number below 10,000 means GB.

    Raises:
        UsageError: anything else; `flag` is named.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    number = float(match[1]) if match else 0.0
    if not match or not number:
        raise UsageError(f"{flag} got {text!r}; it takes a size such as 16GB or 15GiB")
    unit = match[2] or ("g" if number < 10_000 else "")
    power = " kmgt".index(unit[0]) if unit else 0
    return int(number * (1024 if unit.endswith("i") else 1000) ** power)


def parse_seconds(text: str, flag: str) -> float:
    """`2h`, `90m`, `1h30m`, `45s`, `1d` in seconds.

    Raises:
        UsageError: anything else, a bare number too; `flag` is named.
    """
    match = re.fullmatch(
        r"(?:(\d+)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower()
    )
    parts = [float(part or 0) for part in match.groups()] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (86_400, 3_600, 60, 1), strict=False))
    if not seconds:
        raise UsageError(f"{flag} got {text!r}; it takes a time such as 2h, 90m or 1h30m")
    return seconds


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file; UsageError naming file and line where it is not one."""
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # PyYAML's own text quotes the line, which may hold a token.
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else type(error).__name__
        raise UsageError(f"--config {path}: not a YAML file ({reason})") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected 'option: value' lines, got {type(values).__name__}")
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser(cls: type[Config], prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    hints = cls._hints()
    groups = {key: parser.add_argument_group(title) for key, title in cls.group_titles.items()}
    for field in dataclasses.fields(cls):
        kind = _kind(hints[field.name])
        help = field.metadata["help"].replace("%", "%%") + _default_text(field)
        options: dict[str, Any] = {"help": help, "dest": field.name}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif kind is list:
            options |= {"nargs": "+", "metavar": "X"}
        else:
            choices = field.metadata.get("choices")
            options["metavar"] = (
                "|".join(choices) if choices else {int: "N", float: "X", dict: "JSON"}.get(kind, "TEXT")
            )
        if field.metadata["positional"]:
            options = {"help": help, "nargs": "?", "metavar": field.name.upper()}
        name = field.name if field.metadata["positional"] else f"--{field.name}"
        groups[field.metadata["group"]].add_argument(name, **options)
    return parser


def _reject(rest: list[str], known: list[str], prog: str) -> None:
    for word in rest:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            hint = nearest(name.replace("-", "_"), known).replace("'", "'--", 1)
            raise UsageError(f"unknown flag --{name}{hint} (all flags: {prog} --help)")
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r} (flags start with --; see {prog} --help)")


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if default is None or default in ([], {}):
        return ""
    text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f" (default: {text.lower() if isinstance(default, bool) else text})".replace("%", "%%")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _kind(hint: Any) -> type:
    """The plain type behind `X | None` and `list[X]`."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_origin(hint) or hint


def _convert(value: Any, hint: Any, name: str) -> Any:
    kind = _kind(hint)
    optional = type(None) in typing.get_args(hint)
    if value is None or (optional and isinstance(value, str) and value.lower() == "none" and kind is not str):
        if optional:
            return None
        raise UsageError(f"--{name} needs a value")
    if kind is list:
        item = (*typing.get_args(hint), str)[0]
        return [_convert(each, item, name) for each in (value if isinstance(value, list | tuple) else [value])]
    if kind is bool:
        text = str(value).lower()
        if text not in TRUE + FALSE:
            raise UsageError(f"--{name} got {value!r}; it takes true or false")
        return text in TRUE
    if kind is dict:
        return _json_object(value, name)
    if isinstance(value, bool | list | dict):
        raise UsageError(f"--{name} got {value!r}; it takes {_NAMES[kind]}")
    try:
        number = kind(value)
    except ValueError:
        raise UsageError(f"--{name} got {value!r}; it takes {_NAMES[kind]}") from None
    if kind is int and isinstance(value, float) and value != number:
        raise UsageError(f"--{name} got {value!r}; it takes a whole number")
    return number


_NAMES: dict[type, str] = {int: "a whole number", float: "a number", str: "a text"}


def _json_object(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(f"--{name} is not JSON ({error.msg} at character {error.pos}): {value}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--{name} takes a JSON object such as '{{\"key\": 1}}'")
    return value
