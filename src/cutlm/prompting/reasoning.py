"""Separate a model's final answer from its thoughts and other channels.

Models mark thoughts in many notations. A server that knows a model's notation removes them; others return all text as
the answer, with special tokens spelled out or skipped. Thoughts are looked for only where a model writes them: at the
beginning of an answer, or in channels. Markup in quotation marks or code belongs to the answer.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SplitAnswer:
    """An answer without its thoughts.

    Attributes:
        output: The final answer; the text itself if it has no thoughts.
        reasoning: Thoughts and other channels, or None.
        problem: Why the answer cannot be separated with certainty, as a sentence; `output` must not be used then.
    """

    output: str
    reasoning: str | None = None
    problem: str | None = None


# ---- Notations ----

# Names of tags that are thoughts wherever they occur, and of those that are thoughts at the beginning only.
_THOUGHT = r"(?:[\w.-]+:)?(?:think(?:ing)?|thoughts?|reasoning)(?::[\w.-]+)?"
_THOUGHT_AT_START = rf"(?:{_THOUGHT}|(?:[\w.-]+:)?(?:reason|reflection|analysis|scratchpad|inner_monologue))"
_TOPIC = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?)"
# The beginning and the end of thoughts; (?P=name) is the name of the opening tag.
_BLOCKS = (
    (rf"<\s*(?P<name>{_THOUGHT_AT_START})(?:\s[^<>]*)?>", r"<\s*/\s*(?P=name)\s*>"),
    (r"<details(?=\s[^<>]*\breasoning\b)[^<>]*>", r"</details>"),
    (rf"\[\s*(?P<name>{_TOPIC})\s*\]", r"\[\s*/\s*(?P=name)\s*\]"),
    (r"◁\s*think\s*▷", r"◁\s*/\s*think\s*▷"),
    (rf"<\|(?P<name>{_TOPIC})\|>", r"<\|(?:/(?P=name)|end)\|>(?:\s*<\|begin\|>assistant<\|content\|>)?"),
    (rf"<\|(?:start|begin)_(?:of_)?(?P<name>{_TOPIC})\|>", r"<\|end_(?:of_)?(?P=name)\|>"),
    (rf"<\|(?P<name>{_TOPIC})_(?:start|begin)\|>", r"<\|(?P=name)_end\|>"),
    (r"<\|channel>\s*thought\b", r"<channel\|>"),
    (r"<unused94>\s*thought\b", r"<unused95>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
)
# Sentences that begin thoughts in the same way, but without an end may as well begin an answer.
_SENTENCES = (
    (r"here are my reasoning steps:?", r"\[BEGIN FINAL RESPONSE\]"),
    (r"thinking\.\.\.", r"\.\.\.done thinking\."),
    (r"here(?:'s| is) my (?:thought|thinking) process:?", r"here(?:'s| is) my response:?"),
)
# The end of thoughts whose beginning is in the prompt.
_LONE_ENDS = (
    rf"<\s*/\s*{_THOUGHT}\s*>",
    rf"\[\s*/\s*{_TOPIC}\s*\]",
    r"◁\s*/\s*think\s*▷",
    rf"<\|(?:/{_TOPIC}|end_(?:of_)?{_TOPIC}|{_TOPIC}_end)\|>",
    r"<channel\|>",
    r"<unused95>",
    r"<\|inner_suffix\|>",
    r"\[BEGIN FINAL RESPONSE\]",
)
# What some models enclose the answer after their thoughts in.
_WRAPPERS = (
    (r"<(?P<name>answer|response|output)>\n", r"</(?P=name)>"),
    (r"<\|(?:start|begin)_(?:of_)?(?P<name>response|text|solution|answer)\|>", r"<\|end_(?:of_)?(?P=name)\|>"),
)
_BOX = r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>"
_END_OF_TURN = (
    r"<[|｜](?:im_end|end|return|eot|eot_id|eom|eom_id|eos|end_?of_?text|end_?of_?turn(?:_token)?|user|observation"
    r"|end▁of▁sentence)[|｜]>|<end_of_turn>|<turn\|>|<eos>|</s>|\[eos\]|<end_of_utterance>|\[END FINAL RESPONSE\]"
)
# A header of Harmony, whose role is in the prompt of the first message.
_HEADER = (
    r"(?:<\|start\|>\s*assistant)?\s*(?:<\|channel\|>\s*(?P<channel>\w+)|\s(?=to=))(?:\s*to=(?P<to>[\w.-]+))?"
    r"\s*(?:<\|constrain\|>\s*\w*)?\s*<\|message\|>"
)
# The same without its special tokens: "analysisThe user asks ...assistantfinalCanberra."
_BARE_START = r"(?:analysis|commentary(?:\s*to=[\w.-]+)?|\s*to=self)"
_BARE_FINAL = r"assistant\s*(?:final|to=user)(?:\s*json(?=\s*[\[{]))?"

# Text that belongs to the answer whatever is in it: code, and quotations within a line.
_QUOTED = r"```.*?(?:```|\Z)|`[^`\n]+`|\"(?:\\.|[^\"\\\n])*\"|“[^”\n]*”|«[^»\n]*»|(?<=['‘])[<\[◁][^'’\n]*"
_MARKUP = (
    rf"<\s*/?\s*{_THOUGHT}\s*/?>|\[/?THINK(?:ING)?\]|◁\s*/?\s*think\s*▷|<\|[\w/▁.-]+\|>|<｜[\w▁]+｜>|<\|[a-z]+>|<[a-z]+\|>"
    r"|<(?:start|end)_of_turn>|<unused\d+>|\[/?INST\]|<</?SYS>>"
)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


_COMPLETE = [_compile(rf"\s*<\s*{_THOUGHT}\s*/(?P<thoughts>)>")]
_COMPLETE += [_compile(rf"\s*{start}(?P<thoughts>.*?){end}") for start, end in (*_BLOCKS, *_SENTENCES)]
_STARTS = [_compile(rf"\s*{start}") for start, _ in _BLOCKS]
_ANY_START = _compile("|".join(re.sub(r"\(\?P<name>|\(\?P=name\)", "(?:", start) for start, _ in _BLOCKS))
_OPEN_START = _compile(rf"(?:{_ANY_START.pattern}|<\|channel\|>\s*analysis\s*<\|message\|>)\s*\Z")
_DATA = re.compile(r"\s*(?:[{`]|\[\s*[{\"])")
_LONE_END = _compile(rf"(?<![\"'`“‘«])(?:{'|'.join(_LONE_ENDS)})")
_WRAPPED = [_compile(rf"{start}(?P<output>.*){end}") for start, end in _WRAPPERS]
_BOXED, _ENDS = _compile(_BOX), _compile(rf"(?:\s*(?:{_END_OF_TURN}))+\s*\Z")
_HEADERS = _compile(_HEADER)
_HARMONY = _compile(rf"\s*{_HEADER}|.*?(?<![\"'`“‘«])<\|start\|>\s*assistant\s*<\|channel\|>\s*\w+[^<]*<\|message\|>")
# Lower case only: "Analysis" is a word.
_BARE = re.compile(rf"(?P<reasoning>{_BARE_START}.*){_BARE_FINAL}(?P<output>.*)", re.DOTALL)
# An identifier such as `finalScore = 1` may begin an answer.
_IDENTIFIER = r"\w+(?:\s*=|[(\[;)]|\.\w)"
_BARE_LEAK = re.compile(
    rf"(?!{_IDENTIFIER})(?:(?:analysis|commentary)[\w\"“{{<*]|\s*to=self|final[A-Z{{])|.*\S(?:{_BARE_FINAL})[A-Z{{]",
    re.DOTALL,
)
_ROLE = re.compile(
    r"\s*(?:assistant|user|system|model|thought)[ \t]*\n\s*\S|.*\n[ \t]*assistant[ \t]*\n|.*[.!?\"”')\]}]assistant\n\n",
    re.DOTALL,
)
_QUOTATION, _LEFTOVER = _compile(_QUOTED), _compile(_MARKUP)
# After a closing tag that is mentioned in a sentence, the sentence continues.
_CONTINUATION = re.compile(r"[,.;:!?)]|[ \t]+[a-z]|[\"'`”’»]")

UNFINISHED = "the answer has thoughts without an end"
_TWO_ANSWERS = "expected one message in the final channel at the end of the answer, got another order"


def split_reasoning(text: str) -> SplitAnswer:
    """Separate the final answer from the thoughts before it, in any notation known.

    A text without thoughts and markup is returned unchanged. Otherwise the answer is stripped of white space, special
    tokens that end a turn, and what encloses it (`<|begin_of_box|>`, `<|START_RESPONSE|>`; `<answer>` on a line of its
    own after thoughts).

    Returns:
        The answer with a `problem` if thoughts have no end, or if markup or the header of a turn is left over.

    Example:

        >>> split_reasoning("<think>It is not Sydney.</think>Canberra.")
        SplitAnswer(output='Canberra.', reasoning='It is not Sydney.', problem=None)
        >>> split_reasoning("analysisIt is not Sydney.assistantfinalCanberra.").output
        'Canberra.'
    """
    if _DATA.match(text):  # whose strings may hold anything
        return _finish(text, [], None)
    if _HARMONY.match(text):
        return _split_channels(text)
    if match := _BARE.fullmatch(text):
        is_certain = len(re.findall(_BARE_FINAL, text)) == 1
        return _finish(match["output"], [match["reasoning"]], None if is_certain else _TWO_ANSWERS)
    thoughts, rest = _cut_blocks(text)
    if not thoughts and (end := _find_lone_end(rest)):
        before = rest[: end.start()]
        if _LEFTOVER.search(_mask_quotations(before)) or _is_quoted(rest, end) or _CONTINUATION.match(rest, end.end()):
            return SplitAnswer(rest, None, f"the answer has {end[0]} in its middle")
        thoughts, rest = _cut_blocks(rest[end.end() :])
        thoughts.insert(0, before)
    is_unfinished = any(start.match(rest) for start in _STARTS)
    return _finish(rest, thoughts, UNFINISHED if is_unfinished else None)


def find_open_thoughts(prompt: str) -> str:
    """Return the markup by which the end of a prompt begins the model's thoughts, or "" if it does not.

    The answer then lacks this beginning; put it first before splitting the answer.

    Example:

        >>> find_open_thoughts("<｜User｜>Hi.<｜Assistant｜><think>\\n")
        '<think>\\n'
    """
    match = _OPEN_START.search(prompt)
    return match[0] if match else ""


def _cut_blocks(text: str) -> tuple[list[str], str]:
    """Return the complete thoughts at the beginning of a text, and the rest."""
    thoughts = []
    while match := next(filter(None, (pattern.match(text) for pattern in _COMPLETE)), None):
        thoughts.append(match["thoughts"])
        text = text[match.end() :]
    return thoughts, text


def _find_lone_end(text: str) -> re.Match[str] | None:
    """Find the first end of thoughts that is not mentioned together with their beginning in a quotation."""
    quotations = [match.span() for match in _QUOTATION.finditer(text) if _ANY_START.search(match[0])]
    ends = _LONE_END.finditer(text)
    return next((end for end in ends if not any(left <= end.start() < right for left, right in quotations)), None)


def _is_quoted(text: str, part: re.Match[str]) -> bool:
    return any(match.start() < part.start() < match.end() for match in _QUOTATION.finditer(text))


def _split_channels(text: str) -> SplitAnswer:
    """Separate the messages of Harmony."""
    headers = list(_HEADERS.finditer(text))
    starts = [0, *(header.start() for header in headers), len(text)]
    # A prompt may hold the first header.
    bodies = [text[: starts[1]], *(text[header.end() : end] for header, end in zip(headers, starts[2:], strict=True))]
    bodies = [_drop_ends(body) for body in bodies]
    is_final = [_is_final(header) for header in headers]
    reasoning = [body for body, final in zip(bodies, [False, *is_final], strict=True) if not final]
    if sum(is_final) == 1 and is_final[-1]:
        return _finish(bodies[-1], reasoning, None)
    return SplitAnswer(text, _join(reasoning), _TWO_ANSWERS if any(is_final) else UNFINISHED)


def _is_final(header: re.Match[str]) -> bool:
    return header["to"] in (None, "user") and (header["channel"] or "final").lower() == "final"


def _finish(rest: str, thoughts: list[str], problem: str | None) -> SplitAnswer:
    """Remove the markup around the answer, and look for leftover markup."""
    output = _drop_ends(rest)
    for wrapped in _WRAPPED if thoughts or output.lstrip().startswith("<|") else ():
        if match := wrapped.fullmatch(output.strip()):
            output = match["output"]
    output = _BOXED.sub(lambda match: match[1], output)
    if thoughts or output != rest:
        output = output.strip()
    return SplitAnswer(output, _join(thoughts), problem or _find_problem(output))


def _find_problem(output: str) -> str | None:
    bare = _mask_quotations(output)
    if markup := _LEFTOVER.search(bare):
        return f"the answer contains {markup[0]}, which a server should have removed"
    if _ROLE.match(bare):
        return "the answer contains the header of a turn"
    if _BARE_LEAK.match(bare):
        return "the answer contains the name of a channel"
    return None


def _drop_ends(text: str) -> str:
    """Remove special tokens that end a turn; in HTML, `</s>` ends a passage that is struck out."""
    return text if "<s>" in text else _ENDS.sub("", text)


def _mask_quotations(text: str) -> str:
    return _QUOTATION.sub(lambda match: '"' * len(match[0]), text)


def _join(thoughts: list[str]) -> str | None:
    return "\n\n".join(filter(None, (thought.strip() for thought in thoughts))) or None
