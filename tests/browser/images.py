"""Put screenshots of the dashboard on the embedded model into `docs/images`, small enough for a repository.

make test ARGS=tests/browser/test_embedded_dashboard.py
.venv/bin/python -m tests.browser.images
"""

from __future__ import annotations

from typing import Final

from PIL import Image

from tests.readability import ROOT

SCREENSHOTS: Final = ROOT / "build" / "screenshots"
IMAGES: Final = ROOT / "docs" / "images"
TALLEST: Final = 1150
"""Pixels of a page's height that are shown."""
COLOURS: Final = 96
SHOWN: Final = {"playground": "playground-asked", "request": "request", "frontier": "frontier"}
"""Names of images, and of the screenshots they are made of."""


def main() -> None:
    """Write the images."""
    IMAGES.mkdir(exist_ok=True)
    for name, screenshot in SHOWN.items():
        with Image.open(SCREENSHOTS / f"embedded-{screenshot}-light-1280.png") as page:
            shown = page.convert("RGB").crop((0, 0, page.width, min(page.height, TALLEST)))
        shown.quantize(COLOURS, dither=Image.Dither.NONE).save(IMAGES / f"dashboard-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
