"""What all tests share: a home of their own, a browser that pages are looked at with, and a reader of W&B's offline files.

The browser is headless Chromium, over its DevTools protocol on a pair of pipes: nothing to install but the browser itself.
"""

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = (1280, 900), (390, 844)  # CSS pixels
_PATIENCE = 120  # seconds that a silent browser is waited for
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
_LOOK = """(width => ({
  scroll: document.documentElement.scrollWidth,
  title: document.title,
  headings: [...document.querySelectorAll('h1, h2')].map(one => one.textContent),
  pictures: [...document.querySelectorAll('img, svg[role=img]')].map(one => ({
    name: one.getAttribute('alt') ?? one.getAttribute('aria-label') ?? '',
    width: one.getBoundingClientRect().width,
    broken: one.tagName === 'IMG' && one.naturalWidth === 0,
  })),
  beyond: [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll') &&
    one.getBoundingClientRect().right > width + 0.5).map(one => one.tagName + ': ' + one.textContent.slice(0, 60)),
  cut: [...document.querySelectorAll('tr > :nth-child(2)')].filter(one =>
    one.getBoundingClientRect().right > width).map(one => one.textContent),
  letters: Math.min(...[...document.querySelectorAll('h1, p, td, th, figcaption, svg text')].map(one => {
    const scale = one.tagName === 'text' ? one.getScreenCTM() : {a: 1, b: 0};
    return parseFloat(getComputedStyle(one).fontSize) * Math.hypot(scale.a, scale.b);
  })),
  text: document.body.innerText,
}))(%d)"""


@dataclass(frozen=True)
class Look:
    """What a page looks like at a width, and what it asked for and complained of on the way.

    scroll: pixels that the document is wide; beyond: elements that reach over the right edge, but for those that scroll in
    a box of their own; cut: cells of a table's second column that are out of sight. pictures: name (alt text), width on the
    page, broken. letters: pixels of the smallest text, also of drawings. requests: addresses other than the page's own and
    data. complaints: what the console warns of, and exceptions.
    """

    scroll: int
    title: str
    headings: list[str]
    cut: list[str]
    pictures: list[dict[str, Any]]
    beyond: list[str]
    letters: float
    text: str
    requests: list[str]
    complaints: list[str]


@dataclass
class Browser:
    """One headless Chromium; `look` opens a page in a tab of its own."""

    process: subprocess.Popen[bytes]
    to: int  # file descriptors of the protocol
    back: int
    received: bytes = b""
    number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def look(self, page: Path, size: tuple[int, int]) -> Look:
        """Load a page of a given width and height in CSS pixels."""
        events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", events, url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", events, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable", events, session)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            events,
            session,
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size[0] < 600,
        )
        events.clear()
        address = page.resolve().as_uri()
        self._call("Page.navigate", events, session, url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in events):
            events.append(self._receive())
        found = self._call("Runtime.evaluate", events, session, expression=_LOOK % size[0], returnByValue=True)["result"][
            "value"
        ]
        self._call("Target.closeTarget", events, targetId=target)
        asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return Look(
            **found,
            requests=[url for url in asked if url != address and not url.startswith("data:")],
            complaints=[text for event in events for text in _complaint(event)],
        )

    def _call(self, method: str, events: list[dict[str, Any]], session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result; what arrives before it goes to `events`."""
        number = next(self.number)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            assert select.select([self.back], [], [], _PATIENCE)[0], "the browser does not answer"
            chunk = os.read(self.back, 2**16)
            assert chunk, f"the browser has ended with {self.process.wait()}"
            self.received += chunk
        message, _, self.received = self.received.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


def _complaint(event: dict[str, Any]) -> list[str]:
    params = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return [params["exceptionDetails"]["text"]]
    if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return [str(params["args"])]
    if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return [params["entry"]["text"]]
    return []


def find_chromium() -> str:
    """The browser's path; skips or fails without one."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"no browser: CI renders the pages, and needs one of {', '.join(_NAMES)}")
    pytest.skip(f"no browser: none of {', '.join(_NAMES)}")


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own, ended in the end."""
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    # the browser reads its commands from 3 and answers on 4
    start = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", start, find_chromium(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, to, back)
    finally:
        with suppress(BrokenPipeError):
            os.write(to, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to)
        os.close(back)


@pytest.fixture(autouse=True)
def own_precision() -> None:
    """Accelerate keeps the precision of the first test that names one, and hands it to those that name none."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; without one the test is skipped, but for CI, where it fails."""
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def look_at(browser: Browser) -> Callable[[Path], Look]:
    """Opens a page on a desktop and a phone, checks what every page must be, and gives the phone's look."""

    def look(page: Path) -> Look:
        for size in (DESKTOP, PHONE):
            seen = browser.look(page, size)
            assert seen.complaints == [] and seen.requests == []
            assert seen.scroll <= size[0] and seen.beyond == [], f"wider than {size[0]} pixels"
            assert seen.title and seen.headings[0] == seen.title and len(seen.headings) > 1 and all(seen.headings)
            assert all(one["name"].strip() and not one["broken"] and one["width"] > 0 for one in seen.pictures)
            assert seen.cut == [] and seen.letters >= 6  # the exponents of an axis
        return seen

    return look


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's salt and store stay as they are; matplotlib keeps its list of fonts, which takes seconds to make."""
    fonts = os.environ.get("MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "matplotlib"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", fonts)
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Mirrored:
    """What W&B's offline folders of a run hold. records: protobuf records, in order; content: all bytes of all files."""

    records: list[Any]
    content: bytes

    def run(self) -> Any:
        return next(one.run for one in self.records if one.WhichOneof("record_type") == "run")

    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run().config.update}

    def history(self) -> list[dict[str, Any]]:
        """A line a logged step."""
        logged = (one.history for one in self.records if one.WhichOneof("record_type") == "history")
        return [{"/".join(item.nested_key): json.loads(item.value_json) for item in line.item} for line in logged]

    def summary(self) -> dict[str, Any]:
        """The last value of each key."""
        found = {}
        for one in self.records:
            for item in one.summary.update if one.WhichOneof("record_type") == "summary" else ():
                found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        return found

    def artifacts(self) -> list[Any]:
        asked = (one.request.log_artifact.artifact for one in self.records if one.WhichOneof("record_type") == "request")
        kept = (one.artifact for one in self.records if one.WhichOneof("record_type") == "artifact")
        return [one for one in (*asked, *kept) if one.name]


@pytest.fixture(scope="session")
def read_mirror() -> Callable[..., Mirrored]:
    """Reads wandb/ in a run directory once so many of its runs have ended: LevelDB's log format around protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, 7  # bytes; a header: crc32 4, length 2, kind 1, as long as that of the file

    def records(data: bytes) -> Iterator[Any]:
        place, parts = header, b""
        while place + header <= len(data):
            left = block - place % block
            if left < header:  # the rest of a block that no header fits into
                place += left
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            payload = data[place + header : place + header + length]
            place += header + length
            parts = payload if kind in (1, 2) else parts + payload  # whole, first
            if kind in (1, 4) and len(payload) == length:  # whole or last; a shorter one is being written
                yield Record.FromString(parts)

    def read(run: Path, finished: int = 1) -> Mirrored:
        until = time.monotonic() + _PATIENCE
        while True:
            files = [path for path in (run / "wandb").rglob("*") if path.is_file() and "latest-run" not in path.parts]
            found = [one for path in sorted(files) if path.suffix == ".wandb" for one in records(path.read_bytes())]
            if sum(one.WhichOneof("record_type") == "exit" for one in found) == finished or time.monotonic() > until:
                break
            time.sleep(0.05)  # W&B's own process writes, and may do so after finish() has returned
        return Mirrored(found, b"".join(path.read_bytes() for path in files if path.suffix != ".log"))

    return read


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The `wandb` keys of a recipe that mirrors offline, in W&B's homes of this test alone."""
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb_home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return {"mode": "offline", "project": "some_project"}


@pytest.fixture
def sigterm_after() -> Iterator[Callable[..., None]]:
    """Sends SIGTERM to this process at the end of its n-th optimiser step, and calls `first` before."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handles = []

    def at(step: int, first: Callable[[], None] = lambda: None) -> None:
        done = []

        def hook(optimizer: object, args: object, kwargs: object) -> None:
            done.append(None)
            if len(done) == step:
                first()
                signal.raise_signal(signal.SIGTERM)

        handles.append(register_optimizer_step_post_hook(hook))

    yield at
    for handle in handles:
        handle.remove()
