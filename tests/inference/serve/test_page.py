"""The page of ``serve`` in a headless browser, by the keyboard alone, through Chromium's DevTools protocol."""

import asyncio
import itertools
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websocket

from tests.inference.serve.serving import serving
from tests.inference.test_load import read_raw
from torchrec_deepfm import load
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.inference.serve.model import ServedModel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A tab."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.events: list[Any] = []

    def send(self, method: str, **options: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": options}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, code: str) -> Any:
        return self.send("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def wait(self, code: str) -> Any:
        end = time.monotonic() + 60
        while not (found := self.value(code)):
            assert time.monotonic() < end, code
            time.sleep(0.05)
        return found

    def press(self, key: str) -> None:
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [str(CHROMIUM), *options, f"--remote-debugging-port={port}", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
                break
            except OSError:
                assert process.poll() is None, "the browser ended"
                time.sleep(0.1)
        yield Browser(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
def test_the_page(run: Path, run_data: PreparedData, tmp_path: Path) -> None:
    frame = read_raw(run_data.folder.parent / "test.tsv").drop("label")[:1]
    row = frame.to_dicts()[0]
    explanation = load(run).explain(frame)
    expected = float(explanation.probabilities[0])

    def visit(address: str) -> None:
        with browser(tmp_path / "profile") as tab:
            for domain in ("Page", "Network", "Log", "Runtime"):
                tab.send(f"{domain}.enable")
            tab.send("Page.navigate", url=address)
            tab.wait("document.readyState === 'complete' && document.querySelectorAll('input').length === 5")
            labels = tab.value(
                "[...document.querySelectorAll('label')].map((one) => one.firstChild.data.trim()).join()"
            )
            assert labels == ",".join(row)
            # A wrong value is marked at its field, which has the focus.
            tab.press("Tab")
            tab.send("Input.insertText", text="many")
            tab.press("Enter")
            assert "expected a finite number" in tab.wait("document.querySelector('.problem')?.textContent")
            assert tab.value("document.activeElement.dataset.name") == "row"
            assert tab.value("document.activeElement.getAttribute('aria-invalid')") == "true"
            tab.value("document.querySelector('form').reset()")
            for place, value in enumerate(row.values()):
                if place:
                    tab.press("Tab")
                assert tab.value("document.activeElement.dataset.name") == list(row)[place]
                tab.send("Input.insertText", text=str(value))
            tab.press("Enter")
            shown = tab.wait("document.getElementById('probability')?.textContent")
            assert float(shown.removesuffix("%")) == pytest.approx(100 * expected, abs=6e-4)
            amounts = tab.value(
                "[...document.querySelectorAll('ul')[0].querySelectorAll('.amount')].map((x) => x.textContent)"
            )
            bars = [float(one.replace("\N{MINUS SIGN}", "-")) for one in amounts]
            assert len(bars) == 7
            assert sum(bars) == pytest.approx(float(explanation.logits[0]), abs=7 * 5e-5)
            widths = "[...document.querySelector('ul').querySelectorAll('i')].map((one) => one.style.width)"
            wide = [float(one.removesuffix("%")) for one in tab.value(widths)]
            assert np.allclose(wide, 100 * np.abs(bars) / np.abs(bars).max(), atol=0.5)
            backgrounds = set()
            for theme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)):
                tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
                tab.send(
                    "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
                )
                assert tab.value("document.documentElement.scrollWidth") <= width
                backgrounds.add((theme, tab.value("getComputedStyle(document.body).backgroundColor")))
            assert len(backgrounds) == 2
            assert len({color for _, color in backgrounds}) == 2
            asked = [
                one["params"]["request"]["url"] for one in tab.events if one["method"] == "Network.requestWillBeSent"
            ]
            assert len(asked) >= 3
            assert all(one.startswith(address) for one in asked)
            problems = [one for one in tab.events if one["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
            texts = [one["params"].get("entry", {}).get("url", "exception") for one in problems]
            # The refused row, and the icon that browsers ask for by themselves.
            assert {text.removeprefix(address) for text in texts} <= {"explain", "favicon.ico"}

    async def body() -> None:
        async with serving(ServedModel(run)) as (client, _):
            page = await client.get("/")
            assert "default-src 'none'" in page.headers["content-security-policy"]
            await asyncio.to_thread(visit, str(client.base_url).rstrip("/") + "/")

    asyncio.run(body())
