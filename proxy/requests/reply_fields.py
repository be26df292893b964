"""Fields of chat requests whose branches are whole replies of the upstream: tools, and the format of the reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jsonschema_rs

from proxy.errors import BadRequest, clipped

MAX_TOOLS: Final = 1024
"""Maximum number of tools in a request."""
MAX_TOOL_NAME: Final = 256
"""Maximum number of characters in the name of a tool."""

_OWN: Final = frozenset(
    {
        *("model", "tts", "n", "seed", "cache_salt", "store"),
        *("stream", "stream_options", "stream_interval", "include_reasoning", "return_token_ids"),
    }
)
"""Fields that the proxy sets itself, or that are for the proxy."""
_UNREAD_FORMATS: Final = ("text", "structural_tag")
"""Formats of a reply that need not be JSON."""
_META_SCHEMAS: Final = (
    jsonschema_rs.Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"}),
    jsonschema_rs.Draft7Validator({"$ref": "http://json-schema.org/draft-07/schema#"}),
    jsonschema_rs.Draft4Validator({"$ref": "http://json-schema.org/draft-04/schema#"}),
)
"""Schemas of schemas, which are part of the library: nothing that a client refers to is fetched."""


class FieldNames(NamedTuple):
    """Names of fields in messages of errors. Each endpoint has its own."""

    function: str  # of a tool's function, by the number of the tool
    format: str  # of the description of a JSON schema
    example: str  # of a tool


CHAT_NAMES: Final = FieldNames(
    "tools.{}.function",
    "response_format.json_schema",
    '{"type": "function", "function": {"name": …, "parameters": …}}',
)
RESPONSES_NAMES: Final = FieldNames("tools.{}", "text.format", '{"type": "function", "name": …, "parameters": …}')


class ReplyFields(NamedTuple):
    """Tools and reply format of a request."""

    tools: Mapping[str, Any]  # schema of the arguments, by tool; None if the tool has none
    expects_json: bool = False
    schema: Any = None  # of the reply


def forwarded_fields(body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the fields of a request's body that are sent with each branch."""
    return {"model": model, **{name: value for name, value in body.items() if name not in _OWN}}


def read_reply_fields(body: Mapping[str, Any], names: FieldNames = CHAT_NAMES) -> ReplyFields:
    """Return the tools and the reply format of a chat request. Raises BadRequest, naming the field as `names` does."""
    return ReplyFields(_read_tools(body.get("tools"), names), *_read_format(body, names))


def _read_tools(tools: object, names: FieldNames) -> Mapping[str, Any]:
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise _wrong("tools", "must be a list of tools")
    if len(tools) > MAX_TOOLS:
        raise _wrong("tools", f"has {len(tools)} tools; at most {MAX_TOOLS} are accepted")
    schemas: dict[str, Any] = {}
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise _wrong(f"tools.{at}", f"must be {names.example}")
        path = names.function.format(at)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name.strip():
            raise _wrong(f"{path}.name", "is missing; give each tool a name")
        if len(name) > MAX_TOOL_NAME:
            raise _wrong(f"{path}.name", f"has {len(name)} characters; at most {MAX_TOOL_NAME} are accepted")
        if parameters is not None:
            _check_schema(f"{path}.parameters", parameters)
        schemas.setdefault(name, parameters)
    return schemas


def _read_format(body: Mapping[str, Any], names: FieldNames) -> tuple[bool, Any]:
    """Return whether the reply must be JSON, and its schema."""
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        return True, None
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        described = wanted.get("json_schema")
        if not isinstance(described, dict):
            raise _wrong(names.format, 'must be {"name": …, "schema": …}')
        schema = described.get("schema")
        if schema is None:
            raise _wrong(f"{names.format}.schema", "is missing; give the JSON schema of the reply")
        _check_schema(f"{names.format}.schema", schema)
        return True, schema
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if isinstance(kind, str) and kind not in _UNREAD_FORMATS:
        field = f"{names.format.removesuffix('.json_schema')}.type"
        raise _wrong(field, f"is {clipped(kind, 80)!r}; use json_schema, json_object or text")
    outputs = body.get("structured_outputs")
    if isinstance(outputs, dict) and (outputs.get("json") is not None or outputs.get("json_object")):
        schema = outputs.get("json")
        if isinstance(schema, dict):
            _check_schema("structured_outputs.json", schema)
        return True, schema if isinstance(schema, dict) else None
    return False, None


def _check_schema(field: str, schema: object) -> None:
    """Raise BadRequest unless `schema` is an object that any draft of JSON Schema accepts as a schema."""
    if not isinstance(schema, dict):
        raise _wrong(field, "must be a JSON schema: an object")
    if any(draft.is_valid(schema) for draft in _META_SCHEMAS):
        return
    try:
        _META_SCHEMAS[0].validate(schema)  # looks for the first error only; `iter_errors` builds all of them
    except jsonschema_rs.ValidationError as error:
        place = "/".join(map(str, error.instance_path)) or "its top"
        raise _wrong(field, f"is not a JSON schema: at {clipped(place, 200)}, {clipped(error.message, 200)}") from None


def _wrong(field: str, problem: str) -> BadRequest:
    return BadRequest(f"{field} {problem}", param=field)
