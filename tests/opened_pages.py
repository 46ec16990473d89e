"""Pages in a browser: Debian's Chromium, driven by playwright."""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
"""Path of the browser, if there is one."""


@dataclass
class Opened:
    """A page in a browser.

    Args:
        page: playwright's page.
        messages: What the page printed on the console, and its errors.
        requests: Addresses that the page asked for, besides its own and those that hold their content.
    """

    page: Any  # playwright.sync_api.Page, which a newcomer without playwright lacks
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def show_all(self) -> None:
        """Open every folded part, and scroll through the page, so that each chart is drawn and each player loads."""
        self.page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        self.page.evaluate(
            """async () => {
                for (const part of document.querySelectorAll('.plot, audio')) {
                    part.scrollIntoView();
                    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                }
            }"""
        )
        self.wait_until(  # a busy machine may scroll past a chart before it is seen
            """(() => {
                const plots = [...document.querySelectorAll('.plot')];
                const undrawn = plots.filter((plot) => !plot.querySelector('.main-svg'));
                undrawn.slice(0, 1).forEach((plot) => plot.scrollIntoView());
                return undrawn.length === 0;
            })()"""
        )

    def wait_until(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true; the page's policy forbids playwright's own waiting."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(50)


def open_page(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> Opened:
    """Open a page without a network."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    opened = Opened(context.new_page())
    opened.page.set_default_timeout(120_000)  # two tests share a core
    opened.page.on("console", lambda message: opened.messages.append(f"{message.type}: {message.text}"))
    opened.page.on("pageerror", lambda error: opened.messages.append(f"error: {error}"))
    own = path.as_uri()
    opened.page.on(
        "request",
        lambda request: (
            None if request.url.startswith((own, "data:", "blob:")) else opened.requests.append(request.url)
        ),
    )
    opened.page.goto(own)
    return opened
