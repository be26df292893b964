"""Controllers that a request's recorded branches can be played under: built-in, discovered and installed ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from controllers.builtin import ADMIN_ONLY, BUILT_IN
from controllers.loading import Spec, discovered, parse_spec
from discovery.errors import PromotionError
from discovery.promotion.registry import Registry
from discovery.promotion.storage.cards import BUILT_IN_MARK
from discovery.store import StorePlace

logger = logging.getLogger(__name__)


def replayable(registry: StorePlace | None) -> Mapping[str, str]:
    """Return titles of controllers by what a form sends for them: a name, or the digest of an installed one."""
    titles = {name: name for name in sorted({*BUILT_IN, *discovered()} - ADMIN_ONLY)}
    if registry is None:
        return titles
    try:
        cards = Registry(registry).cards()
    except PromotionError as error:
        logger.warning("%s", error)
        return titles
    for problem in cards.damaged.values():
        logger.warning("%s", problem)
    installed = {digest: card for digest, card in cards.readable.items() if not card.get(BUILT_IN_MARK)}
    return titles | {digest: f"{card['name']} ({digest[:12]}), installed" for digest, card in installed.items()}


def load_replayable(registry: StorePlace | None, value: str) -> Spec | None:
    """Return the controller that a form names; None if it is not offered. Raises PromotionError."""
    if value not in replayable(registry):
        return None
    if value in BUILT_IN:
        return Spec(value)
    if value in discovered():
        return parse_spec(value)
    return None if registry is None else Registry(registry).spec(value)
