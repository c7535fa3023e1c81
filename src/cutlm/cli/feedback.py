"""The options of `cutlm convert conversations` by which it decides which replies are feedback, and the decision."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cutlm.cli.model_options import DEFAULTS, SERVER_OPTIONS, add_options, make_encoder, make_server
from cutlm.data.files import SourceRow
from cutlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from cutlm.data.convert import Conversion
    from cutlm.data.journal import Journal
    from cutlm.data.records import RecordCheck
    from cutlm.judges.feedback import Decisions

KINDS = ("all", "rules", "http", "sensitivity")
_BUDGET = ("max_requests", "max_tokens_total")
# Without defaults here, so that the tokenizer decides, or nothing is set.
_PROMPT = ("template", "chat_template_kwargs", "template_date", "judgment_role")
_LOCAL = ("base", "dtype", "device", "max_tokens_per_batch")
# The options of each kind and their defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "rules": {"rules": "cutlm.judges.feedback:find_feedback"},
    "http": {"base_url": None, "judge_model": None, "max_tokens": 1024, "cache": None}
    | dict.fromkeys(_BUDGET)
    | {name: DEFAULTS[name] for name in SERVER_OPTIONS},
    "sensitivity": {"model": None, "max_length": 2048, "num_foreign": 4}
    | dict.fromkeys(_PROMPT)
    | {name: DEFAULTS[name] for name in _LOCAL},
}
_REQUIRED = {"http": ("base_url", "judge_model"), "sensitivity": ("model",)}


def add_feedback_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, without their defaults."""
    kinds = "conversations: which replies are feedback (default: all; sensitivity if there is a --model)"
    parser.add_argument("--feedback", choices=KINDS, help=kinds)
    rules = parser.add_argument_group("--feedback rules")
    function = "a function of conversation, response and reply: module:function (default: English phrases)"
    rules.add_argument("--rules", metavar="NAME", help=function)
    http = parser.add_argument_group("--feedback http")
    add_options(http, "base_url")
    http.add_argument("--judge_model", metavar="NAME", help="its name on the server")
    http.add_argument("--max_tokens", type=int, metavar="N", help="longest answer (default: 1024)")
    http.add_argument("--cache", metavar="FILE", help="cache of answers (default: OUT.cache.sqlite)")
    add_options(http, *SERVER_OPTIONS)
    http.add_argument("--max_requests", type=int, metavar="N", help="most requests of all runs with this cache")
    http.add_argument("--max_tokens_total", type=int, metavar="N", help="most tokens of all runs with this cache")
    local = parser.add_argument_group("--feedback sensitivity")
    local.add_argument("--model", metavar="MODEL", help="model or adapter folder, GGUF file, or hub name")
    local.add_argument("--num_foreign", type=int, metavar="N", help="replies to compare each with (default: 4)")
    local.add_argument("--max_length", type=int, metavar="N", help="of prompt and response (default: 2048)")
    add_options(local, *_PROMPT, *_LOCAL)


def check_feedback_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and fill in the defaults."""
    names = list({name: None for options in _OPTIONS.values() for name in options})
    given = [name for name in names if getattr(args, name) is not None]
    if args.source != "conversations":
        if given or args.feedback:
            listed = ", ".join(f"--{name}" for name in [*["feedback"] * bool(args.feedback), *given])
            raise ConfigError(f"{listed}: expected only with the source 'conversations', got {args.source!r}; remove")
        return
    if args.feedback is None:
        args.feedback = "sensitivity" if args.model is not None else "all"
    own, foreign, problems = _OPTIONS[args.feedback], defaultdict[str, list[str]](list), list[str]()
    for name in names:
        if name not in given:
            setattr(args, name, own.get(name))
        elif name not in own:
            foreign[" or ".join(kind for kind in KINDS if name in _OPTIONS[kind])].append(f"--{name}")
    for kinds, options in foreign.items():
        problems.append(f"{', '.join(options)}: expected only with --feedback {kinds}; leave out or change --feedback")
    if missing := [f"--{name}" for name in _REQUIRED.get(args.feedback, ()) if getattr(args, name) is None]:
        problems.append(f"--feedback {args.feedback}: expected {' and '.join(missing)} too, got none; set them")
    for name in ("max_tokens", "num_foreign"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(f"--{name}: expected a whole number of at least 1, got {value}")
    if problems:
        raise ConfigError(problems)


@dataclass
class Selection:
    """Decisions about replies.

    Attributes:
        sentences: Sentences for the user.
        num_undecided: Number of replies about which nothing could be decided.
        journal: A partial file, to be removed when the results are written.
    """

    sentences: list[str] = field(default_factory=list)
    num_undecided: int = 0
    journal: "Journal | None" = None


# Decides about the records of a check.
_Decide = Callable[[argparse.Namespace, "RecordCheck"], "tuple[Decisions, Journal | None]"]


def select_feedback(args: argparse.Namespace, conversion: "Conversion") -> Selection:
    """Keep the records whose judgment, the user's reply, is feedback, and list the others.

    Responses whose reply is no feedback become unjudged ones.
    """
    from cutlm.data.records import check_rows, raise_problems

    if not conversion.rows:
        return Selection()
    if args.feedback == "all":
        return Selection(["every reply counts as feedback; --feedback rules, http or sensitivity decides which are"])
    check = check_rows(conversion.rows)
    raise_problems(check, " ".join(args.inputs))
    decide: _Decide = {"rules": _decide_by_rules, "http": _decide_by_server, "sensitivity": _decide_by_sensitivity}[
        args.feedback
    ]
    decisions, journal = decide(args, check)
    rows, conversion.rows = conversion.rows, []
    for index, row in enumerate(rows):
        reply = row.value["judgment"]
        response = {name: value for name, value in row.value.items() if name != "judgment"} | {"reply": reply}
        if index in decisions.judgments:
            judgment = decisions.judgments[index]
            value = row.value if judgment == reply else response | {"judgment": judgment}
            conversion.rows.append(SourceRow(row.location, value))
        elif index in decisions.failures:
            failure = decisions.failures[index]
            conversion.left_out[f"nothing decided about the reply: {failure.kind}"] += 1
            conversion.listed.append({"location": row.location, "reason": failure.reason, **response})
        else:
            conversion.unjudged.append(SourceRow(row.location, response))
            conversion.listed.append({"location": row.location, "reason": decisions.reasons[index], **response})
    counts = Counter(decisions.reasons.values())
    sentences = [f"replies: {num} {reason}" for reason, num in counts.most_common()]
    return Selection([*decisions.notes, *sentences], len(decisions.failures), journal)


def _decide_by_rules(args: argparse.Namespace, check: "RecordCheck") -> "tuple[Decisions, None]":
    from cutlm.judges.feedback import decide_by_rules
    from cutlm.judges.rules import load_rules

    return decide_by_rules(check.records, check.locations, load_rules(args.rules)), None


def _decide_by_server(args: argparse.Namespace, check: "RecordCheck") -> "tuple[Decisions, None]":
    from cutlm.judges.feedback import decide_by_server

    server = make_server(args, args.judge_model, **{name: getattr(args, name) for name in _BUDGET})
    cache = args.cache or f"{args.out}.cache.sqlite"
    return decide_by_server(check.records, check.locations, server, cache, max_tokens=args.max_tokens), None


def _decide_by_sensitivity(args: argparse.Namespace, check: "RecordCheck") -> "tuple[Decisions, Journal]":
    from cutlm.flagging.feedback import measure_shifts
    from cutlm.flagging.scoring import load_scorer
    from cutlm.judges.feedback import Decisions

    names = (*_LOCAL, "max_length")
    tokenizer, score, detector, backend = load_scorer(args.model, **{name: getattr(args, name) for name in names})
    if args.template is None and not tokenizer.chat_template:
        raise UserError(
            f"{args.model}: its tokenizer has no chat template; use another model, or set --template alpaca, with which"
            " only responses to a first message are tested"
        )
    places = [index for index, record in enumerate(check.records) if not record.is_satisfactory]
    shifts = measure_shifts(
        [check.records[index] for index in places],
        [check.locations[index] for index in places],
        args.out,
        make_encoder(args, tokenizer, args.template or "chat"),
        score,
        num_foreign=args.num_foreign,
        max_length=args.max_length,
        detector=detector,
        backend=backend,
    )
    decisions = Decisions()
    for index, record in enumerate(check.records):
        if record.is_satisfactory:
            decisions.judgments[index] = None
            decisions.reasons[index] = 'kept, because the reply begins with "Perfect"'
    than = f"than {args.num_foreign} replies to other responses do"
    for place, shift in shifts.shifts.items():
        index = places[place]
        if shift.is_largest:
            decisions.judgments[index] = check.records[index].judgment
        verb = "shifts the response more" if shift.is_largest else "does not shift the response more"
        decisions.reasons[index] = f"{'kept' if shift.is_largest else 'no feedback'}, because the reply {verb} {than}"
    for place, reason in shifts.refused.items():
        decisions.reasons[places[place]] = f"not tested: {reason}"
    if shifts.num_resumed:
        decisions.notes.append(f"{shifts.num_resumed} responses were scored by an interrupted run")
    num_by_chance = len(shifts.shifts) / (args.num_foreign + 1)
    decisions.notes.append(
        f"{len(shifts.shifts)} replies tested; about {num_by_chance:.0f} would be kept if none said anything about the"
        " response"
    )
    return decisions, shifts.journal
