"""Makes docs/chat.png, and prints the transcript of docs/chat.md: the real command, with the packaged tiny model, in a
terminal of its own.

  python docs/chat_picture.py
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


def run_chat(lines: tuple[str, ...], folder: Path, *, has_colour: bool) -> str:
    """Types lines into `cutlm chat`, each when it is asked for, and returns what the terminal got."""
    place = folder / MODEL
    place.parent.mkdir(parents=True)
    place.symlink_to(REPOSITORY / MODEL)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, NUM_COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "dumb", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY / "src")}
    environment |= {"NO_COLOR": "" if has_colour else "1"}
    command = [sys.executable, "-m", "cutlm", "chat", "--model", MODEL]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    text, rest = "", [*lines, "/quit"]
    while True:
        try:
            text += os.read(ours, 4096).decode()
        except OSError:  # it has ended
            break
        if rest and text.endswith("\n> "):
            os.write(ours, f"{rest.pop(0)}\n".encode())
    os.close(ours)
    if process.wait():
        raise SystemExit(text)
    text = text.replace("\r\n", "\n")
    return f"$ cutlm chat --model {MODEL}\n" + text[text.index("-- ") :].removesuffix("> /quit\n").rstrip("\n")


def draw(text: str, out: Path) -> None:
    """Draws what a terminal got: plain, and bold, red and underlined where it was told so."""
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
        draw(run_chat(LINES, Path(folder), has_colour=True), REPOSITORY / "docs" / "chat.png")
    with tempfile.TemporaryDirectory() as folder:
        print(run_chat(LINES, Path(folder), has_colour=False))
        print(f"$ cat records.jsonl\n{(Path(folder) / 'records.jsonl').read_text('utf-8')}", end="")


if __name__ == "__main__":
    main()
