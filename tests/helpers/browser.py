"""Look at a page in a real browser: overflow, console errors, keyboard, and axe-core's rules, contrast among them.

Needs Chromium (`apt-get install chromium`), headless and without a network; it is steered through its DevTools protocol.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars", "--no-first-run",
           "--disable-background-networking", "--disable-dev-shm-usage")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
PATIENCE = 60  # seconds for the browser to start, and for any answer of it
# Elements that the Tab key has to reach, and whether the one that has the focus shows it.
REACHABLE = ("[...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex=\"0\"]')]"
             ".filter(e => !e.disabled && e.checkVisibility()).length")
FOCUSED = ("(e => e === document.body ? null : [[...document.querySelectorAll('*')].indexOf(e),"
           " getComputedStyle(e).outlineStyle !== 'none' && parseFloat(getComputedStyle(e).outlineWidth) > 0])(document.activeElement)")
# What reaches over the right edge of a window of WIDTH (a phone widens its own to what it shows), or into the padding of its card.
OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => {
  const card = e.parentElement.closest('.card'), right = e.getBoundingClientRect().right;
  return right > WIDTH + 1 || card && right > card.getBoundingClientRect().right - parseFloat(getComputedStyle(card).paddingRight) + 1
}).slice(0, 3).map(e => e.outerHTML.slice(0, 120))"""


class Page:
    """One tab, at one size and in one colour scheme."""

    def __init__(self, address: str):
        from websockets.sync.client import connect

        self.socket = connect(address, max_size=None)
        self.asked, self.complaints = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict:
        """Call a method of the protocol; keep what the console says meanwhile."""
        self.asked += 1
        self.socket.send(json.dumps({"id": self.asked, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv(timeout=PATIENCE))).get("id") != self.asked:
            self._listen(message.get("method"), message.get("params", {}))
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def _listen(self, event: str | None, found: dict) -> None:
        if event == "Runtime.exceptionThrown" or (event == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert")):
            self.complaints.append(json.dumps(found)[:300])
        elif event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])

    def evaluate(self, code: str) -> Any:
        """Return the value of JavaScript, which may be a promise."""
        answer = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, code: str) -> None:
        """Wait until JavaScript is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(code):
            assert time.monotonic() < deadline, code
            time.sleep(0.05)

    def open(self, url: str, size: str, scheme: str) -> None:
        self.width, height = SIZES[size]
        self.ask("Emulation.setDeviceMetricsOverride", width=self.width, height=height, deviceScaleFactor=1, mobile=size == "phone")
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def mistakes(self) -> list[str]:
        """Return what is wrong with the page as it is shown now, with everything unfolded."""
        self.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        found = [f"console: {line}" for line in self.complaints]
        wide, whole = self.evaluate(OVERFLOW.replace("WIDTH", str(self.width))), self.evaluate("document.documentElement.scrollWidth")
        if wide or whole > self.width:
            found.append(f"{whole} pixels wide, of {self.width}; wider than the window or a card: {wide}")
        return found + self._keyboard_mistakes() + self._axe_mistakes()

    def _keyboard_mistakes(self) -> list[str]:
        wanted, reached, unseen = self.evaluate(REACHABLE), set(), 0
        self.evaluate("document.activeElement.blur()")
        for _ in range(wanted + 2):  # a Tab begins after the element that had the focus, and leaves the page once
            for kind in ("keyDown", "keyUp"):
                self.ask("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
            if focused := self.evaluate(FOCUSED):
                reached.add(focused[0])
                unseen += not focused[1]
        return ([f"Tab reaches {len(reached)} of {wanted} elements"] if len(reached) < wanted else []) + (
            [f"{unseen} elements do not show that they have the focus"] if unseen else [])

    def _axe_mistakes(self) -> list[str]:
        if not self.evaluate("'axe' in window"):
            script = Path(find_spec("axe_core_python").origin).with_name("axe.min.js")
            self.ask("Runtime.evaluate", expression=script.read_text())
        violations = self.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
        return [f"{one['id']}: {node['html'][:160]} {node['any'][0]['message'] if node['any'] else ''}"
                for one in violations for node in one["nodes"][:3]]

    def picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


class Browser:
    """Chromium, until `close`."""

    def __init__(self, program: str, folder: Path):
        self.process = subprocess.Popen([program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (port_file.exists() and port_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.port = port_file.read_text().split()[0]

    def new_page(self) -> Page:
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return Page(json.load(answer)["webSocketDebuggerUrl"])

    def mistakes(self, url: str, pictures: Path | None = None) -> list[str]:
        """Return what is wrong with a page at both sizes and in both schemes; write pictures of it into a folder if one is given."""
        found = []
        for size in SIZES:
            for scheme in SCHEMES:
                page = self.new_page()
                page.open(url, size, scheme)
                found += [f"{size}, {scheme}: {mistake}" for mistake in page.mistakes()]
                if pictures:
                    page.picture(pictures / f"{size}-{scheme}.png")
                page.ask("Page.close")
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def start(folder: Path) -> Browser:
    """Start Chromium, or skip the test with the command that installs it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return Browser(program, folder)
