"""Cards of installed controllers: what they hold, and how they are read from the place of a registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from controllers.builtin import find, is_admin_only
from controllers.errors import UnknownController
from controllers.loading import Spec
from controllers.rollout_state import name_problem
from discovery.data.safe_json import parse_json
from discovery.errors import PromotionError, RegistryAway
from discovery.promotion.storage.registry_storage import RegistryStorage

BUILT_IN_MARK: Final = "built_in"
"""Field of a card that is true for a built-in controller."""
MEND_FILE: Final = "promote the controller's file again, or return to the previous champion with `autotts rollback`"
"""Way out if the card or the source of a controller cannot be used."""

Card = Mapping[str, Any]
"""Facts about an installed controller: `name`, `digest`, `headline`, `report`, and whether it was `forced`.

`models` lists the models that its gate reports are about; without it they are about all models.
"""


class InstalledCards(NamedTuple):
    """Cards of several controllers by digest. A card that cannot be used hides no other one."""

    readable: dict[str, Card]
    damaged: dict[str, str]  # why a card cannot be used, and the way out


def read_card(storage: RegistryStorage, digest: str) -> Card:
    """Return the card of a controller. Raises PromotionError if it is missing or damaged."""
    name = storage.card_name(digest)
    try:
        card = parse_json(storage.card(digest))
    except RegistryAway:
        raise
    except PromotionError as error:
        raise PromotionError(f"{error}; {MEND_FILE}") from None
    except ValueError as error:
        raise PromotionError(f"{name}: {error}; {MEND_FILE}") from None
    if not isinstance(card, dict) or not isinstance(card.get("name"), str):
        raise PromotionError(f"{name}: not the card of a controller; {MEND_FILE}")
    is_built_in = card.get(BUILT_IN_MARK) is True
    if is_built_in and Spec(card["name"]).digest != digest:
        raise PromotionError(f"{name}: the name does not match the hash in the file's name; {MEND_FILE}")
    if wrong := built_in_problem(card["name"]) if is_built_in else name_problem(card["name"]):
        raise PromotionError(f"{name}: not the card of a controller: {wrong}; {MEND_FILE}")
    return card


def read_cards(storage: RegistryStorage, digests: Iterable[str]) -> InstalledCards:
    """Return the cards of controllers, in this order. Raises RegistryAway."""
    cards = InstalledCards({}, {})
    for digest in digests:
        try:
            cards.readable[digest] = read_card(storage, digest)
        except RegistryAway:
            raise
        except PromotionError as error:
            cards.damaged[digest] = str(error)
    return cards


def built_in_problem(name: str) -> str | None:
    """Return the reason why a controller cannot be installed by its name; None if it is built in and may serve."""
    try:
        find(name)
    except UnknownController as error:
        return str(error)
    return (
        f"{name} is for admins only; it cannot serve requests that name no controller" if is_admin_only(name) else None
    )
