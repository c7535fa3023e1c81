"""Parsing of a language model's answers when it judges a response.

In doubt, an answer counts as neither praise nor an objection: a lost judgment can be asked for again, but a misread one
is trained on. So an objection is never inferred from the absence of praise. The answer is read after its thoughts.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cutlm.data.praise import is_brief_praise, reads_like_praise
from cutlm.judges.prompt import choose_marker
from cutlm.judges.responses import Response
from cutlm.prompting.reasoning import UNFINISHED, split_reasoning
from cutlm.prompting.spans import Span

MAX_JUDGMENT_LENGTH = 20_000

# The format of an answer: a JSON object; text; the format that a model is trained on.
AnswerFormat = Literal["json", "text", "trained"]


class BadAnswer(Exception):
    """An answer that is not a judgment: its kind, by which such answers are counted, and the reason as a sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on a response.

    Attributes:
        judgment: What is wrong; None if nothing is wrong.
        quotes: The passages of the response that the judge says are wrong.
    """

    judgment: str | None
    quotes: tuple[str, ...] = ()


def read_answer(
    text: str | None,
    finish_reason: str | None,
    response: Response,
    question: str,
    answer_format: AnswerFormat = "json",
) -> Verdict:
    """Read a model's answer to a question about a response.

    A JSON object with the fields of `RESPONSE_FORMAT`, of which `quotes` may be missing, and the single word "Perfect."
    are read in the formats "json" and "text". A text may also have a first or last line with the decision,
    `Satisfactory: yes` or `Satisfactory: no`; without one it is an objection only if it names a fault and praises
    nothing at its beginning and its end. A trained model's decision is on the last line.

    Args:
        text: The answer.
        finish_reason: Why it ends: "length" if it is truncated.
        response: The response that was judged.
        question: The question.
        answer_format: The format that the question asks for.

    Raises:
        BadAnswer: It is empty, truncated, a refusal, an echo, contradictory, or not certainly a judgment.
    """
    answer = separate_answer(text, finish_reason)
    if answer_format == "trained":
        return _read_trained(answer, response, question)
    if (content := find_json(answer)) is not None:
        if _is_echo(content, response.output):
            raise BadAnswer("echo of the response", "the answer repeats the response")
        return _decide(*_read_object(content), response, question)
    # Before looking for praise: a repeated response that begins with "Perfect" would praise itself.
    _refuse_echo(answer, response, question)
    if _PERFECT_ALONE.fullmatch(answer):
        return Verdict(None)
    if _is_refusal(answer):
        raise BadAnswer("refusal", "the model refuses to judge")
    if answer_format == "json":
        raise BadAnswer("unclear answer", "expected a JSON object and nothing else, got other text")
    if decided := _find_decision(answer):
        return _decide(*decided, (), response, question)
    return _read_undecided(answer)


def locate_quotes(quotes: Sequence[str], output: str) -> tuple[list[Span], int]:
    """Find the passages of a response that a judge quotes.

    White space in a quote matches any white space, and a quote does not match inside a word. A quote that occurs
    several times is not located, because it is not certain which place is meant.

    Returns:
        The spans, in order and merged where they overlap, and the number of quotes that are not located.
    """
    spans, num_missing = [], 0
    for quote in quotes:
        pattern = r"\s+".join(map(re.escape, quote.split()))
        matches = re.finditer(f"(?=({pattern}))", output) if pattern else ()
        found = [match.span(1) for match in matches if not _cuts_words(output, match.span(1))]
        spans += found if len(found) == 1 else []
        num_missing += len(found) != 1
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged, num_missing


def _cuts_words(text: str, span: Span) -> bool:
    """Whether a span begins or ends inside a word or a number, in scripts that write spaces between words."""
    return any(0 < place < len(text) and all(_is_of_word(text[place + step]) for step in (-1, 0)) for place in span)


def _is_of_word(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper()


# ---- Answers of any format ----


def separate_answer(text: str | None, finish_reason: str | None) -> str:
    """Return an answer without thoughts and surrounding white space."""
    if finish_reason == "length":
        reason = "the answer was truncated at the maximum number of tokens; set a larger --max_tokens"
        raise BadAnswer("cut off", reason)
    split = split_reasoning(text or "")
    if split.problem is not None:
        raise BadAnswer("unfinished thoughts" if split.problem == UNFINISHED else "unclear answer", split.problem)
    answer = split.output.strip()
    if not answer:
        raise BadAnswer("empty answer", "the answer is empty")
    if "\0" in answer or re.search("[\ud800-\udfff]", answer):
        raise BadAnswer("malformed answer", "the answer has null bytes or halves of surrogate pairs")
    if len(answer) > MAX_JUDGMENT_LENGTH:
        reason = f"expected a judgment of at most {MAX_JUDGMENT_LENGTH} characters, got {len(answer)}"
        raise BadAnswer("too long", reason)
    return answer


def _refuse_echo(judgment: str, response: Response, question: str) -> None:
    if _is_echo(judgment, response.output):
        raise BadAnswer("echo of the response", "the answer repeats the response")
    if choose_marker(response.full_instruction, response.output) in judgment or _is_echo(judgment, question):
        raise BadAnswer("echo of the prompt", "the answer repeats the question")


def _is_echo(answer: str, text: str) -> bool:
    """Whether an answer repeats a text, a long part of it, or a long text with a few words around it."""
    answer, text = (" ".join(part.casefold().split()) for part in (answer, text))
    if answer == text:  # the word that the question asks for is not an echo
        return not re.fullmatch(r"perfect\.?", answer)
    if len(answer) >= _MIN_ECHO and answer in text:
        return True
    return len(text) >= _MIN_ECHO and text in answer and len(answer) - len(text) < _MIN_ECHO


def _decide(is_satisfactory: bool, judgment: str, quotes: Sequence[str], response: Response, question: str) -> Verdict:
    """Return the verdict of a decision and a judgment that agree."""
    _refuse_echo(judgment, response, question)
    if is_satisfactory:
        if quotes:
            raise BadAnswer("contradictory answer", "the decision is that nothing is wrong, but passages are quoted")
        if objects(judgment):
            raise BadAnswer("contradictory answer", "the judgment objects to something, but the decision does not")
        return Verdict(None)
    if not re.search(r"\w", judgment):
        raise BadAnswer("empty judgment", "the decision is that something is wrong, but the judgment is empty")
    if praises(judgment):
        raise BadAnswer("contradictory answer", "the judgment praises the response, but the decision does not")
    if _is_refusal(judgment):
        raise BadAnswer("refusal", "the model refuses to judge")
    return Verdict(judgment, tuple(quotes))


# ---- JSON ----


def find_json(answer: str) -> str | None:
    """Return the JSON in an answer that is JSON, with a fence or tags around it or a label before it, or None."""
    match = _JSON.fullmatch(answer)
    return match["json"] if match else None


def _read_object(content: str) -> tuple[bool, str, list[str]]:
    """Return decision, judgment and quotes."""
    try:
        value = json.loads(content, strict=False, object_pairs_hook=_make_object)
    except (ValueError, RecursionError):
        raise BadAnswer("unclear answer", "expected one JSON object, got something else in braces") from None
    if not isinstance(value, dict):
        raise BadAnswer("unclear answer", "expected a JSON object, got a list")
    fields = {"judgment": "", "quotes": [], **{name: item for name, item in value.items() if item is not None}}
    is_satisfactory, judgment, quotes = fields.get("satisfactory"), fields["judgment"], fields["quotes"]
    if "satisfactory" not in value or "judgment" not in value or set(fields) - {"satisfactory", "judgment", "quotes"}:
        expected = "expected the fields 'satisfactory', 'judgment' and 'quotes'"
        raise BadAnswer("unclear answer", f"{expected}, got {', '.join(map(repr, value)) or 'none'}")
    if not isinstance(is_satisfactory, bool) or not isinstance(judgment, str) or not _is_list_of_texts(quotes):
        expected = "expected a boolean 'satisfactory', a string 'judgment' and a list of strings 'quotes'"
        raise BadAnswer("unclear answer", f"{expected}, got other types")
    split = split_reasoning(judgment)
    if split.problem is not None or split.reasoning is not None:
        raise BadAnswer("unclear answer", "the judgment contains markup of thoughts or turns")
    if "\0" in judgment or re.search("[\ud800-\udfff]", judgment):  # spelled as \u0000 in JSON
        raise BadAnswer("malformed answer", "the judgment has null bytes or halves of surrogate pairs")
    # Some models write an empty quote for none.
    return is_satisfactory, judgment.strip(), [quote for quote in quotes if quote.strip()]


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field is there twice")
    return dict(pairs)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# ---- Text ----


def _find_decision(answer: str) -> tuple[bool, str] | None:
    """Return the decision on the first or last line and the judgment; None if there is no decision."""
    lines = answer.split("\n")
    decisions = {index: match for index, line in enumerate(lines) if (match := _DECISION.fullmatch(line))}
    if not decisions:
        return None
    if len(decisions) > 1 or not set(decisions) <= {0, len(lines) - 1}:
        raise BadAnswer("several decisions", "expected one decision, on the first or the last line, got another")
    ((index, decision),) = decisions.items()
    judgment = "\n".join(lines[:index] + lines[index + 1 :]).strip()
    return decision["decision"].lower() in ("yes", "true"), _LABEL.sub("", judgment)


def _read_undecided(answer: str) -> Verdict:
    if _NEARLY_DECISION.search(answer):
        raise BadAnswer("unclear answer", "the answer has a decision in another form than asked for")
    if _PERFECT.match(answer):  # records would take it for praise
        raise BadAnswer("unclear answer", 'the answer starts with "Perfect" and continues')
    if praises(answer):
        raise BadAnswer("unclear answer", 'the answer praises or rates the response without the word "Perfect."')
    if not _FAULT.search(_HANDLED.sub(" ", _DENIAL.sub(" ", _straighten(answer)))):
        raise BadAnswer("unclear answer", "the answer neither praises the response nor names a fault")
    first, *_, last = [*_split_sentences(answer)] * 2
    if _is_praise(first) or _is_praise(last):
        raise BadAnswer("unclear answer", "the answer begins or ends with praise, and names a fault")
    return Verdict(answer)


def _read_trained(answer: str, response: Response, question: str) -> Verdict:
    *lines, last = answer.split("\n")
    decision = _TRAINED_DECISION.fullmatch(last.strip())
    if decision is None:
        raise BadAnswer("no decision", 'expected "Satisfactory: Yes" or "Satisfactory: No" as the last line, got none')
    if any(_TRAINED_DECISION.fullmatch(line.strip()) for line in lines):
        raise BadAnswer("several decisions", "expected one decision, on the last line, got more")
    judgment = "\n".join(lines).strip()
    if not judgment:
        raise BadAnswer("empty judgment", "there is a decision without a judgment")
    _refuse_echo(judgment, response, question)
    is_praise = _PERFECT.match(judgment) is not None
    if is_praise != (decision[1] == "Yes") or (decision[1] == "No" and praises(judgment)):
        verb = "objects to something" if decision[1] == "Yes" else "praises the response"
        raise BadAnswer("contradictory answer", f"the judgment {verb}, but the decision is {decision[1]}")
    return Verdict(None if is_praise else judgment)


# ---- Words ----


def objects(judgment: str) -> bool:
    """Whether a judgment names or hints at a fault, besides denying that there is one."""
    if reads_like_praise(judgment) or is_brief_praise(judgment):
        return False
    text = _DENIAL.sub(" ", _straighten(judgment))
    return _OBJECTION.search(text) is not None or _FAULT.search(text) is not None


def praises(judgment: str) -> bool:
    """Whether a judgment praises or rates the response, and does not object to anything."""
    if _PERFECT.match(judgment) or reads_like_praise(judgment) or is_brief_praise(judgment):
        return True
    if objects(judgment):
        return False
    return _DENIAL.search(_straighten(judgment)) is not None or all(map(_is_praise, _split_sentences(judgment)))


def _is_praise(sentence: str) -> bool:
    return (
        _PERFECT.match(sentence) is not None
        or _GOOD.match(_straighten(sentence)) is not None
        or reads_like_praise(sentence)
        or is_brief_praise(sentence)
    )


def _split_sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(r"\w", sentence)]


def _straighten(text: str) -> str:
    return text.replace("’", "'")


def _is_refusal(text: str) -> bool:
    """Whether a model refuses to judge, as opposed to beginning with a quotation."""
    text = _straighten(text)
    quoted = _IN_QUOTES.fullmatch(text)
    return _REFUSAL.match(quoted[1] if quoted else text) is not None


# Shorter texts may occur in a judgment by chance or as a quotation.
_MIN_ECHO = 40

_JSON = re.compile(
    r"(?:[^\n{}\[\]]{0,80}:\s*|json\s*)?"  # "Here is my judgment:"
    r"(?:<(?P<tag>\w+)>\s*)?(?:(?P<fence>`{1,4}|~{3})\s*(?:json\w*)?\s*)?"
    r"(?P<json>[\[{].*[\]}])"
    r"(?(fence)\s*(?P=fence))(?(tag)\s*</(?P=tag)>)",
    re.DOTALL | re.IGNORECASE,
)

# Quotes, asterisks, brackets and line breaks around a word. A question mark is excluded: a question is not praise.
_MARKS = r"[\s\"'“”‘’«».,!:;*_`#>()\[\]{}/<-]*"
_LABELS = rf"(?:(?:final|judge?ment|answer|verdict|result|output|assessment|evaluation){_MARKS})*"
_PERFECT_ALONE = re.compile(rf"{_MARKS}{_LABELS}perfect{_MARKS}{_LABELS}", re.IGNORECASE)
# Matches everything that `cutlm.data.records.is_praise` matches, and more: no objection may begin like this.
_PERFECT = re.compile(r"(?:[^\w?]|_)*perfect(?![^\W_])", re.IGNORECASE)

_DECISION = re.compile(
    r"[\s*_#>-]*satisfactory[\s*_]*[:=][\s*_]*(?P<decision>yes|no|true|false)[\s*_.]*", re.IGNORECASE
)
_NEARLY_DECISION = re.compile(r"satisfactory[\"'\s*_]*[:=]|[\"']judge?ment[\"']\s*:", re.IGNORECASE)
_TRAINED_DECISION = re.compile(r"Satisfactory: (Yes|No)")
_LABEL = re.compile(r"\A[\s*_#>-]*judge?ment[\s*_]*[:=][\s*_]*", re.IGNORECASE)

_FAULTS = (
    r"(?:objections?|errors?|mistakes?|issues?|problems?|faults?|flaws?|inaccurac(?:y|ies)|complaints?|criticisms?"
    r"|concerns?|corrections?|changes?|improvements?|omissions?|defects?|weakness(?:es)?|contradictions?"
    r"|shortcomings?|wrong|incorrect|inaccurate|amiss|missing|false|misleading|bad"
    r"|to\s+(?:correct|fix|improve|change|add|object(?:\s+to)?|critici[sz]e|complain(?:\s+about)?|fault))"
)
# Words between a negation and a fault: "no factual errors", and not "does not fix the errors".
_ADJECTIVES = r"(?:(?!(?:the|its|this|that|these|those|your|all|and|but)\b)[\w-]+\s+){0,2}?"
_END = (
    r"(?=\s*(?:[.,;:!)\"*]|$)|\s+(?:at|and|about|are|found|for|here|in|is|of|or|so|that|to|was|were|whatsoever|with)\b)"
)
_HAVE = (
    r"(?:contain|detect|find|found|have|identify|include|introduce|make|need|notice|object|require|see|seen|show|spot)"
)
# "No errors were found", "does not contain any mistakes", "nothing is missing", "there is nothing to improve".
_DENIAL = re.compile(
    rf"\b(?:no|zero|without|free\s+(?:of|from)|neither|nor)\s+{_ADJECTIVES}{_FAULTS}"
    rf"(?:(?:,|,?\s+and|,?\s+or)\s+{_ADJECTIVES}{_FAULTS})*{_END}"
    rf"|(?:\b(?:not|cannot|never)|n't)\s+(?:{_HAVE}\s+)?{_ADJECTIVES}{_FAULTS}(?:,?\s+(?:and|or)\s+{_FAULTS})*{_END}"
    rf"|(?:\b(?:not|never)|n't)\s+(?:have\s+been|be)\s+(?:better|improved)"
    rf"|\bnothing\s+(?:else\s+)?(?:{_ADJECTIVES}{_FAULTS}|is\s+needed|needs?\s+to\b)"
    r"|\bno\s+(?:further\s+)?(?:need|reason)\s+(?:to|for)\b|\bnothing\s+but\s+praise\b",
    re.IGNORECASE,
)
# "All errors were corrected", "it avoids mistakes".
_HANDLED = re.compile(
    rf"\b(?:address|avoid|caught|catch|correct|detect|explain|find|found|fix|handl|identif|notic|point|prevent|remov|resolv"
    rf"|spot)\w*\s+(?:[\w-]+\s+){{0,3}}?{_FAULTS}\b"
    rf"|\b{_FAULTS}\s+(?:[\w-]+\s+){{0,5}}?(?:addressed|avoided|caught|corrected|detected|fixed|found|handled|identified"
    r"|removed|resolved)\b",
    re.IGNORECASE,
)
# Words that may object. A judgment that has none of them does not.
_OBJECTION = re.compile(
    r"\b(?:but|however|though|although|except|unless|yet|only|still|while|instead|actually|wait|no|not|none|nothing|"
    r"never|nor|without|should|could|would|wrong\w*|errors?|mistak\w+|incorrect\w*|inaccura\w+|false\w*|miss\w*|"
    r"lack\w*|fail\w*|problem\w*|issues?|flaw\w*|omit\w*|mislead\w*|contradict\w*|irrelevant|incomplete\w*|vague\w*|"
    r"unnecessar\w+|needs?|too)\b|n't\b|\?",
    re.IGNORECASE,
)
# Words that object beyond doubt.
_FAULT = re.compile(
    r"\b(?:wrong\w*|incorrect\w*|inaccura\w+|erroneous\w*|errors?|mistak\w+|false(?:ly)?|untrue|missing|miss(?:es|ed)"
    r"|lack(?:s|ing|ed)?|fail(?:s|ed)?|flaw(?:s|ed)?|omit(?:s|ted)?|mislead\w*|contradict\w*|irrelevant|off-topic"
    r"|incomplete\w*|misspell\w*|misspelt|typos?|fabricat\w+|hallucinat\w+|invent(?:s|ed)|unsupported|ungrammatical"
    r"|misunderst\w+|misinterpret\w+|ignor(?:es|ed)|unnecessar\w+|unrelated|illogical|nonsens\w+|imperfect\w*"
    r"|should\s+(?:be|have|not|say|name|mention|include|use|read)"
    r"|(?:not|cannot)\s+(?:\w+\s+)?(?:correct\w*|right|true|accurate\w*|perfect|answer\w*|follow\w*|mention\w*"
    r"|address\w*|explain\w*|provide\w*|include\w*|state\w*|name|give|match\w*|the\s+(?:capital|answer|correct)))\b"
    r"|n't\s+(?:\w+\s+)?(?:correct|right|true|accurate|answer|follow|mention|address|explain|provide|include|state|name"
    r"|give|match)\b",
    re.IGNORECASE,
)
# The beginning of a sentence that praises, whatever follows.
_GOOD = re.compile(
    r"[\W_]*(?:(?:\w+\s*:\s*)?(?:perfect|flawless|excellent|great|good|nice|well\s+done|correct|right|accurate|yes|fine"
    r"|bravo|satisfactory|agreed)\b"
    r"|(?:the|this|that|your|it|overall,?|everything|all)\s*(?:[\w']+\s+){0,3}?(?:perfectly|correctly|accurately|rightly"
    r"|properly|successfully|adequately|meets?|satisf(?:y|ies)|fulfill?s?|well-written"
    r"|(?:answers?|follows?|addresses|covers)\s+(?:all|both|each|every|exactly|the\s+(?:question|instruction|prompt|task))"
    r"|(?:is|are)\s+(?:\w+\s+)?(?:perfect|correct|right|accurate|good|great|fine|excellent|satisfactory|complete|helpful)"
    r"|does\s+an?\s+\w+\s+job)\b"
    r"|(?:[\w']+\s+){0,3}?(?:looks?|sounds?|seems?)\s+(?:\w+\s+)?(?:good|correct|right|fine|great)\b"
    r"|i\s+(?:\w+\s+)?(?:agree|like|love|approve)\b)",
    re.IGNORECASE,
)

_REFUSAL = re.compile(
    r"\s*(?:(?:i'm|i am) (?:(?:very|so|really) )?sorry\b|sorry,? (?:but )?i\b|i (?:must )?apologi[sz]e\b"
    r"|my apologies\b|as an ai\b|as a (?:large )?language model\b"
    r"|(?:i'm|i am) (?:just |only )?(?:an ai|a (?:large )?language model)\b"
    r"|(?:i'm|i am) (?:unable|not able|not comfortable)\b|i (?:don't|do not) feel comfortable\b"
    r"|(?:unfortunately,? )?i (?:can't|cannot|can not|won't|will not) (?:be able to )?(?:assist|comply|provide|judge"
    # "I can't help but notice" begins a judgment.
    r"|evaluate|fulfill?|answer|do|engage|continue|rate|review|discuss|help(?! but\b| \w+ing\b))\b)",
    re.IGNORECASE,
)
_IN_QUOTES = re.compile(r"\s*[\"“]([^\"“”]*)[\"”]\s*")
