"""Pictures of the pages that notebooks write: figures/NAME_browse.html becomes figures/NAME_browse.png.

    python notebooks/tools/screenshots.py [NAME ...]      # all pages that are there, if none is named

Needs Chromium (Debian: apt-get install chromium), which Playwright drives; without it the pictures stay as they are.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, ViewportSize, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The installed Chromium's program: the one that CHROMIUM names, or the first of the usual names; None without."""
    return shutil.which(os.environ.get("CHROMIUM") or "") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium.

    Raises:
        FileNotFoundError: if there is none.
    """
    program = chromium()
    if program is None:
        raise FileNotFoundError("Chromium is not installed (Debian: apt-get install chromium; or set CHROMIUM)")
    with sync_playwright() as driver:
        # In a container there is often no user to sandbox with; the pages are our own and fetch nothing.
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def screenshot(
    opened: Browser,
    html: Path,
    png: Path,
    *,
    number: int | None = None,
    width: int = 1360,
    height: int = 900,
    scheme: Literal["light", "dark"] = "light",
    scale: float = 1.5,
) -> None:
    """A picture of a page as it opens, or at direction ``number``; ``width`` and ``height`` in CSS pixels."""
    view: ViewportSize = {"width": width, "height": height}
    page = opened.new_page(viewport=view, color_scheme=scheme, device_scale_factor=scale)
    page.goto(html.resolve().as_uri() + ("" if number is None else f"#{number}"))
    page.wait_for_selector("#heading")
    page.screenshot(path=png)
    page.close()


def main() -> None:
    """Take the pictures of the pages named on the command line."""
    parser = argparse.ArgumentParser(description="Take pictures of the pages in figures/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures/NAME_browse.html; all, if none is given")
    figures = ROOT / "figures"
    pages = [figures / f"{name}_browse.html" for name in parser.parse_args().names]
    pages = pages or sorted(figures.glob("*_browse.html"))
    for page in pages:
        if not page.exists():
            sys.exit(f"{page.relative_to(ROOT)} does not exist; make figures writes it")
    if chromium() is None:
        sys.exit("Chromium is not installed (Debian: apt-get install chromium; or set CHROMIUM): no pictures taken")
    with browser() as opened:
        for page in pages:
            screenshot(opened, page, page.with_suffix(".png"))
            print(page.with_suffix(".png").relative_to(ROOT))


if __name__ == "__main__":
    main()
