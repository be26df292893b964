"""Structured answers: tool calls and JSON documents, brought to a canonical form and voted on part by part.

All work is linear in the text, and nested or ambiguous JSON is refused. Imported by the other modules of `discovery`
and by `proxy`.
"""

from discovery.answers.structured.canonical_json import InvalidJson, canonical_text, fields_of, parse_json
from discovery.answers.structured.defaults import with_defaults
from discovery.answers.structured.field_vote import FieldBallot, FieldVote, vote_on_fields
from discovery.answers.structured.tool_vote import CallSet, ToolBallot, ToolSchemas, select_by_calls
from discovery.answers.structured.vote_class import (
    NO_CALL,
    calls_class,
    class_of_calls,
    class_of_document,
    document_class,
    no_call_class,
)

__all__ = [
    "NO_CALL",
    "CallSet",
    "FieldBallot",
    "FieldVote",
    "InvalidJson",
    "ToolBallot",
    "ToolSchemas",
    "calls_class",
    "canonical_text",
    "class_of_calls",
    "class_of_document",
    "document_class",
    "fields_of",
    "no_call_class",
    "parse_json",
    "select_by_calls",
    "vote_on_fields",
    "with_defaults",
]
