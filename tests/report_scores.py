"""Token scores of any text for tests: real tokens with random log-probs; and the data of a token page."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from cutlm.data.records import JudgedRecord
from cutlm.flagging.token_scores import TokenScores
from cutlm.prompting.encoding import Encoder

NASTY = (
    "The capital is Sydney.",
    "<script>alert(1)</script> & </dd></style><!-- \"double\" 'single' &amp; &#60;",
    "  two  spaces, a\ttab,\nlines\r\nof both kinds\n\n and an end \n",
    "left \u200fright\u200e \u202eoverride\u202c \u2066isolate\u2069 zero\u200bwidth\ufeff",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, flag \U0001f3f4\U000e0067\U000e0062 \u2764\ufe0f \U0001f600",
    "bell \x07 escape \x1b[31m back \x08 delete \x7f next \x85 no-break \xa0 line \u2028 private \ue000",
    "e\u0301 combined",
    "x",
)


@cache
def _make_encoder(kind: str) -> Encoder:
    return Encoder(make_tokenizer(kind), "alpaca")


def make_scores(
    output: str, judgment: str | None = "Wrong.", kind: str = "bpe", *, seed: int = 0, **changes: Any
) -> TokenScores:
    """Makes scores of a response, with about a third of its tokens flagged."""
    encoder, rng = _make_encoder(kind), random.Random(seed)
    ids = encoder.encode_response(output)
    flags = [judgment is not None and rng.random() < 0.3 for _ in ids]
    values: dict[str, Any] = {
        "record": JudgedRecord(instruction="Say <b>it</b>.", output=output, judgment=judgment),
        "token_ids": ids,
        "tokens": [str(encoder.tokenizer.decode([index])) for index in ids],
        "spans": encoder.locate_tokens(output, ids),
        "logps_without": [-rng.random() * 6 for _ in ids],
        "logps_with": None if judgment is None else [-rng.random() * 6 for _ in ids],
        "is_flagged": flags,
        "weights": [0.5 * flag for flag in flags],
        "threshold": 1.1,
        "unlikelihood_weight": 1.0,
        "gamma": 1.0,
        "detector": "d",
        "tokenizer": "t",
        "template": "alpaca",
    }
    return TokenScores(**values | changes)


def read_page_data(path: Path) -> dict[str, Any]:
    """Reads the data from a token page."""
    content = re.search('<script id="data" type="application/json">(.*?)</script>', path.read_text("utf-8"))
    assert content is not None
    data: dict[str, Any] = json.loads(content[1])
    return data
