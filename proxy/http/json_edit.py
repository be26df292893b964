"""Edit the top-level members of a JSON object. Other values keep their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec

_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def edit_members(raw: bytes, *, drop: Collection[str] = (), put: Mapping[str, Any]) -> bytes:
    """Return the JSON object `raw` without the members `drop`, and with the members `put` replaced or added.

    `raw` must be an object that `strict_json.read_object` accepts. Unchanged values keep their bytes, but whitespace
    between members is lost. If nothing changes, `raw` is returned. The time is linear in the size of `raw`.
    """
    if not drop and not put:
        return raw
    members: dict[str, Any] = dict(_MEMBERS.decode(raw))
    dropped = [name for name in set(drop) if members.pop(name, None) is not None]
    if not dropped and not put:
        return raw
    return msgspec.json.encode({**members, **put})
