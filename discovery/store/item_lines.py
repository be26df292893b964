"""Encode and decode store items as lines of JSON, the format of the proxy's spill file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter

from discovery.data.recordings import RecordedQuestion
from discovery.data.safe_json import parse_json
from discovery.store.records import Feedback, ServedEpisode, StoreItem
from discovery.store.rows import check_replayable

_ADAPTERS: Final[Mapping[str, tuple[type, TypeAdapter[Any]]]] = {
    kind: (item_type, TypeAdapter(item_type))
    for kind, item_type in (("episode", ServedEpisode), ("feedback", Feedback), ("recording", RecordedQuestion))
}
"""Item types and their pydantic adapters, by the name that a line starts with."""


def encode_item(item: StoreItem) -> bytes:
    """Return an item as one line of JSON, without the line end."""
    kind = next(name for name, (item_type, _) in _ADAPTERS.items() if isinstance(item, item_type))
    return b'["' + kind.encode() + b'",' + _ADAPTERS[kind][1].dump_json(item) + b"]"


def decode_item(line: bytes) -> StoreItem:
    """Return the item that `encode_item` encoded as `line`. Raises ValueError if it is no such line."""
    try:
        kind, content = parse_json(line, finite=True)
        item: StoreItem = _ADAPTERS[kind][1].validate_python(content)
        if isinstance(item, RecordedQuestion):
            check_replayable(item)
        if isinstance(item, Feedback):
            parse_json(item.value)
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a record: {type(error).__name__}") from None
    return item
