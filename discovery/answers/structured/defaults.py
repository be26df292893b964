"""Fill the defaults of a JSON schema into a value, so that leaving one out equals writing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

MAX_STEPS: Final = 100_000
"""Maximum number of values, members, alternatives and keys of schemas that are visited. The rest stays as it is."""
MAX_DEPTH: Final = 100
"""Maximum depth of nested values and references that are visited."""


def with_defaults(value: Any, schema: object, steps: int = MAX_STEPS) -> Any:
    """Return a parsed value with the defaults of `schema` for members that are missing. `value` is not changed.

    After so many `steps` the rest stays as it is.

    Follows `properties`, `items`, `prefixItems`, `allOf`, references within the schema, and the alternatives of `anyOf`
    and `oneOf` if only one of them fits the value's type.
    """
    return _Filler(schema, steps).fill(value, schema, 0)


class _Filler:
    """Fills defaults into one value, within a number of steps."""

    def __init__(self, root: object, steps: int) -> None:
        self._root = root
        self._left = steps
        self._resolved: dict[int, tuple[object, object]] = {}  # by id: a schema, which must stay alive, and its target

    def fill(self, value: Any, schema: object, depth: int) -> Any:
        self._left -= 1
        if not isinstance(value, dict | list) or depth > MAX_DEPTH or self._left < 0:
            return value
        schema = self._resolve(schema)
        if not isinstance(schema, dict):
            return value
        for part in _list(schema.get("allOf")):
            value = self.fill(value, part, depth + 1)
        for name in ("anyOf", "oneOf"):
            alternatives = _list(schema.get(name))
            self._left -= len(alternatives)
            if self._left < 0:
                return value
            fitting = [part for part in map(self._resolve, alternatives) if _fits(part, value)]
            if len(fitting) == 1:
                value = self.fill(value, fitting[0], depth + 1)
        if isinstance(value, dict):
            return self._fill_members(value, schema, depth)
        first = _list(schema.get("prefixItems"))
        rest = schema.get("items")
        return [self.fill(item, first[at] if at < len(first) else rest, depth + 1) for at, item in enumerate(value)]

    def _fill_members(self, value: Mapping[str, Any], schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        filled = dict(value)
        properties = schema.get("properties")
        for name, member in properties.items() if isinstance(properties, dict) else ():
            self._left -= 1
            if self._left < 0:
                break
            if name in filled:
                filled[name] = self.fill(filled[name], member, depth + 1)
                continue
            member = self._resolve(member)
            if isinstance(member, dict) and "default" in member:
                filled[name] = member["default"]
        return filled

    def _resolve(self, schema: object) -> object:
        """Follow references within the schema. A reference beside a default keeps the default."""
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        known = self._resolved.get(id(schema))
        if known is None:
            known = self._resolved[id(schema)] = schema, self._follow(schema)
        return known[1]

    def _follow(self, schema: Mapping[str, Any]) -> object:
        """Return what the references of a schema lead to. One that leads nowhere stays."""
        for _ in range(MAX_DEPTH):
            reference = schema.get("$ref")
            if not isinstance(reference, str) or self._left < 0:
                return schema
            target: object = self._root if reference.startswith("#") else None
            for part in unquote(reference).removeprefix("#").split("/")[1:]:
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            if not isinstance(target, dict):
                return schema
            self._left -= len(target) + len(schema)
            schema = {**target, **{name: value for name, value in schema.items() if name != "$ref"}}
        return None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _fits(schema: object, value: object) -> bool:
    """Return whether a schema describes values of this type: objects or lists."""
    if not isinstance(schema, dict):
        return False
    wanted, keys = ("object", ("properties",)) if isinstance(value, dict) else ("array", ("items", "prefixItems"))
    kind = schema.get("type")
    return kind == wanted or (isinstance(kind, list) and wanted in kind) or any(key in schema for key in keys)
