"""Make the screenshots in docs/inspect.md: the tiny world's base model, and the same model after a short training.

  python docs/pictures.py

Needs playwright (`pip install '.[dev]'`) and chromium; takes about a minute on a CPU. The scores and pages remain in a
temporary folder, which is printed.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from cutlm.cli import main as run_command
from cutlm.data.records import JudgedRecord
from cutlm.inspect.terminal import Terminal
from cutlm.world.base import base_path
from cutlm.world.demo import blame_records, generate_answers, run_iteration
from cutlm.world.judge import judge_task
from cutlm.world.tasks import list_tasks

DOCS = Path(__file__).parent
NUM_TRAINED_ON, NUM_STEPS, NUM_SHOWN = 280, 60, 70


def make_pages(folder: Path) -> tuple[Path, Path]:
    """Make a page of the base model's scores, and one that compares both models."""
    run_iteration(folder / "training", base_path(), list_tasks("train")[:NUM_TRAINED_ON], NUM_STEPS, 1, Terminal())
    tasks = list_tasks("dev")[:NUM_SHOWN]
    records = []
    for task, response in zip(tasks, generate_answers(folder / "responses.json", base_path(), tasks), strict=True):
        if response.strip():
            verdict = judge_task(task, response)
            row = {"instruction": task.instruction, "output": response, "judgment": verdict.judgment}
            records.append(JudgedRecord.model_validate(row | {"wrong_spans": verdict.wrong_spans or None}))
    before, after = folder / "before.jsonl", folder / "after.jsonl"
    blame_records(before, base_path(), records)
    blame_records(after, folder / "training" / "model", records)
    one, two = folder / "one.html", folder / "two.html"
    assert run_command(["inspect", "--scores", str(before), "--out", str(one)]) == 0
    assert run_command(["inspect", "--scores", str(before), "--scores", str(after), "--out", str(two)]) == 0
    return one, two


def draw(browser: Any, page_path: Path, out: Path, color_scheme: str) -> None:
    """Take a screenshot of the top of a page, with threshold 1.2 and the pointer on a flagged token."""
    page = browser.new_page(
        viewport={"width": 1120, "height": 1010}, color_scheme=color_scheme, device_scale_factor=1.25
    )
    page.goto(page_path.as_uri())
    page.fill("#threshold", "1.2")
    page.wait_for_selector("#marker", state="attached")
    page.locator("article .flagged").first.hover()
    page.screenshot(path=out)
    page.close()


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="inspect-pictures-"))
    one, two = make_pages(folder)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        draw(browser, one, DOCS / "inspect-one.png", "light")
        draw(browser, two, DOCS / "inspect-two.png", "dark")
        browser.close()
    print(f"{DOCS / 'inspect-one.png'} and {DOCS / 'inspect-two.png'} were made from {folder}")


if __name__ == "__main__":
    main()
