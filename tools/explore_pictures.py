"""The README's pictures of the page: a server on a run, headless Chromium, PNG files in docs/img.

python tools/explore_pictures.py runs/demo
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

from explore_budgets import serving
from playwright.sync_api import Browser, Page, sync_playwright

OUT = Path(__file__).resolve().parents[1] / "docs" / "img"
SENTENCE = "The treaty was signed at Washington on the eighth of May, and the Senate gave its consent."
SECONDS = 120_000


def shot(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=OUT / f"explore-{name}.png")
    print(f"docs/img/explore-{name}.png: {(OUT / f'explore-{name}.png').stat().st_size / 1e3:.0f} kB")


def opened(browser: Browser, link: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
    """The page, once the host is ready."""
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light").new_page()
    page.goto(link)
    page.get_by_text(re.compile("host: ready")).first.wait_for(timeout=SECONDS)
    return page


def pictures(browser: Browser, link: str, student: str, other: str, unit: int) -> None:
    base = link.split("/?")[0]
    page = opened(browser, link)
    shot(page, "overview")
    page.goto(f"{base}/#/{student}/unit/{unit}")
    page.locator("main .ctx").first.wait_for()
    shot(page, "unit")
    page.goto(f"{base}/#/{student}/sentence")
    page.locator("main textarea").fill(SENTENCE)
    page.get_by_role("button", name=re.compile("^Read")).first.click()
    page.locator("main .sent .t").first.wait_for(timeout=SECONDS)
    page.locator("main .sent .t").nth(8).click()
    page.mouse.move(0, 0)
    page.keyboard.press("Escape")  # the tooltip
    shot(page, "sentence")
    page.goto(f"{base}/#/{student}/bench?edits={unit}")
    page.locator("main textarea").fill("My fellow citizens, I speak to you about")
    field = page.locator("main input[type=number]").first
    if not page.locator("main input[type=range]").count():
        field.fill(str(unit))
        page.get_by_role("button", name=re.compile(r"^\+")).first.click()
    for box in page.get_by_label(re.compile("control")).all():
        box.check()
    page.get_by_role("button", name=re.compile("^Run")).first.click()
    page.get_by_role("button", name="Keep this run").wait_for(timeout=SECONDS)
    shot(page, "bench")
    page.goto(f"{base}/#/{student}/compare?{urlencode({'with': other, 'text': SENTENCE, 'unit': unit})}")
    page.locator("main .sent .t").first.wait_for(timeout=SECONDS)
    page.get_by_role("button", name="contexts side by side").click()
    page.locator("main .ctx").first.wait_for(timeout=SECONDS)
    shot(page, "compare")
    dark = opened(browser, link, height=700, dark=True)
    dark.goto(f"{base}/#/{student}/units?sort=-effect")
    dark.locator("main .ctx").first.wait_for()
    shot(dark, "units")
    phone = opened(browser, link, width=420, height=860)
    phone.goto(f"{base}/#/{student}/unit/{unit}")
    phone.locator("main .ctx").first.wait_for()
    shot(phone, "phone")


def main(run: str, student: str = "mxd-k32", other: str = "transcoder-k32", unit: str = "1416") -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, serving(run) as link:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        pictures(browser, link, student, other, int(unit))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
