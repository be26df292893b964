"""Command `autotts store forget`: delete a tenant's or a request's records, including those in spill files.

Spilled records are written to the store first, because only the store knows the tenant of a record.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from discovery.commands.console import wide_console
from discovery.commands.options import DEFAULT_STORE, Place
from discovery.commands.store import Anonymous, Request, Tenant
from discovery.commands.store import forget as forgetting
from discovery.errors import StoreError, UnstorableValue
from discovery.store import Store, StorePlace
from discovery.store.item_lines import decode_item
from proxy.recording.spill_file import SpillFiles
from proxy.spill_paths import candidate_paths, default_path


def forget(
    request: Request = "",
    tenant: Tenant = "",
    anonymous: Anonymous = False,
    place: Place = DEFAULT_STORE,
    spill: Annotated[
        Path | None, typer.Option(envvar="AUTOTTS_SPILL", help="spill file of waiting records; default: STORE.spill")
    ] = None,
) -> None:
    """Delete all data of a request or of a tenant for good. The bytes are overwritten, and late records are refused."""
    held, dropped = asyncio.run(_read_back(place, spill or default_path(place)))
    if dropped:
        message = f"{dropped} records in spill files cannot be read, so their tenant is unknown: they were dropped"
        wide_console().print(message, highlight=False, soft_wrap=True)
    try:
        forgetting(request, tenant, anonymous, place)
    finally:
        if held:
            raise StoreError(
                f"{', '.join(map(str, held))}: a running proxy uses this spill file, so its records were not deleted; "
                "run the command again when the proxy has written them to the store"
            )


async def _read_back(place: StorePlace, spill: Path) -> tuple[list[Path], int]:
    """Write all records in the spill files at `spill` to the store at `place`, as a proxy does when it starts.

    Return the files that a running proxy has locked, and the number of unreadable records, which are dropped. Raises
    StoreError.
    """
    waiting = SpillFiles(spill, 0)
    dropped = 0
    try:
        async with Store.open(place) as store:
            waiting.adopt()
            while waiting.size:
                chunk = waiting.read(1)
                dropped += chunk.damaged
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
    return [path for path in candidate_paths(spill) if path.exists()], dropped
