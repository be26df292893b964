"""Sign in with an API key, and sign out."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

from starlette.responses import RedirectResponse, Response

from proxy.errors import Forbidden, TooMany, Unauthorised
from proxy.ui.access import Doorkeeper
from proxy.ui.page import Page, PageContext, UiRoute, ViewAccess
from proxy.ui.protection import cookie_header
from proxy.ui.sessions import new_id

HOME: Final = "/ui"
_OWN_PATH: Final = re.compile(r"/ui(?:[/?][A-Za-z0-9._~/?&=%:@+,-]*)?")
"""Targets after signing in: only pages of the dashboard, so that a link cannot send the browser elsewhere."""


async def show_form(context: PageContext) -> Response:
    """Show the form, or the home page to those who need not sign in."""
    if _doorkeeper(context).viewer(context.request, context.service.authenticator) is not None:
        return RedirectResponse(HOME, HTTPStatus.SEE_OTHER)
    return _form(context, context.query.get("next", HOME))


async def sign_in(context: PageContext) -> Response:
    """Begin a session if the key is known."""
    form = await context.form()
    target = form.get("next", HOME)
    doorkeeper = _doorkeeper(context)
    try:
        session_id = doorkeeper.sign_in(context.request, context.service.authenticator, form.get("key", "").strip())
    except (Unauthorised, TooMany) as error:
        response = _form(context, target, error.message, error.status)
        if isinstance(error, TooMany):
            response.headers["retry-after"] = error.after
        return response
    response = RedirectResponse(target if _OWN_PATH.fullmatch(target) else HOME, HTTPStatus.SEE_OTHER)
    lifetime_s = doorkeeper.sessions.lifetime_s
    response.headers.append("set-cookie", cookie_header(context.request, session_id, lifetime_s))
    return response


async def sign_out(context: PageContext) -> Response:
    """End the session, and give the browser a new cookie."""
    if context.viewer.is_open:
        raise Forbidden("nobody is signed in: this proxy has no keys; set AUTOTTS_KEYS or AUTOTTS_ADMIN_KEY")
    doorkeeper = _doorkeeper(context)
    doorkeeper.sessions.close(doorkeeper.cookie(context.request))
    response = RedirectResponse("/ui/sign-in", HTTPStatus.SEE_OTHER)
    response.headers.append("set-cookie", cookie_header(context.request, new_id()))
    return response


def _form(context: PageContext, target: str, problem: str = "", status: int = 200) -> Response:
    has_keys = context.service.authenticator.has_keys
    return context.render("sign_in.html", status, next=target, problem=problem, has_keys=has_keys)


def _doorkeeper(context: PageContext) -> Doorkeeper:
    doorkeeper: Doorkeeper = context.request.state.doorkeeper
    return doorkeeper


PAGE: Final = Page(
    "sign_in",
    "Sign in",
    (
        UiRoute("/ui/sign-in", show_form, ViewAccess.ANYONE),
        UiRoute("/ui/sign-in", sign_in, ViewAccess.ANYONE, "POST"),
        UiRoute("/ui/sign-out", sign_out, ViewAccess.VIEWER, "POST"),
    ),
)
