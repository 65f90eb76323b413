"""Harmony's `# Tools` read back: TypeScript types into functions with JSON schemas.

The inverse of `harmony_tools.tools_section`, checked by rendering what was read: the text is the same again, or the
reader says which tool it cannot read. The layout of the chat template released with gpt-oss is read too; its schemas
come out the same, and are rendered in openai-harmony's layout from then on.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ossia.errors import OssiaError
from ossia.template.harmony_tools import tools_section

OPENER, CLOSER = "# Tools\n\n## functions\n\nnamespace functions {\n", "} // namespace functions"

_FUNCTION = re.compile(r"type (?P<name>.+?) = \((?P<argument>_: )?")
_KEY = re.compile(r"(?P<name>[^\s{}\"/][^\n]*?)(?P<optional>\?)?:(?=\s)")
_WORD = re.compile(r"Array<any>|[A-Za-z]+")
_LITERAL = re.compile(r"\"(?P<value>.*?)\"(?=\s*(?:\||,|\[\]|\)|\}|//|$))", re.DOTALL | re.MULTILINE)
_BLANK = re.compile(r"\s*")
_EXAMPLE = re.compile(r"- \"(.*)\"", re.DOTALL)
_DEFAULT = re.compile(r"(?:(?P<note>.*) )?default: (?P<value>.*)", re.DOTALL)


class _Unread(Exception):
    """The text at hand is no type of harmony's."""


def read_tools_section(text: str) -> list[dict[str, Any]]:
    """The functions of a `# Tools` section, in OpenAI's form.

    Raises OssiaError that names the function whose types cannot be read back.
    """
    if not text.startswith(OPENER) or not text.rstrip().endswith(CLOSER):
        raise OssiaError(f"a # Tools section needs '## functions' and 'namespace functions {{ … }}', got {text!r:.120}")
    body = text[len(OPENER) - 1 : text.rindex(CLOSER)]
    tools: list[dict[str, Any]] = []
    position = 0
    while body[position:].strip():
        tool, end = _function(body, position)
        tools.append(tool)
        # Functions stand one after another, each with a blank line behind it.
        piece = f"{OPENER}{body[position:end].lstrip(chr(10))}\n\n{CLOSER}"
        rendered = tools_section([tool])
        if rendered != piece and _squeezed(rendered) != _squeezed(piece):
            raise _error(tool["function"]["name"], piece[len(OPENER) :])
        position = end
    return tools


def _error(name: str, text: str) -> OssiaError:
    return OssiaError(
        f"the types of tool {name} cannot be read back from harmony text: {text.strip()!r:.200}; "
        "give the row as messages and tools"
    )


def _squeezed(text: str) -> str:
    """`text` without what the two layouts differ in: white space, commas, the names of empty types, empty comments."""
    text = re.sub(r"^//\s*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\s|,(?=\s)|,$", "", text)
    return re.sub(r",(?=[}/])|(?<=}),", "", text.replace("Array<any>", "any[]").replace("object", "{}"))


def _function(body: str, position: int) -> tuple[dict[str, Any], int]:
    """The function that begins at `position` of the namespace, and where it ends."""
    start = position
    notes: list[str] = []
    while True:
        position = _skip(body, position)
        if not body.startswith("//", position):
            break
        end = _line_end(body, position)
        notes.append(body[position:end].removeprefix("//").removeprefix(" "))
        position = end
    found = _FUNCTION.match(body, position)
    if found is None:
        raise _error(f"number {body[:start].count(') => any;') + 1}", body[start:])
    reader = _Types(body, found.end())
    spec: dict[str, Any] = {"name": found["name"], "description": "\n".join(notes)}
    try:
        if found["argument"]:
            spec["parameters"] = reader.type()
        reader.expect(") => any;")
    except _Unread:
        raise _error(found["name"], body[start:]) from None
    return {"type": "function", "function": spec}, reader.at


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    assert found is not None
    return found.end()


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


class _Types:
    """A reader of types, at a place in a text."""

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def expect(self, word: str) -> None:
        """Go over white space and `word`."""
        if not self._take(word):
            raise _Unread

    def type(self) -> dict[str, Any]:
        """One type as a schema."""
        if self._ahead("|"):
            return {"oneOf": self._variants(quoted=True)}
        note = self._comment() if self._ahead("//") else None
        if self._ahead("{"):
            schema = self._object()
            schema |= {} if note is None else {"description": note}
        elif note is not None:
            raise _Unread
        elif self._ahead('"'):
            schema = {"type": "string", "enum": self._literals()}
        else:
            schema = self._named()
        while self._take("[]"):
            schema = {"type": "array", "items": schema}
        if self._take("| null"):
            schema["nullable"] = True
        return schema

    def _named(self) -> dict[str, Any]:
        names = [self._word()]
        while self._goes_on("|"):
            before = self.at
            self._take("|")
            if self._ahead('"') or self._ahead("{"):
                self.at = before
                break
            names.append(self._word())
        if len(names) == 1 or (len(names) == 2 and names[0] in ("any", "Array<any>") and names[1] == "null"):
            nullable = {"nullable": True} if len(names) == 2 else {}
            if names[0] == "any":
                return nullable
            if names[0] == "Array<any>":
                return {"type": "array", **nullable}
            return {"type": names[0] if names[0] in ("string", "number", "boolean", "object") else names}
        return {"type": names}

    def _word(self) -> str:
        self.at = _skip(self.text, self.at)
        found = _WORD.match(self.text, self.at)
        if found is None:
            raise _Unread
        self.at = found.end()
        return found[0]

    def _literals(self) -> list[str]:
        values = []
        while True:
            self.at = _skip(self.text, self.at)
            found = _LITERAL.match(self.text, self.at)
            if found is None:
                raise _Unread
            values.append(found["value"])
            self.at = found.end()
            before = self.at
            if not (self._goes_on("|") and self._take("|") and self._ahead('"')):
                self.at = before
                return values

    def _object(self) -> dict[str, Any]:
        self.expect("{")
        properties: dict[str, Any] = {}
        required: list[str] = []
        while True:
            notes = self._notes()
            if self._take("}"):
                if notes:
                    raise _Unread
                break
            self.at = _skip(self.text, self.at)
            found = _KEY.match(self.text, self.at)
            if found is None:
                raise _Unread
            if not found["optional"]:
                required.append(found["name"])
            self.at = found.end()
            properties[found["name"]] = self._property(notes)
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        return schema | ({"required": required} if required else {})

    def _notes(self) -> list[str]:
        """The comments above a property. A line between them that is no property goes on with the comment before it."""
        notes: list[str] = []
        while True:
            place = _skip(self.text, self.at)
            end = _line_end(self.text, place)
            if self.text.startswith("//", place):
                self.at = place
                notes.append(self._comment())
            elif notes and not self.text.startswith("}", place) and not self._is_property(place):
                notes[-1] += "\n" + self.text[self.at : end].lstrip("\n")
                self.at = end
            else:
                return notes

    def _is_property(self, place: int) -> bool:
        found = _KEY.match(self.text, place, _line_end(self.text, place) + 1)
        if found is None:
            return False
        before, self.at = self.at, found.end()
        try:
            schema = self.type()
            return "oneOf" in schema or self._ahead(",") or self._ahead("}") or self._ahead("//")
        except _Unread:
            return False
        finally:
            self.at = before

    def _property(self, notes: list[str]) -> dict[str, Any]:
        if self.text.startswith("\n", self.at) and (self._ahead("|") or self._ahead(",")):
            schema: dict[str, Any] = {"oneOf": self._variants(quoted=False)}
            self.expect(",")
        else:
            schema = self.type()
            if "oneOf" in schema:
                schema = _array_of_variants(schema["oneOf"])
            self._take(",")
            if self._goes_on("//"):
                comment = self._comment()
                if not comment.startswith("default: "):
                    raise _Unread
                schema["default"] = _default(comment.removeprefix("default: "), schema)
                self._take(",")
        return _with_notes(schema, notes)

    def _variants(self, *, quoted: bool) -> list[dict[str, Any]]:
        """The types of a `oneOf`, each on a line of its own; deeper lines are of a `oneOf` inside it."""
        column = self._column()
        variants = []
        while self._ahead("|") and self._column() == column:
            self._take("|")
            variants.append(self._variant(quoted=quoted))
        return variants

    def _column(self) -> int:
        place = _skip(self.text, self.at)
        return place - self.text.rfind("\n", 0, place)

    def _variant(self, *, quoted: bool) -> dict[str, Any]:
        schema = self.type()
        if self._goes_on("//"):
            comment = self._comment()
            if (found := _DEFAULT.fullmatch(comment)) is not None:
                bare = schema if not quoted else {}
                schema["default"] = _default(found["value"], bare)
                if found["note"] is not None:
                    schema["description"] = found["note"]
            else:
                schema["description"] = comment
        return schema

    def _comment(self) -> str:
        self.expect("//")
        end = _line_end(self.text, self.at)
        comment, self.at = self.text[self.at : end].removeprefix(" "), end
        return comment

    def _ahead(self, word: str) -> bool:
        return self.text.startswith(word, _skip(self.text, self.at))

    def _goes_on(self, word: str) -> bool:
        """Whether `word` comes next on this line."""
        place = _skip(self.text, self.at)
        return self.text.startswith(word, place) and "\n" not in self.text[self.at : place]

    def _take(self, word: str) -> bool:
        if not self._ahead(word):
            return False
        self.at = _skip(self.text, self.at) + len(word)
        return True


def _array_of_variants(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """An array of a `oneOf`: in the text, its `[]` stands behind the last variant."""
    *others, last = variants
    if last.get("type") != "array" or "items" not in last or not last.keys() <= {"type", "items", "nullable"}:
        raise _Unread
    nullable = {"nullable": True} if "nullable" in last else {}
    return {"type": "array", "items": {"oneOf": [*others, last["items"]]}, **nullable}


def _with_notes(schema: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The schema of a property with what the comments above it say: title, description, examples, default."""
    about: dict[str, Any] = {}
    if len(notes) > 1 and notes[1] == "":
        about["title"] = notes[0]
        notes = notes[2:]
    if "Examples:" in notes:
        first = notes.index("Examples:")
        last = first + 1
        while last < len(notes) and (found := _EXAMPLE.fullmatch(notes[last])):
            about.setdefault("examples", []).append(found[1])
            last += 1
        about.setdefault("examples", [None])
        notes = [*notes[:first], *notes[last:]]
    if "oneOf" in schema and notes and notes[-1].startswith("default: "):
        about["default"] = _default(notes[-1].removeprefix("default: "), schema)
        notes = notes[:-1]
    if notes:
        about["description"] = "\n// ".join(notes)
    inner = schema.get("description")
    if inner is not None and inner != about.get("description"):
        raise _Unread
    return about | schema


def _default(text: str, schema: dict[str, Any]) -> Any:
    """The value in a `default:` comment: a text in quotes that nothing escapes, an enum's bare, else JSON."""
    if schema.get("enum"):
        # The released template writes its comma behind the comment.
        return text.removesuffix(",") if text.removesuffix(",") in schema["enum"] else text
    text = text.removesuffix(",")
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise _Unread from None
