"""Classes of structured votes, as recordings hold them: hashes, equal for equal votes and for no others.

A hash has the form of a redacted answer, so that everything that compares redacted answers compares votes, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from discovery.answers.redaction import redacted_text
from discovery.answers.structured.canonical_json import canonical_text, parse_json
from discovery.answers.structured.defaults import with_defaults
from discovery.answers.structured.tool_vote import CallSet, ToolSchemas

NO_CALL: Final = "no tool call"
"""Text of the vote of replies that call no tool and have no answer that can be compared."""


def document_class(canonical: str) -> str:
    """Return the class of a JSON document, given its canonical text with the schema's defaults."""
    return redacted_text(f"json\0{canonical}")


def calls_class(calls: CallSet) -> str:
    """Return the class of a set of tool calls."""
    return redacted_text(f"tools\0{json.dumps(calls.calls)}")


def no_call_class() -> str:
    """Return the class of replies without a call and without an answer."""
    return redacted_text(f"tools\0{NO_CALL}")


def class_of_document(text: str, schema: object) -> str:
    """Return the class of a JSON document as it was written. Raises InvalidJson."""
    return document_class(canonical_text(with_defaults(parse_json(text), schema)))


def class_of_calls(text: str, tools: Mapping[str, Any]) -> str:
    """Return the class of tool calls written as a JSON list of objects with `name` and `arguments`; [] is no call.

    `tools` has the schemas of arguments by tool. Raises ValueError.
    """
    parse_json(text)  # refuses what parsers read differently
    listed = json.loads(text)
    calls: Sequence[Any] = listed if isinstance(listed, list) else [listed]
    written: list[tuple[str, str]] = []
    for call in calls:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["name"], str):
            raise ValueError('it must be a list of calls: [{"name": "weather", "arguments": {"city": "Rome"}}]')
        if call["name"] not in tools:
            raise ValueError(f"it calls {call['name']!r}, which is not among the question's tools")
        arguments = call["arguments"]
        written.append((call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)))
    read = ToolSchemas(tools).read(written)
    if read is None:
        raise ValueError("its arguments are not valid JSON")
    return calls_class(read) if written else no_call_class()
