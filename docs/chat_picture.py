"""Make docs/chat.png and print the transcript in docs/chat.md, by running `cutlm chat` in a pseudo-terminal.

  python docs/chat_picture.py

The model is the one in the package; its greedy answers are always the same.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "src/cutlm/world/base_model"
LINES = (
    "I want the official capital of Japan.",
    "/judge The answer says Kyoto, which is the wrong city.",
    "/save records.jsonl",
    "Give me a line concerning a wooden castle.",
    "/judge The second sentence only repeats the first.",
    "/save records.jsonl",
    "Compose one plain sentence describing a big needle.",
    "/judge Perfect.",
    "/save records.jsonl",
)
NUM_COLUMNS, FONT_SIZE, MARGIN = 100, 22, 24
GROUND, INK, RED = "#16181d", "#d8dbe2", "#ff6b6b"
STYLE = re.compile("\033\\[([0-9;]*)m")


def run_chat(lines: tuple[str, ...], folder: Path, *, has_color: bool) -> str:
    """Type each line at the prompt of `cutlm chat` and return the terminal output."""
    link = folder / MODEL
    link.parent.mkdir(parents=True)
    link.symlink_to(REPOSITORY / MODEL)
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, NUM_COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "dumb", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY / "src")}
    environment |= {"NO_COLOR": "" if has_color else "1"}
    command = [sys.executable, "-m", "cutlm", "chat", "--model", MODEL]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, cwd=folder, env=environment)
    os.close(child)
    text, rest = "", [*lines, "/quit"]
    while True:
        try:
            text += os.read(parent, 4096).decode()
        except OSError:  # the process has exited
            break
        if rest and text.endswith("\n> "):
            os.write(parent, f"{rest.pop(0)}\n".encode())
    os.close(parent)
    if process.wait():
        raise SystemExit(text)
    text = text.replace("\r\n", "\n")
    return f"$ cutlm chat --model {MODEL}\n" + text[text.index("-- ") :].removesuffix("> /quit\n").rstrip("\n")


def draw(text: str, out: Path) -> None:
    """Draw terminal output; supports bold, red and underlined text."""
    regular, bold = (
        ImageFont.truetype(
            font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans Mono", weight=weight)), FONT_SIZE
        )
        for weight in ("normal", "bold")
    )
    width, height = regular.getlength("x"), round(FONT_SIZE * 1.4)
    lines = text.split("\n")
    num_columns = max(len(STYLE.sub("", line)) for line in lines)
    size = (round(2 * MARGIN + num_columns * width), 2 * MARGIN + len(lines) * height)
    image = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(image)
    codes: set[str] = set()
    for row, line in enumerate(lines):
        column = 0
        for number, part in enumerate(STYLE.split(line)):
            if number % 2:
                codes = set() if part in ("", "0") else codes | set(part.split(";"))
                continue
            left, top = MARGIN + column * width, MARGIN + row * height
            ink = RED if "31" in codes else INK
            pen.text((left, top), part, fill=ink, font=bold if "1" in codes else regular)
            if "4" in codes:
                pen.line((left, top + FONT_SIZE * 1.2, left + len(part) * width, top + FONT_SIZE * 1.2), ink, 2)
            column += len(part)
    image.quantize(64, Image.Quantize.FASTOCTREE).save(out, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(run_chat(LINES, Path(folder), has_color=True), REPOSITORY / "docs" / "chat.png")
    with tempfile.TemporaryDirectory() as folder:
        print(run_chat(LINES, Path(folder), has_color=False))
        print(f"$ cat records.jsonl\n{(Path(folder) / 'records.jsonl').read_text('utf-8')}", end="")


if __name__ == "__main__":
    main()
