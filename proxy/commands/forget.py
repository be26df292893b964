"""`autotts store forget`, of what waits in files too: they go into the store first, for only there can it be told whose
a record is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from discovery.commands.console import wide_console
from discovery.commands.store import DEFAULT, Anonymous, Place, Request, Tenant
from discovery.commands.store import forget as forgetting
from discovery.errors import StoreError, UnstorableValue
from discovery.store import Store
from discovery.store.item_lines import decode_item
from proxy.recording.spill_file import SpillFiles
from proxy.spill_paths import places


def forget(
    request: Request = "",
    tenant: Tenant = "",
    anonymous: Anonymous = False,
    place: Place = DEFAULT,
    spill: Annotated[
        Path | None, typer.Option(envvar="AUTOTTS_SPILL", help="file that records wait in; without it STORE.spill")
    ] = None,
) -> None:
    """Remove what came of a request, or of a tenant's, for good: its bytes go too, and it cannot come back."""
    held, dropped = asyncio.run(_read_back(place, spill or place.with_name(f"{place.name}.spill")))
    if dropped:
        words = f"{dropped} records that waited in files cannot be read, and nobody can tell whose they are: dropped"
        wide_console().print(words, highlight=False, soft_wrap=True)
    try:
        forgetting(request, tenant, anonymous, place)
    finally:
        if held:
            raise StoreError(
                f"{', '.join(map(str, held))}: a running proxy holds it; what waits there is gone when the proxy has "
                "read it back: say it again then"
            )


async def _read_back(place: Path, spill: Path) -> tuple[list[Path], int]:
    """Write everything from the files at `spill` into the store at `place`, as a proxy does when it starts.

    Returns the files that a proxy holds, and how many records were dropped because nothing can read them. Raises
    StoreError.
    """
    waiting = SpillFiles(spill, 0)
    dropped = 0
    try:
        async with Store.open(place) as store:
            waiting.adopt()
            while waiting.size:
                chunk = waiting.read(1)
                dropped += chunk.bad
                for line in chunk.lines:
                    try:
                        await store.add_all([decode_item(line)])
                    except (ValueError, UnstorableValue):
                        dropped += 1
                waiting.drop(chunk)
    except OSError as error:
        raise StoreError(f"{error.filename or spill}: {error.strerror}") from None
    finally:
        waiting.close()
    return [path for path in places(spill) if path.exists()], dropped
