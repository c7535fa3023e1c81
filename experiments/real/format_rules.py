"""Format rules of IFEval: the rule in words, the spans of a response that break it, and a judgment in plain words.

The rules are those of `lm_eval.tasks.ifeval`, whose checkers say only whether a response follows a rule; a test holds
the two against each other.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nltk.tokenize.punkt import PunktSentenceTokenizer

from cutlm.prompting.spans import Span

# Words that are not worth forbidding.
_COMMON_WORDS = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "also",
        "another",
        "because",
        "been",
        "before",
        "being",
        "between",
        "both",
        "could",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "every",
        "from",
        "have",
        "having",
        "here",
        "into",
        "just",
        "like",
        "made",
        "make",
        "many",
        "more",
        "most",
        "much",
        "other",
        "over",
        "please",
        "provide",
        "same",
        "should",
        "some",
        "such",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "under",
        "until",
        "using",
        "very",
        "want",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "will",
        "with",
        "word",
        "words",
        "would",
        "write",
        "your",
    ]
)


@dataclass(frozen=True)
class Rule:
    """A rule that a program can check.

    Attributes:
        instruction_id: Its name in IFEval.
        arguments: The arguments of IFEval's checker.
    """

    instruction_id: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return NAMES[self.instruction_id]


NAMES = {
    "punctuation:no_comma": "commas",
    "change_case:english_lowercase": "lowercase",
    "change_case:english_capital": "capitals",
    "keywords:forbidden_words": "forbidden words",
    "length_constraints:number_words": "number of words",
    "length_constraints:number_sentences": "number of sentences",
    "keywords:letter_frequency": "letter frequency",
}


# ---- Rules ----


def draw_rule(instruction_id: str, instruction: str, answer: str, rng: random.Random) -> Rule | None:
    """Draw a rule for an instruction; None if it does not suit.

    Args:
        instruction_id: A key of `NAMES`.
        instruction: The instruction.
        answer: A good answer to it, whose words are tempting.
        rng: Source of random numbers.
    """
    arguments: dict[str, Any] = {}
    if instruction_id == "keywords:forbidden_words":
        words = _list_tempting_words(instruction, answer)
        if len(words) < 2:
            return None
        arguments = {"forbidden_words": words[:2]}
    elif instruction_id == "length_constraints:number_words":
        arguments = {"relation": "less than", "num_words": rng.choice([12, 15, 20, 25, 30])}
    elif instruction_id == "length_constraints:number_sentences":
        arguments = {"relation": "less than", "num_sentences": rng.choice([2, 3])}
    elif instruction_id == "keywords:letter_frequency":
        limits = {"let_relation": "less than", "let_frequency": rng.choice([2, 3, 4])}
        arguments = {"letter": rng.choice("bcdghmpuwy")} | limits
    return Rule(instruction_id, arguments)


def _list_tempting_words(instruction: str, answer: str) -> list[str]:
    """Words that an answer is likely to use: first those of the instruction, then those that the answer repeats."""
    words = re.findall(r"\b[a-z]{4,}\b", answer.lower())
    asked = set(re.findall(r"\b[a-z]{4,}\b", instruction.lower()))
    candidates = [word for word in dict.fromkeys(words) if word not in _COMMON_WORDS]
    return sorted(candidates, key=lambda word: (word not in asked, -words.count(word)))


def word_rule(rule: Rule, rng: random.Random) -> str:
    """Say a rule as a sentence that follows an instruction."""
    values = dict(rule.arguments)
    if "forbidden_words" in values:
        first, second = values["forbidden_words"]
        values |= {"first": first, "second": second}
    return rng.choice(_RULE_WORDINGS[rule.name]).format(**values)


_RULE_WORDINGS = {
    "commas": ["Do not use any commas.", "Answer without a single comma.", "Commas are not allowed in your answer."],
    "lowercase": [
        "Answer in English and use lowercase letters only.",
        "Your whole answer should be in lowercase English, without any capital letter.",
    ],
    "capitals": [
        "Answer in English and in capital letters only.",
        "WRITE YOUR WHOLE ANSWER IN ENGLISH CAPITAL LETTERS.",
    ],
    "forbidden words": [
        "Do not use the words {first} and {second}.",
        "Answer without the word {first} and without the word {second}.",
    ],
    "number of words": ["Answer with less than {num_words} words.", "Use fewer than {num_words} words."],
    "number of sentences": [
        "Answer with less than {num_sentences} sentences.",
        "Your answer should have fewer than {num_sentences} sentences.",
    ],
    "letter frequency": [
        "The letter {letter} should appear less than {let_frequency} times in your answer.",
        "Use the letter {letter} fewer than {let_frequency} times.",
    ],
}


# ---- What breaks a rule ----


def find_broken_spans(rule: Rule, response: str) -> list[Span]:
    """Find the characters of a response that break a rule; none if it is followed.

    Of a rule about the case of the whole text, only the first run of letters in the wrong case counts: what follows can
    be predicted from it. What exceeds a limit counts as a whole.
    """
    arguments = rule.arguments
    if rule.name == "commas":
        return _find(",", response)
    if rule.name in ("lowercase", "capitals"):
        is_wrong = str.isupper if rule.name == "lowercase" else str.islower
        start = next((index for index, letter in enumerate(response) if is_wrong(letter)), None)
        if start is None:
            return []
        end = next((index for index in range(start, len(response)) if not is_wrong(response[index])), len(response))
        return [(start, end)]
    if rule.name == "forbidden words":
        words = "|".join(map(re.escape, arguments["forbidden_words"]))
        return _find(rf"\b(?:{words})\b", response, re.IGNORECASE)
    if rule.name == "number of words":
        return _merge(_find(r"\w+", response)[arguments["num_words"] - 1 :], response)
    if rule.name == "number of sentences":
        return _merge(find_sentences(response)[arguments["num_sentences"] - 1 :], response)
    letters = [index for index, letter in enumerate(response.lower()) if letter == arguments["letter"]]
    return [(index, index + 1) for index in letters[arguments["let_frequency"] - 1 :]]


def find_sentences(text: str) -> list[Span]:
    """Find the sentences of a text; the tokenizer is untrained, so an abbreviation ends a sentence."""
    return list(PunktSentenceTokenizer().span_tokenize(text))


def _find(pattern: str, text: str, flags: int = 0) -> list[Span]:
    return [match.span() for match in re.finditer(pattern, text, flags)]


def _merge(spans: Sequence[Span], response: str) -> list[Span]:
    """The rest of a response from the first of some spans."""
    return [(spans[0][0], len(response.rstrip()))] if spans else []


# ---- Judgments ----


def judge_response(rule: Rule, response: str, rng: random.Random) -> tuple[str | None, list[Span]]:
    """Judge a response in plain words; the judgment is None if it follows the rule."""
    spans = find_broken_spans(rule, response)
    if not spans:
        return None, []
    start, end = spans[0]
    values: dict[str, Any] = {
        **rule.arguments,
        "count": len(spans),
        "times": "once" if len(spans) == 1 else f"{len(spans)} times",
        "first": response[start:end],
        "word": _surrounding_word(response, start),
        "num_used": len(_find(r"\w+", response)),
        "num_found": len(find_sentences(response)),
        "num_letters": response.lower().count(rule.arguments.get("letter", " ")),
        "used": " and ".join(sorted({response[left:right].lower() for left, right in spans}))
        if rule.name == "forbidden words"
        else "",
    }
    return rng.choice(_JUDGMENT_WORDINGS[rule.name]).format(**values), spans


def _surrounding_word(text: str, index: int) -> str:
    """The word that a character belongs to; for a comma, the one before it."""
    return next((match[0] for match in re.finditer(r"\w+|\W+?(?=\w|$)", text) if match.end() > index), "")


_JUDGMENT_WORDINGS = {
    "commas": [
        "The response uses commas although it was told not to use any.",
        "There should be no comma, but there is one {times}.",
        "Commas were forbidden. This answer is full of them.",
        "I asked for an answer without commas. You put a comma where none is allowed.",
    ],
    "lowercase": [
        'The response has capital letters, such as in "{word}", although everything should be lowercase.',
        "Capital letters were not allowed, and you used them.",
        'It starts to break the rule at "{word}": this should be in lowercase.',
        "You wrote with capital letters. I wanted lowercase only.",
    ],
    "capitals": [
        'The response has lowercase letters, such as in "{word}", although everything should be in CAPITALS.',
        "Lowercase letters were not allowed, and you used them.",
        'It starts to break the rule at "{word}": this should be in capital letters.',
        "You wrote in ordinary lowercase. I wanted CAPITAL LETTERS only.",
    ],
    "forbidden words": [
        "The response uses {used}, which it was told not to use.",
        'The wording "{used}" was forbidden, but it occurs {times}.',
        "One or more of the words that I did not want to read are in the answer.",
        "I asked you to avoid {used}. You did not.",
    ],
    "number of words": [
        "The response is too long: it has {num_used} words, but it should have less than {num_words}.",
        "Too many words. Stop before word {num_words}.",
        'The limit was less than {num_words} words. Everything from "{word}" on is too much.',
        "It should have ended much earlier, the text is longer than I asked for.",
    ],
    "number of sentences": [
        "The response has {num_found} sentences, but it should have less than {num_sentences}.",
        "Too many sentences. I wanted fewer than {num_sentences}.",
        'The answer should have stopped before the sentence that starts with "{word}".',
        "It goes on after the last sentence that was allowed.",
    ],
    "letter frequency": [
        "The letter {letter} appears {num_letters} times, but it should appear less than {let_frequency} times.",
        "Too many words have a {letter} in them.",
        'With "{word}" the letter {letter} was used too often.',
        "You were told to use the letter {letter} fewer than {let_frequency} times, and you did not.",
    ],
}


# Judgments of the shared responses, which come with their own wording.
_KNOWN_JUDGMENTS = {
    r"uses commas": "punctuation:no_comma",
    r"capital letters, although everything should be in lowercase": "change_case:english_lowercase",
    r"lowercase letters, although everything should be in CAPITAL": "change_case:english_capital",
    r"uses a forbidden word, one of \['(\w+)', '(\w+)'\]": "keywords:forbidden_words",
    r"words, but it should have less than (\d+) words": "length_constraints:number_words",
    r"does not have less than (\d+) sentences": "length_constraints:number_sentences",
    r"the letter (\w) should appear less than (\d+) times": "keywords:letter_frequency",
}


def recognize_rule(judgment: str) -> Rule | None:
    """Find the rule that a judgment of the shared responses is about; None if it is none of these."""
    for pattern, instruction_id in _KNOWN_JUDGMENTS.items():
        if found := re.search(pattern, judgment):
            match NAMES[instruction_id], found.groups():
                case "forbidden words", words:
                    return Rule(instruction_id, {"forbidden_words": list(words)})
                case "number of words", (number,):
                    return Rule(instruction_id, {"relation": "less than", "num_words": int(number)})
                case "number of sentences", (number,):
                    return Rule(instruction_id, {"relation": "less than", "num_sentences": int(number)})
                case "letter frequency", (letter, number):
                    arguments = {"letter": letter, "let_relation": "less than", "let_frequency": int(number)}
                    return Rule(instruction_id, arguments)
            return Rule(instruction_id, {})
    return None
