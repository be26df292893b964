"""Settings that name a place: a path, or the URL of a PostgreSQL database."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from discovery.errors import StoreError
from discovery.store.databases.places import StorePlace, parse_place


def _parse(value: object, kind: str) -> StorePlace | None:
    try:
        return None if value is None else parse_place(value, kind)
    except StoreError as error:
        raise ValueError(str(error)) from None


StoreSetting = Annotated[StorePlace | None, BeforeValidator(lambda value: _parse(value, "store"))]
RegistrySetting = Annotated[StorePlace | None, BeforeValidator(lambda value: _parse(value, "registry"))]
