"""What the comparison of alignment methods learns from: instructions with one verifiable rule, and judged responses.

A task is an instruction of the published judgments and one rule of a kind that IFEval has. Its wording and its check
are IFEval's own; the judgments in words, and the places that break the rule, are made here.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ifeval import Prompt, check_response, load_checkers, make_checker

from cutlm.data.records import JudgedRecord, load_records

Span = tuple[int, int]
UNFINISHED = "The response breaks off before it is finished."

_JUDGMENTS = ("iter1.json", "iter2.json", "iter3.json")
_MAX_INSTRUCTION_WORDS = 25
_MAX_OUTPUT_WORDS = 100  # of the published response: such instructions have short answers
_MAX_HELD_OUT_WORDS = 150
_WORD = re.compile(r"[a-z]{5,12}")
_ENDINGS = (
    "Is there anything else I can help with?",
    "Any other questions?",
    "That is all you need to know.",
    "I hope this helps.",
    "Let me know what you think.",
    "Thank you for reading.",
)


@dataclass(frozen=True)
class Task:
    """An instruction with one verifiable rule.

    Attributes:
        prompt: The instruction and the sentence that asks for the rule.
        rule: Kind of the rule, such as `punctuation:no_comma`.
        arguments: Arguments of the rule.
    """

    prompt: str
    rule: str
    arguments: dict[str, Any]

    def as_prompt(self) -> Prompt:
        """Return the task as one of IFEval's prompts."""
        return Prompt(self.prompt, (self.rule,), (self.arguments,))


# ---- Instructions ----


def draw_tasks(folder: Path, tested: Sequence[Prompt], num_tasks: int, seed: int = 0) -> list[Task]:
    """Draw tasks from the published judgments, with every kind of rule equally often, in random order.

    Args:
        folder: The folder with the published judgments.
        tested: Prompts to test on. An instruction that one of them contains is left out.
        num_tasks: Number of tasks.
        seed: Seed of the draw.

    Raises:
        ValueError: There are too few instructions.
    """
    draw = random.Random(f"tasks {seed}")
    texts = [normalize(prompt.text) for prompt in tested]
    found: dict[str, JudgedRecord] = {}
    for record in read_judgments(folder):
        is_short = len(record.instruction.split()) <= _MAX_INSTRUCTION_WORDS and "\n" not in record.instruction
        if record.input or not is_short or len(record.output.split()) > _MAX_OUTPUT_WORDS:
            continue
        if not any(normalize(record.instruction) in text for text in texts):
            found.setdefault(normalize(record.instruction), record)
    if len(found) < num_tasks:
        raise ValueError(f"expected {num_tasks} short instructions, got {len(found)}")
    kinds = list(RULES)
    tasks = []
    for number, record in enumerate(draw.sample(list(found.values()), num_tasks)):
        tasks.append(make_task(record, kinds[number % len(kinds)], draw))
    draw.shuffle(tasks)
    return tasks


def normalize(text: str) -> str:
    """Return a text as its lowercase words."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_judgments(folder: Path) -> list[JudgedRecord]:
    """Read the published judgments."""
    return [record for name in _JUDGMENTS for record in load_records(folder / name)]


def draw_held_out(folder: Path, tasks: Iterable[Task], num_records: int) -> list[JudgedRecord]:
    """Draw satisfactory responses of the published judgments whose instructions are in no task."""
    used = {normalize(task.prompt) for task in tasks}
    records = [
        record
        for record in read_judgments(folder)
        if record.is_satisfactory
        and len(record.output.split()) <= _MAX_HELD_OUT_WORDS
        and not any(text.startswith(normalize(record.instruction)) for text in used)
    ]
    return random.Random("held out").sample(records, min(num_records, len(records)))


def make_task(record: JudgedRecord, rule: str, draw: random.Random) -> Task:
    """Add a rule to an instruction. Words that it asks for are from the published response, so that they fit."""
    arguments = RULES[rule].draw_arguments(record, draw)
    _, description = make_checker(rule, arguments)
    instruction = record.instruction.strip()
    instruction += "" if instruction[-1] in ".?!:" else "."
    return Task(f"{instruction} {description}", rule, arguments)


# ---- Rules ----

Found = tuple[str, list[Span]]  # a judgment, and the places that it is about


@dataclass(frozen=True)
class Rule:
    """A kind of rule.

    Attributes:
        draw_arguments: Draws the arguments of IFEval's checker for an instruction.
        find_fault: Says in words what is wrong with a response that breaks the rule, and where: in characters, as
            `JudgedRecord.wrong_spans`. An empty span at the end means that something is missing.
    """

    draw_arguments: Callable[[JudgedRecord, random.Random], dict[str, Any]]
    find_fault: Callable[[str, dict[str, Any]], Found]


def judge(task: Task, response: str, is_unfinished: bool = False) -> tuple[str | None, list[Span]]:
    """Judge a response by the task's rule.

    Args:
        task: The task.
        response: The response.
        is_unfinished: Whether it was stopped at the maximum number of tokens, which is a fault of its own.

    Returns:
        What is wrong with it, or None, and where.
    """
    texts: list[str] = []
    spans: list[Span] = []
    if not all(check_response(task.as_prompt(), response)):
        text, spans = RULES[task.rule].find_fault(response, task.arguments)
        texts.append(text)
    if is_unfinished:
        texts.append(UNFINISHED)
        spans = [*spans, (len(response), len(response))]
    return " ".join(texts) or None, sorted(set(spans))


def _none(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    return {}


def _one_of(name: str, *values: Any) -> Callable[[JudgedRecord, random.Random], dict[str, Any]]:
    return lambda record, draw: {name: draw.choice(values)}


def _limit(name: str, relation: str, less: Sequence[int], least: Sequence[int]) -> Callable[..., dict[str, Any]]:
    def draw_arguments(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
        is_less = draw.random() < 0.5
        return {name: draw.choice(less if is_less else least), relation: "less than" if is_less else "at least"}

    return draw_arguments


def _list_words(record: JudgedRecord, draw: random.Random) -> list[str]:
    """Words of the published response, the most frequent first, and more in case it has too few."""
    words = Counter(_WORD.findall(record.output.lower()))
    return [word for word, _ in words.most_common()] + ["example", "people", "important", "often"]


def _draw_forbidden(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    return {"forbidden_words": sorted(set(_list_words(record, draw)[:2]))}


def _draw_keywords(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    return {"keywords": sorted(set(draw.sample(_list_words(record, draw), 2)))}


def _draw_frequency(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    return {"keyword": _list_words(record, draw)[0], "frequency": draw.choice((2, 3)), "relation": "at least"}


def _draw_letter(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    relation = draw.choice(("less than", "at least"))
    return {"letter": draw.choice("bcdfghmpuvwy"), "let_frequency": draw.choice((4, 6)), "let_relation": relation}


def _draw_repeated(record: JudgedRecord, draw: random.Random) -> dict[str, Any]:
    return {"prompt_to_repeat": record.instruction.strip()}


def _find(pattern: str, text: str, flags: int = 0) -> list[Span]:
    return [match.span() for match in re.finditer(pattern, text, flags)]


def _at_end(response: str) -> list[Span]:
    return [(len(response), len(response))]


def _from(spans: Sequence[Span], limit: int, response: str) -> list[Span]:
    """The response from the element on that is one too many."""
    return [(spans[limit - 1][0], len(response))]


def _find_comma(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(",", response)
    return f"The response has {_count(spans, 'comma')}, although commas are not allowed.", spans


def _find_capitals(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(r"[^\W\d_]+", response)
    spans = [span for span in spans if not response[slice(*span)].islower()]
    if not spans:
        return "The response is not English text in lowercase letters.", [(0, 0)]
    words = _quote(response, spans)
    return f"The response has capital letters, as in {words}, although it must be all in lowercase.", spans


def _find_small_letters(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(r"[^\W\d_]+", response)
    spans = [span for span in spans if not response[slice(*span)].isupper()]
    if not spans:
        return "The response is not English text in capital letters.", [(0, 0)]
    words = _quote(response, spans)
    return f"The response has small letters, as in {words}, although it must be all in CAPITAL LETTERS.", spans


def _find_forbidden(response: str, arguments: dict[str, Any]) -> Found:
    spans = [
        span for word in arguments["forbidden_words"] for span in _find(rf"\b{word}\b", response, flags=re.IGNORECASE)
    ]
    return f"The response uses {_quote(response, spans)}, which is forbidden.", spans


def _find_missing(response: str, arguments: dict[str, Any]) -> Found:
    missing = [word for word in arguments["keywords"] if not re.search(word, response, re.IGNORECASE)]
    return f"The response does not use {_join(missing)}, which it must include.", _at_end(response)


def _find_frequency(response: str, arguments: dict[str, Any]) -> Found:
    spans, word = _find(arguments["keyword"], response, re.IGNORECASE), arguments["keyword"]
    return (
        f'The response uses "{word}" {_count(spans, "time")}, but {arguments["frequency"]} are asked for.',
        _at_end(response),
    )


def _find_unquoted(response: str, arguments: dict[str, Any]) -> Found:
    spans = [(0, 0)] if response.lstrip()[:1] != '"' else []
    if response.rstrip()[-1:] != '"' or len(response.strip()) == 1:
        spans += _at_end(response)
    where = {1: "at its start" if spans[0] == (0, 0) else "at its end", 2: "at its start and end"}[len(spans)]
    return f"The response is not wrapped in double quotation marks: there is none {where}.", spans


def _find_ending(response: str, arguments: dict[str, Any]) -> Found:
    phrase = arguments["end_phrase"]
    spans = _find(re.escape(phrase), response, re.IGNORECASE)
    if spans:
        return f'There is more text after "{phrase}", which must be the end.', [(spans[-1][1], len(response))]
    return f'The response does not end with the phrase "{phrase}".', _at_end(response)


def _find_title(response: str, arguments: dict[str, Any]) -> Found:
    return "The response has no title in double angular brackets, such as <<title>>.", [(0, 0)]


def _find_bullets(response: str, arguments: dict[str, Any]) -> Found:
    spans, wanted = _find(r"^\s*(?:\*[^*]|-).*$", response, re.MULTILINE), arguments["num_bullets"]
    text = f"The response has {_count(spans, 'bullet point')} marked with *, but must have exactly {wanted}."
    return text, (_from(spans, wanted + 1, response) if len(spans) > wanted else _at_end(response))


def _find_highlights(response: str, arguments: dict[str, Any]) -> Found:
    return (
        f"Fewer than {arguments['num_highlights']} parts of the response are highlighted like *this*.",
        _at_end(response),
    )


def _find_placeholders(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(r"\[.*?\]", response)
    text = f"The response has {_count(spans, 'placeholder')} in square brackets, but needs at least"
    return f"{text} {arguments['num_placeholders']}.", _at_end(response)


def _find_postscript(response: str, arguments: dict[str, Any]) -> Found:
    return f"There is no postscript that starts with {arguments['postscript_marker']} at the end.", _at_end(response)


def _find_words(response: str, arguments: dict[str, Any]) -> Found:
    return _compare(_find(r"\w+", response), "word", arguments["num_words"], arguments["relation"], response)


def _find_sentences(response: str, arguments: dict[str, Any]) -> Found:
    from nltk.tokenize import PunktTokenizer

    load_checkers()
    spans = list(PunktTokenizer("english").span_tokenize(response))
    return _compare(spans, "sentence", arguments["num_sentences"], arguments["relation"], response)


def _find_letters(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(arguments["letter"], response, re.IGNORECASE)
    limit, relation = arguments["let_frequency"], arguments["let_relation"]
    text, faults = _compare(spans, f"letter {arguments['letter']}", limit, relation, response)
    return text, (spans[limit - 1 :] if relation == "less than" else faults)


def _find_capital_words(response: str, arguments: dict[str, Any]) -> Found:
    spans = _find(r"\b[A-Z][A-Z'-]*\b", response)
    limit, relation = arguments["capital_frequency"], arguments["capital_relation"]
    text, faults = _compare(spans, "word in all capital letters", limit, relation, response)
    return text, (spans[limit - 1 :] if relation == "less than" else faults)


def _find_paragraphs(response: str, arguments: dict[str, Any]) -> Found:
    spans, wanted = _find(r"\*\*\*", response), arguments["num_paragraphs"]
    text = f"The response does not have exactly {wanted} paragraphs with the divider *** between them."
    return text, (_from(spans, wanted, response) if len(spans) >= wanted else _at_end(response))


def _find_responses(response: str, arguments: dict[str, Any]) -> Found:
    return "These are not two different responses separated by ******.", _at_end(response)


def _find_json(response: str, arguments: dict[str, Any]) -> Found:
    return "The response is not in JSON format.", [(0, 0)]


def _find_repetition(response: str, arguments: dict[str, Any]) -> Found:
    return "The response does not repeat the request word for word before it answers.", [(0, 0)]


def _compare(spans: Sequence[Span], name: str, limit: int, relation: str, response: str) -> Found:
    """Say that there are too many or too few of something."""
    if relation == "less than":
        text = f"The response has {_count(spans, name)}, but must have fewer than {limit}."
        return text, (_from(spans, limit, response) if len(spans) >= limit else [(0, 0)])
    return f"The response has only {_count(spans, name)}, but needs at least {limit}.", _at_end(response)


def _count(spans: Sequence[Span], name: str) -> str:
    return f"{len(spans)} {name}" if len(spans) == 1 else f"{len(spans)} {_plural(name)}"


def _plural(name: str) -> str:
    first, space, rest = name.partition(" ")
    return name + "s" if not space or first == "bullet" else f"{first}s{space}{rest}"


def _quote(response: str, spans: Sequence[Span]) -> str:
    return _join(dict.fromkeys(response[slice(*span)] for span in spans[:3]))


def _join(words: Iterable[str]) -> str:
    return " and ".join(f'"{word}"' for word in words)


RULES: dict[str, Rule] = {
    "punctuation:no_comma": Rule(_none, _find_comma),
    "change_case:english_lowercase": Rule(_none, _find_capitals),
    "change_case:english_capital": Rule(_none, _find_small_letters),
    "change_case:capital_word_frequency": Rule(
        _limit("capital_frequency", "capital_relation", (2, 3), (1, 2, 3)), _find_capital_words
    ),
    "keywords:forbidden_words": Rule(_draw_forbidden, _find_forbidden),
    "keywords:existence": Rule(_draw_keywords, _find_missing),
    "keywords:frequency": Rule(_draw_frequency, _find_frequency),
    "keywords:letter_frequency": Rule(_draw_letter, _find_letters),
    "startend:quotation": Rule(_none, _find_unquoted),
    "startend:end_checker": Rule(_one_of("end_phrase", *_ENDINGS), _find_ending),
    "detectable_format:title": Rule(_none, _find_title),
    "detectable_format:number_bullet_lists": Rule(_one_of("num_bullets", 2, 3, 4), _find_bullets),
    "detectable_format:number_highlighted_sections": Rule(_one_of("num_highlights", 1, 2, 3), _find_highlights),
    "detectable_format:json_format": Rule(_none, _find_json),
    "detectable_content:number_placeholders": Rule(_one_of("num_placeholders", 1, 2, 3), _find_placeholders),
    "detectable_content:postscript": Rule(_one_of("postscript_marker", "P.S.", "P.P.S"), _find_postscript),
    "length_constraints:number_words": Rule(_limit("num_words", "relation", (20, 30, 40), (30, 40, 50)), _find_words),
    "length_constraints:number_sentences": Rule(
        _limit("num_sentences", "relation", (2, 3, 4), (3, 4)), _find_sentences
    ),
    "length_constraints:number_paragraphs": Rule(_one_of("num_paragraphs", 2, 3), _find_paragraphs),
    "combination:two_responses": Rule(_none, _find_responses),
    "combination:repeat_prompt": Rule(_draw_repeated, _find_repetition),
}


# ---- Judged responses ----


def judge_responses(tasks: Sequence[Task], responses: Sequence[dict[str, Any]]) -> list[JudgedRecord]:
    """Judge the response to each task; empty ones are left out, because a record cannot hold them.

    Args:
        tasks: The tasks, one per response.
        responses: Objects with `output` and `is_unfinished`.
    """
    records = []
    for task, row in zip(tasks, responses, strict=True):
        if row["output"].strip():
            judgment, spans = judge(task, row["output"], row["is_unfinished"])
            records.append(
                JudgedRecord(
                    instruction=task.prompt, output=row["output"], judgment=judgment, wrong_spans=tuple(spans) or None
                )
            )
    return records
