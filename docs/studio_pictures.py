"""Make the screenshots in docs/studio.md: two reviewers judge answers of the tiny world's base model.

  python docs/studio_pictures.py

Needs playwright (`pip install '.[dev]'`) and chromium; takes half a minute on a CPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
MODEL = DOCS.parent / "src" / "cutlm" / "world" / "base_model"
ROWS = [
    ("I want the official capital of Japan.", "The capital of Japan is Kyoto."),
    ("What is the capital of Australia?", "The capital of Australia is Sydney."),
    ("Name the capital of Canada.", "The capital of Canada is Ottawa."),
    ("Give me a line concerning a wooden castle.", "The wooden castle is old. The castle is wooden."),
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


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="studio-pictures-"))
    rows = [{"instruction": instruction, "output": output} for instruction, output in ROWS]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
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
        browser.close()


if __name__ == "__main__":
    main()
