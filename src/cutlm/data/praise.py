"""Praise in other words than "Perfect.": judgments that name no fault, although they count as objections."""

import re

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
_MAX_WORDS = 15
# A "no" that denies no fault: "No, that is wrong.", "That is wrong, no?".
_CONTRADICTION = re.compile(
    r"\A[\W_]*no(?=\s*[,.;!]\W*\w|\s+(?:that|this|it|its|there|the|your|you)\b)|\bno\s*\?+[\W_]*\Z"
)
# A rating and the best one: "8/10", "9 out of 10".
_RATING = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:/|out\s+of)\s*(\d+)")
_MIN_GOOD_RATING = 0.7

_SUBJECT = (
    r"(?:[\W_]*(?:judge?ment|feedback|critique|verdict|assessment|evaluation|review|answer)\s*:)?[\W_]*"
    r"(?:it|this|everything|(?:(?:the|this|that|your|overall|given|provided|(?:ai|assistant|model)(?:['’]s)?),?\s+)+"
    r"(?:response|answer|output|reply|solution|result|text|summary|translation|code|completion|explanation)s?)"
)
_IS = r"\s+(?:is|are|was|were|seems|appears|looks|reads|sounds)(?:\s+to\s+be)?\s+"
_ADVERB = (
    r"(?:(?:absolutely|all|already|completely|entirely|exactly|factually|fully|indeed|just|overall|perfectly|quite"
)
_ADVERB += r"|really|simply|totally|truly|very|well|both)\s+)*"
_FLAWLESS = r"(?:perfect|flawless|faultless|impeccable|exemplary|ideal|spot[- ]on)"
_GOOD = (
    r"(?:accurate|acceptable|amazing|appropriate|complete|comprehensive|correct|excellent|fantastic|fine|good|great"
    r"|outstanding|right|satisfactory|superb|valid|wonderful|written|well-written)"
)
# "The response is perfect. It ...", "... is perfect as it ..."; not "... is perfect in terms of ...".
_IS_FLAWLESS = re.compile(
    rf"{_SUBJECT}{_IS}{_ADVERB}{_FLAWLESS}(?:[.!;:,\"'*)]|\s*$|\s+(?:and|as|because|since|in\s+every|for)\b)",
    re.IGNORECASE,
)
_IS_GOOD = re.compile(
    rf"{_SUBJECT}{_IS}{_ADVERB}{_GOOD}(?:[.!;:,\"'*)]|\s*$|\s+(?:and|because|since)\b)", re.IGNORECASE
)
# Words that take praise back, whatever was praised.
_RESERVATION = re.compile(
    r"\b(?:but|however|though|although|except|unless|yet|still|should|unfortunately|nevertheless|nonetheless"
    r"|missing|miss(?:es|ed)|lack(?:s|ing)?|unnecessar\w+|impossible|wrong\w*|incorrect\w*|inaccura\w+"
    r"|(?:apart|aside)\s+from|other\s+than|in\s+terms\s+of)\b",
    re.IGNORECASE,
)
# How a sentence begins that takes back the one before it.
_TURN = re.compile(r"\W*(?:but|however|though|although|except|unfortunately|still|yet)\b", re.IGNORECASE)
# Words that may introduce an objection to a good response; they also occur in praise of perfect responses.
_REQUEST = re.compile(
    r"\b(?:only|instead|while|actually|wait|no|not|never|nor|without|could|would|must|needs?|too|more|less|better|add|remove|use"
    r"|improve\w*|errors?|mistakes?|false|fail\w*|problems?|issues?|flaws?|minor|slight\w*|few|somewhat)\b|n['’]t\b",
    re.IGNORECASE,
)


def reads_like_praise(judgment: str) -> bool:
    """Whether a judgment that does not start with "Perfect" praises the response and objects to nothing.

    It is a guess for warnings, on the safe side: praise in many words, or in another language, is not found.

    Example:

        >>> reads_like_praise("The response is perfect. It names the capital.")
        True
        >>> reads_like_praise("The response is perfect, but it is too long.")
        False
    """
    if is_brief_praise(judgment):
        # A number alone is no praise, and "No." objects.
        return not re.fullmatch(r"[\W_]*(?:\d+|no)[\W_]*", judgment, re.IGNORECASE) and "?" not in judgment
    if _RESERVATION.search(judgment):
        return False
    is_good = _IS_GOOD.match(judgment) is not None and not _REQUEST.search(judgment)
    return is_good or _IS_FLAWLESS.match(judgment) is not None


def is_brief_praise(text: str) -> bool:
    """Whether a short text praises or rates, and names a fault only to deny it: "No issues found.", "10/10"."""
    words = _WORD.findall(text.casefold())
    rating = _RATING.search(text.casefold())
    is_low = rating is not None and float(rating[1].replace(",", ".")) < _MIN_GOOD_RATING * float(rating[2])
    if not 0 < len(words) <= _MAX_WORDS or is_low:
        return False
    # Without a best one, a number is a rating only by itself or by name: "It is 20." corrects the response.
    is_rating = rating is not None or not {"score", "rating"}.isdisjoint(words) or all(map(str.isdecimal, words))
    number = "good" if is_rating else "filler"
    kinds = {_KINDS.get(word, number if word.isdecimal() else "other") for word in words}
    if "other" in kinds:
        return False
    if "fault" not in kinds:
        return ("good" in kinds) != ("none" in kinds)
    return any(_KINDS.get(word) == "none" for word in _WORD.findall(_CONTRADICTION.sub(" ", text.casefold())))


def objects_after_praise(judgment: str) -> bool:
    """Whether a judgment that starts with "Perfect" takes it back at once: "Perfect, but too long."."""
    first, _, rest = judgment.strip().partition(".")
    return _RESERVATION.search(first) is not None or _TURN.match(rest) is not None
