"""Make the pictures in docs/studio.md: two reviewers judge answers of the tiny world's base model.

  python docs/studio_pictures.py                                    the screenshots
  python docs/studio_pictures.py --film "$(make -s real-model)"     a session with a real model, docs/studio.webp

Needs playwright (`pip install .[dev]`) and chromium; takes a minute on a CPU. The film shows the time that things take,
so make it on an idle machine.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
MODEL = DOCS.parent / "src" / "cutlm" / "world" / "base_model"
ROWS = [
    ("I want the official capital of Japan.", "The capital of Japan is Kyoto."),
    ("What is the capital of Australia?", "The capital of Australia is Sydney."),
    ("Name the capital of Canada.", "The capital of Canada is Ottawa."),
    ("Give me a line concerning a wooden castle.", "The wooden castle is old. The castle is wooden."),
]
FILMED_ROWS = [
    (
        "Why do we have seasons?",
        "We have seasons because the Earth's axis is tilted. As the Earth moves around the Sun, each hemisphere leans"
        " toward the Sun for part of the year. When it is summer in Europe, it is also summer in Australia. A full"
        " cycle of seasons takes one year.",
    ),
    (
        "How does a bicycle stay upright?",
        "A bicycle stays upright because the rider steers into a fall, which brings the wheels back under the center"
        " of mass. The faster it moves, the harder it is to keep the balance. Spinning wheels help a little, too.",
    ),
    ("What do bees make from nectar?", "Bees make honey from nectar. They store it in combs of wax."),
]


@contextmanager
def run_studio(folder: Path, reviewer: str, *options: str) -> Iterator[str]:
    """Run a studio and yield its address."""
    command = [sys.executable, "-m", "cutlm", "studio", "--responses", "answers.jsonl", "--out", "records.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent / "src"), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, "--reviewer", reviewer, "--port", "0", *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield next(line.split()[1] for line in process.stdout if line.startswith("open "))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def open_page(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_page(device_scale_factor=1.25, **options)
    page.goto(url)
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


def judge(page: Any, number: int, judgment: str | None) -> None:
    """Judge the response that is shown, the one with this number; None if it is satisfactory."""
    page.wait_for_selector(f"#position:text('Response {number} of')")
    if judgment is None:
        page.click("#satisfactory")
    else:
        page.fill("#judgment", judgment)
        page.click("#done")
    page.wait_for_selector("#saved.saved")


def write_responses(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"instruction": instruction, "output": output}) + "\n" for instruction, output in rows]
    (folder / "answers.jsonl").write_text("".join(lines), "utf-8")


def take_screenshots(browser: Any, folder: Path) -> None:
    write_responses(folder, ROWS)
    with run_studio(folder, "bob") as url:
        page = open_page(browser, url)
        for number, judgment in enumerate(("Kyoto is wrong.", "It is Canberra.", None), start=1):
            judge(page, number, judgment)
        page.close()
    with run_studio(folder, "ann", "--model", str(MODEL)) as url:
        page = open_page(browser, url, viewport={"width": 1120, "height": 720})
        judge(page, 1, "The answer says Kyoto, which is the wrong city.")
        page.wait_for_selector("#position:text('Response 2 of')")
        page.fill("#judgment", "The answer says Sydney, which is the wrong city.")
        page.wait_for_selector(".response .flagged")
        page.wait_for_selector("#reaction .gauge")
        page.locator(".response .flagged").first.hover()
        page.screenshot(path=DOCS / "studio-judge.png")
        page.click("#done")
        judge(page, 3, None)
        judge(page, 4, None)
        page.close()
        page = open_page(browser, url, viewport={"width": 860, "height": 460}, color_scheme="dark")
        page.click("nav [data-view=summary]")
        page.wait_for_selector("#summary-content table")
        page.screenshot(path=DOCS / "studio-summary.png")


class Film:
    """Frames of a page, each with the time until the next one."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self._frames: list[Image.Image] = []
        self._times: list[float] = []

    def take(self) -> None:
        self._times.append(time.monotonic())
        picture = self._page.screenshot(caret="initial", scale="css")
        self._frames.append(Image.open(io.BytesIO(picture)).convert("RGB"))

    def watch(self, seconds: float) -> None:
        """Film for a time in which nobody does anything."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.take()
            self._page.wait_for_timeout(100)

    def type(self, text: str) -> None:
        for start in range(0, len(text), 2):
            self._page.keyboard.type(text[start : start + 2], delay=40)
            self.take()

    def save(self, path: Path) -> float:
        """Write a WebP and return its seconds."""
        times = [*self._times, time.monotonic()]
        durations = [round(1000 * (after - before)) for before, after in pairwise(times)]
        frames = {"save_all": True, "append_images": self._frames[1:], "duration": durations, "loop": 0}
        self._frames[0].save(path, quality=50, method=4, minimize_size=True, **frames)
        return sum(durations) / 1000


def film_session(browser: Any, folder: Path, model: str) -> None:
    write_responses(folder, FILMED_ROWS)
    with run_studio(folder, "ann", "--model", model, "--threshold", "3") as url:
        page = open_page(browser, url, viewport={"width": 960, "height": 720})
        page.wait_for_selector("#scoring:empty", state="attached")
        film = Film(page)
        film.watch(2)
        page.keyboard.press("w")
        film.type("It says that it is also summer in Australia. It is winter there.")
        film.watch(2)
        page.keyboard.press("Escape")
        for _ in range(3):
            page.keyboard.press("]")
            film.watch(0.6)
        page.locator(".response .flagged").first.hover()
        film.watch(3)
        page.mouse.move(2, 2)
        page.keyboard.press("Control+Enter")
        film.watch(2)
        film.type("\u201cthe harder it is to keep the balance\u201d is wrong: it is easier.")
        film.watch(4)
        page.keyboard.press("Control+Enter")
        film.watch(2)
        page.keyboard.press("Escape")
        page.keyboard.press("s")
        film.watch(1)
        page.keyboard.press("2")
        film.watch(3)
        seconds = film.save(DOCS / "studio.webp")
    print(f"studio.webp: {seconds:.0f} seconds, {(DOCS / 'studio.webp').stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", metavar="MODEL", help="film a session with this model instead")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="studio-pictures-"))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if args.film:
            film_session(browser, folder, args.film)
        else:
            take_screenshots(browser, folder)
        browser.close()


if __name__ == "__main__":
    main()
