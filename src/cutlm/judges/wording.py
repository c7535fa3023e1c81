"""What the words of a model's answer say: thoughts before it, praise, a refusal.

In doubt an answer is neither praise nor an objection: a judgment that is lost can be asked for again, and one that was
misread is trained on. What becomes of such answers is left to `cutlm.judges.prompt`.
"""

import re

# Thoughts stand at the start.
_THOUGHTS = re.compile(r"(?:\s*<think>.*?</think>)+", re.DOTALL)
# Where the chat template opens them, in the prompt, the answer holds their end alone. In quotes, it is what is judged.
_END_OF_THOUGHTS = re.compile(r"(?:(?!<think>).)*?(?<![\"'`“‘])</think>", re.DOTALL)

# Whatever quotes, stars, brackets or lines stand around a word. A question is no praise.
_MARKS = r"(?:[^\w?]|_)*"
# All that `cutlm.data.records.is_praise` takes for praise, and more: what objects must not begin like this.
_PERFECT = re.compile(rf"{_MARKS}perfect(?![^\W_])", re.IGNORECASE)
_LABELS = rf"(?:(?:final|judge?ment|answer|verdict|result|output|assessment|evaluation){_MARKS})*"
_PERFECT_ALONE = re.compile(rf"{_MARKS}{_LABELS}perfect{_MARKS}{_LABELS}", re.IGNORECASE)
_TAIL = re.compile(r"[\"'”’*_`]*[.!][^?]{1,80}", re.DOTALL)
_OBJECTION = re.compile(
    r"\b(?:but|however|though|although|except|unless|yet|only|still|while|instead|actually|wait|no|not|none|nothing|"
    r"never|nor|without|should|could|would|wrong\w*|errors?|mistakes?|incorrect\w*|inaccura\w+|false|miss\w*|lacks?|"
    r"fails?|problems?|issues?|flaws?)\b|n't\b",
    re.IGNORECASE,
)

_WORD = re.compile(r"[^\W_]+")
_VOCABULARY = {
    "filler": "a about all also an and answer any are as at be detected evaluation final found here i identified in is"
    " it its judgment judgement my noted obvious of out rating reply response s score see seems task that the there"
    " this to verdict very was were with you your",
    "good": "acceptable accurate approved clear complete completely correct done entirely excellent fine flawless fully"
    " good great job looks ok okay pass passed perfect perfectly precise right satisfactory well yes",
    "none": "0 n na no none nothing null without zero",
    "fault": "amiss change correction corrections error errors fault faults fix flaw flaws improve inaccuracies"
    " incorrect issue issues missing mistake mistakes objection objections problem problems wrong",
}
_KINDS = {word: kind for kind, words in _VOCABULARY.items() for word in words.split()}
_MOST_WORDS = 15

_REFUSAL = re.compile(
    r"\s*(?:(?:i'm|i am) (?:(?:very|so|really) )?sorry\b|sorry,? (?:but )?i\b|i (?:must )?apologi[sz]e\b"
    r"|my apologies\b|as an ai\b|as a (?:large )?language model\b"
    r"|(?:i'm|i am) (?:just |only )?(?:an ai|a (?:large )?language model)\b"
    r"|(?:i'm|i am) (?:unable|not able|not comfortable)\b|i (?:don't|do not) feel comfortable\b"
    r"|(?:unfortunately,? )?i (?:can't|cannot|can not|won't|will not) (?:be able to )?(?:assist|comply|provide|judge"
    # "I can't help but notice" goes on to judge.
    r"|evaluate|fulfill?|answer|do|engage|continue|rate|review|discuss|help(?! but\b| \w+ing\b))\b)",
    re.IGNORECASE,
)
_IN_QUOTES = re.compile(r"\s*[\"“]([^\"“”]*)[\"”]\s*")


def drop_thoughts(text: str) -> str | None:
    """An answer without the thoughts before it; None where these have no end."""
    for thoughts in (_THOUGHTS, _END_OF_THOUGHTS):
        if match := thoughts.match(text):
            text = text[match.end() :]
    text = text.strip()
    return None if text.startswith("<think>") else text


def starts_with_perfect(text: str) -> bool:
    """Whether the first word is "Perfect", whatever marks stand before it."""
    return _PERFECT.match(text) is not None


def is_praise_alone(text: str) -> bool:
    """Whether an answer is the word "Perfect" and says no more.

    Around it may stand marks, a label ("Judgment: Perfect.") and JSON or tags with one; after it and a full stop, up to
    80 characters in which nothing goes on to object.
    """
    if _PERFECT_ALONE.fullmatch(text):
        return True
    match = _PERFECT.match(text)
    if match is None or not _TAIL.fullmatch(text, match.end()):
        return False
    tail = text[match.end() :]
    return not _OBJECTION.search(tail.replace("’", "'")) or is_other_praise(tail)


def is_other_praise(text: str) -> bool:
    """Whether a short answer praises in other words, or rates: "No issues found.", "10/10".

    All its words are such as praise is made of, and it names a fault only to say that there is none.
    """
    words = _WORD.findall(text.casefold())
    if not 0 < len(words) <= _MOST_WORDS:
        return False
    kinds = {_KINDS.get(word, "good" if word.isdecimal() else "other") for word in words}
    if "other" in kinds:
        return False
    if "fault" in kinds:
        return "none" in kinds
    return ("good" in kinds) != ("none" in kinds)


def is_refusal(text: str) -> bool:
    """Whether a model says that it will not judge; a quotation that a judgment begins with does not."""
    text = text.replace("’", "'")
    quoted = _IN_QUOTES.fullmatch(text)
    return _REFUSAL.match(quoted[1] if quoted else text) is not None
