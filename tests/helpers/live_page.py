"""The report as a reader in a browser has it: open it at a width, read its parts, type and press keys."""

from __future__ import annotations

import json
from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

PHONE = 600  # pixels; narrower is one


class LivePage:
    """A page that is ready: the choice has answered, and the table of all rows has its library."""

    def __init__(self, browser: Chrome, address: str, width: int = 1280, scheme: str = "light") -> None:
        self.browser = browser
        browser.get("about:blank")
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(address)
        self.until("return !document.getElementById('rows-too')?.hidden && document.querySelector('#live > g')")

    def until(self, script: str) -> None:
        """Wait until a script returns what is true."""
        WebDriverWait(self.browser, 10, 0.05).until(lambda _: self.js(script))

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return what it returns."""
        return self.browser.execute_script(script, *arguments)

    def part(self, name: str) -> WebElement:
        """An element by its id."""
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """What an element says."""
        return str(self.js("return document.getElementById(arguments[0]).textContent", name))

    def limit(self, key: str, text: str) -> None:
        """Type a limit in the place of the one that is there, as a reader does, and leave the field."""
        self.part(f"most-{key}").clear()
        self.part(f"most-{key}").send_keys(text, Keys.TAB)

    def choose(self, name: str, value: str) -> None:
        """Choose from a list."""
        Select(self.part(name)).select_by_value(value)

    def top(self) -> list[dict[str, str]]:
        """The rows of the best networks, by the heads of their columns."""
        heads, *rows = self.js(
            "const lines = [...document.getElementById('top').rows];"
            "return lines.map((row) => [...row.cells].map((each) => each.textContent))"
        )
        return [dict(zip(heads, row, strict=True)) for row in rows]

    def marks(self, kind: str) -> int:
        """How many networks the plot marks as `keeps`, `breaks`, `unknown` or `hollow`."""
        return int(self.js("return document.querySelectorAll(`#live path.${arguments[0]}`).length", kind))

    def names(self) -> list[str]:
        """The labels of the plot."""
        return list(self.js("return [...document.querySelectorAll('#live .name')].map((each) => each.textContent)"))

    def rows(self) -> set[str]:
        """The networks in the table of all rows, as it is shown."""
        return set(
            self.js("return [...document.querySelectorAll('#all-rows tbody tr')].map((row) => row.dataset.label)")
        )

    def state(self) -> str:
        """The address behind its #."""
        return str(self.js("return location.hash"))

    def messages(self) -> list[str]:
        """What the console was told since it was asked last."""
        return [str(entry["message"]) for entry in self.browser.get_log("browser")]

    def requests(self) -> set[str]:
        """The schemes of everything that was asked for since this was asked last: `file`, `blob`, ..."""
        log = self.browser.get_log("performance")
        sent = [json.loads(entry["message"])["message"] for entry in log]
        asked = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
        return {url.partition(":")[0] for url in asked}
