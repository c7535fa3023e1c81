"""IFEval's checkers of verifiable instructions, from the package `lm-eval`, without their download.

The checkers want the data of a trained sentence splitter, which nltk downloads. An untrained one takes its place: it
knows no abbreviations, so a sentence may be counted twice where a text has "Dr." or "e.g.".
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


@dataclass(frozen=True)
class Prompt:
    """A prompt with verifiable instructions.

    Attributes:
        text: The prompt.
        rules: The kind of each instruction, such as `punctuation:no_comma`.
        arguments: The arguments of each instruction.
    """

    text: str
    rules: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


def read_prompts(path: Path) -> list[Prompt]:
    """Read IFEval's prompts from its JSON Lines."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [Prompt(row["prompt"], tuple(row["instruction_id_list"]), tuple(row["kwargs"])) for row in rows]


def find_cache() -> Path:
    """Return the folder for what is downloaded or generated once: `CUTLM_CACHE`, or ~/.cache/cutlm."""
    return Path(os.environ.get("CUTLM_CACHE") or Path.home() / ".cache" / "cutlm")


@cache
def load_checkers() -> dict[str, Any]:
    """Import the classes of checkers, by kind of instruction. Language detection is seeded."""
    import nltk

    folder = find_cache() / "nltk_data"
    data = folder / "tokenizers" / "punkt_tab" / "english"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in _PUNKT_FILES:
        (data / name).touch()
    nltk.data.path.insert(0, str(folder))
    import langdetect
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0
    return dict(INSTRUCTION_DICT)


def make_checker(rule: str, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """Make a checker, and the sentence that asks for what it checks."""
    checker = load_checkers()[rule](rule)
    # Arguments that are missing are drawn from the global random numbers.
    state = random.getstate()
    try:
        description = checker.build_description(**{name: value for name, value in arguments.items() if value})
    finally:
        random.setstate(state)
    return checker, description


def check_response(prompt: Prompt, response: str) -> list[bool]:
    """Say which instructions of a prompt a response follows, as IFEval's strict metric does."""
    load_checkers()
    from lm_eval.tasks.ifeval import utils

    example = utils.InputExample(0, list(prompt.rules), prompt.text, [dict(values) for values in prompt.arguments])
    state = random.getstate()
    try:
        return list(utils.test_instruction_following_strict(example, response).follow_instruction_list)
    finally:
        random.setstate(state)


def measure_strict(results: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Compute the two strict accuracies: over instructions, and over prompts with all of theirs followed."""
    flat = [is_followed for result in results for is_followed in result]
    return {
        "instruction_strict": sum(flat) / len(flat),
        "prompt_strict": sum(map(all, results)) / len(results),
    }
