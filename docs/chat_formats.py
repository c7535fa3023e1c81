"""Generate the tables of docs/chat-formats.md: what is trained in the chat formats of real model families.

  python docs/chat_formats.py            update the tables
  python docs/chat_formats.py --check    exit with 1 if the tables are out of date

The families and their tokenizers are those of tests/real/manifest.py. Missing packages are downloaded."""

import argparse
import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlm.prompting.encoding import Encoder
from cutlm.prompting.templates import set_arguments

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "chat-formats.md"
sys.path.append(str(ROOT / "tests"))

from real.manifest import FAMILIES, load_tokenizer  # noqa: E402

_INSTRUCTION, _ANSWER = "Name a color.", "Mauve."
_TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Families, and arguments of their templates to compare with the row of the family.
_ARGUMENTS: list[tuple[str, Mapping[str, Any]]] = [
    ("Qwen3", {"enable_thinking": False}),
    ("Qwen3.5, thinking", {"enable_thinking": False}),
    ("Qwen3.5", {"enable_thinking": True}),
    ("Qwen3.8, no thoughts", {"enable_thinking": True, "reasoning_effort": "low"}),
    ("GLM-4.5", {"enable_thinking": False}),
    ("Nemotron 3 Nano", {"enable_thinking": False}),
    ("Gemma 4", {"enable_thinking": True}),
    ("gpt-oss", {"reasoning_effort": "high"}),
    ("Muse Glimmer", {"reasoning_strength": "low"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text("utf-8")
    after = update_tables(before)
    if args.check:
        sys.exit(None if after == before else f"{PAGE.name}: tables are out of date; run: python docs/chat_formats.py")
    PAGE.write_text(after, "utf-8")


def update_tables(page: str) -> str:
    """Return the page with its tables made again."""
    tables = {"families": make_family_table, "arguments": make_argument_table}
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]]()}\n{match[3]}", page)


def make_family_table() -> str:
    """Make a table of what is trained for each family."""
    lines = [
        "| family | prompt, from the instruction on | trained | ends the turn | `eos_token` |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        encoder = Encoder(set_arguments(load_tokenizer(family), family.kwargs), "chat")
        prompt, response = decode_turn(encoder)
        end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id)
        cells = [prompt[prompt.rindex(_INSTRUCTION) :], response, end, encoder.tokenizer.eos_token]
        lines.append(" | ".join([f"| {family.name}", *map(show_code, cells)]) + " |")
    return "\n".join(lines)


def make_argument_table() -> str:
    """Make a table of what arguments of a template change in the generation prompt and in the trained response."""
    lines = ["| family | `chat_template_kwargs` | generation prompt | trained |", "|---|---|---|---|"]
    families = {family.name: family for family in FAMILIES}
    for name, arguments in _ARGUMENTS:
        plain = set_arguments(load_tokenizer(families[name]), families[name].kwargs)
        default, changed = Encoder(plain, "chat"), Encoder(set_arguments(plain, arguments), "chat")
        before, after = (encoder.render(_INSTRUCTION).text.splitlines(keepends=True) for encoder in (default, changed))
        edits = []
        for _, start, end, new_start, new_end in difflib.SequenceMatcher(None, before, after).get_opcodes():
            old, new = "".join(before[start:end]), "".join(after[new_start:new_end])
            if old != new:
                removed = f"{'instead of' if new else 'without'} {show_code(old)}" if old else "added"
                edits.append(f"{show_code(new)} {removed}" if new else removed)
        shown = "<br>".join(edits)
        value = ", ".join(f"{key}: {str(value).lower()}" for key, value in arguments.items())
        lines.append(f"| {name} | `{value}` | {shown or 'the same'} | {show_code(decode_turn(changed)[1])} |")
    return "\n".join(lines)


def decode_turn(encoder: Encoder) -> tuple[str, str]:
    """Return the text of the prompt and of the response to it, decoded from their token ids."""
    prompt_ids, response_ids = encoder.encode_prompt(_INSTRUCTION), encoder.encode_response(_ANSWER)
    prompt = encoder.tokenizer.decode(prompt_ids)
    return prompt, encoder.tokenizer.decode(prompt_ids + response_ids).removeprefix(prompt)


def show_code(text: str) -> str:
    """Show text as code in a cell of a table."""
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


if __name__ == "__main__":
    main()
