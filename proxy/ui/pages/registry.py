"""The pages of the dashboard, in the order of the navigation."""

from __future__ import annotations

from typing import Final

from proxy.ui.page import Page, UiRoute
from proxy.ui.pages import controllers, discovery, frontier, overview, playground, recordings, requests, sign_in

PAGES: Final[tuple[Page, ...]] = (
    overview.PAGE,
    playground.PAGE,
    requests.PAGE,
    frontier.PAGE,
    discovery.PAGE,
    controllers.PAGE,
    recordings.PAGE,
    sign_in.PAGE,
)
UI_ROUTES: Final[tuple[UiRoute, ...]] = tuple(route for page in PAGES for route in page.routes)
"""All routes but that of static files. A test compares the app with this table."""
