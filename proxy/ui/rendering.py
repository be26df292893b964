"""Templates of the dashboard, with every value escaped, and the filters that they use."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from proxy.ui.paging import link
from proxy.ui.static_files import static_url

_NO_VALUE: Final = "–"


def render(template: str, **values: Any) -> str:
    """Return the text of a template."""
    return _environment().get_template(template).render(values)


def count(value: float | None, digits: int = 0) -> str:
    """Return a number with thousands separated; a dash for None."""
    return _NO_VALUE if value is None else f"{value:,.{digits}f}"


def figure(value: float | None) -> str:
    """Return a number of a chart with four significant digits; a dash for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return _NO_VALUE
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def percent(value: float | None, digits: int = 0) -> str:
    """Return a share as a percentage; a dash for None."""
    return _NO_VALUE if value is None else f"{100 * value:.{digits}f} %"


def seconds(value: float | None) -> str:
    """Return a duration with a unit that suits it; a dash for None."""
    if value is None:
        return _NO_VALUE
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def beta(value: float | None) -> str:
    """Return β with at most two digits; a dash for None."""
    return _NO_VALUE if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def instant(value: float | datetime | None) -> Markup | str:
    """Return a time as an element that a script shows in the viewer's time zone. Floats are Unix times."""
    if value is None:
        return _NO_VALUE
    time = value if isinstance(value, datetime) else datetime.fromtimestamp(value, UTC)
    time = time.astimezone(UTC)
    shown = f"{time:%Y-%m-%d %H:%M:%S} UTC"
    return Markup('<time datetime="{}">{}</time>').format(f"{time:%Y-%m-%dT%H:%M:%SZ}", shown)


def moment(text: str) -> datetime | None:
    """Return a time in ISO 8601 as files and the store have it, or None if it is none."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("proxy.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals |= {"static": static_url, "link": link, "navigation": _navigation}
    environment.globals |= {"moment": moment, "zip": zip}
    environment.filters |= {
        "beta": beta,
        "count": count,
        "figure": figure,
        "instant": instant,
        "percent": percent,
        "seconds": seconds,
    }
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # NaN is no JSON
    return environment


def _navigation(viewer: Any) -> Any:
    """Return the pages a viewer may open. Pages import this module, so their registry is imported when it is used."""
    from proxy.ui.pages.registry import PAGES

    return [page for page in PAGES if page.href and viewer.may_open(page.access)]
