"""Rules as a judge: a Python function of instruction and response that returns what is wrong, or None.

    def judge(instruction: str, response: str) -> str | None: ...

It may also return where: `return judgment, spans`, with [start, end) in characters of the response. Examples are
`cutlm.world.judge:judge` and `cutlm.world.judge:judge_with_spans`.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from cutlm.data.files import SourceRow
from cutlm.data.records import JudgedRecord, validate_row
from cutlm.errors import DataError, UserError
from cutlm.judges.responses import Outcome, Response, set_aside_empty

# What is wrong with a response, or None; and its wrong passages, if the rules say where they are.
RuleVerdict = str | None | tuple[str | None, Sequence[Sequence[int]] | None]
Rules = Callable[[str, str], RuleVerdict]


def load_rules(name: str) -> Any:
    """Import a rules function, `package.module:function`, from Python's path or the current directory."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--rules: expected package.module:function, got {name!r}")
    # `python -m cutlm` has the current directory on its path; the installed command does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything; a script may end in sys.exit
        # Unless the missing module is one that the rules import.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"--rules {name}: no module {error.name!r} on Python's path or in {os.getcwd()}; check the name, or set"
                " PYTHONPATH"
            ) from None
        described = describe_exception(error)
        raise UserError(f"--rules {name}: its module cannot be imported ({described}); fix it") from None
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        got = "nothing of that name" if function is None else type(function).__name__
        raise UserError(f"--rules {name}: expected a function {function_name!r} in {module.__name__}, got {got}")
    return function


def judge_by_rules(responses: Sequence[Response], rules: Rules) -> Outcome:
    """Judge responses by a function of the instruction (including the input) and the response.

    Raises:
        DataError: The function raised, or did not return text or None, or returned spans that do not fit the response;
            all such responses are named.
    """
    kept, outcome = set_aside_empty(responses)
    problems: list[str] = []
    name = name_rules(rules)
    for index in tqdm(kept, desc="judging", unit="response"):
        response = responses[index]
        try:
            verdict = rules(response.full_instruction, response.output)
        except (Exception, SystemExit) as error:  # the user's code, which may raise anything
            problems.append(f"{response.location}: {name} raised {describe_exception(error)}; fix it or remove the row")
            continue
        location = f"{response.location}: returned by {name}"
        if isinstance(verdict, tuple) and len(verdict) != 2:
            expected = "expected the judgment, or the judgment and its spans"
            problems.append(f"{location}: {expected}, got a tuple of {len(verdict)}")
            continue
        judgment, spans = verdict if isinstance(verdict, tuple) else (verdict, None)
        if isinstance(spans, Iterable) and not isinstance(spans, str | bytes | Mapping):
            spans = [list(span) if isinstance(span, tuple) else span for span in spans]
        value = {"instruction": "-", "output": response.output, "judgment": judgment, "wrong_spans": spans}
        record = validate_row(SourceRow(location, value), JudgedRecord, problems)
        if record is None:
            continue
        if record.wrong_spans and record.is_satisfactory:
            problems.append(f"{location}: expected no spans with a judgment that nothing is wrong, got {spans}")
            continue
        outcome.judgments[index] = None if judgment is None or record.is_satisfactory else judgment.strip()
        if record.wrong_spans:
            outcome.wrong_spans[index] = list(record.wrong_spans)
    if problems:
        raise DataError(problems, hint=f"{len(problems)} of {len(kept)} responses could not be judged")
    return outcome


def name_rules(rules: Callable[..., Any]) -> str:
    """Return the name of a rules function as `load_rules` takes it."""
    return f"{getattr(rules, '__module__', '')}:{getattr(rules, '__qualname__', type(rules).__name__)}"


def describe_exception(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
