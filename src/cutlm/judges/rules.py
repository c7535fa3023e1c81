"""Rules as a judge: a Python function of instruction and response that returns what is wrong, or None.

    def judge(instruction: str, response: str) -> str | None: ...

`cutlm.world.judge:judge` is an example.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from cutlm.data.files import SourceRow
from cutlm.data.records import JudgedRecord, is_praise, validate_row
from cutlm.errors import DataError, UserError
from cutlm.judges.responses import Outcome, Response, set_aside_empty

Rules = Callable[[str, str], str | None]


def load_rules(name: str) -> Rules:
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
        raise UserError(f"--rules {name}: its module cannot be imported ({_describe(error)}); fix it") from None
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
        DataError: The function raised, or did not return text or None; all such responses are named.
    """
    kept, outcome = set_aside_empty(responses)
    problems: list[str] = []
    for index in tqdm(kept, desc="judging", unit="response"):
        response = responses[index]
        try:
            judgment = rules(response.full_instruction, response.output)
        except (Exception, SystemExit) as error:  # the user's code, which may raise anything
            problems.append(f"{response.location}: the rules raised {_describe(error)}; fix them or remove the row")
            continue
        value = {"instruction": "-", "output": "-", "judgment": judgment}
        if validate_row(SourceRow(f"{response.location}: returned by the rules", value), JudgedRecord, problems):
            outcome.judgments[index] = None if judgment is None or is_praise(judgment) else judgment.strip()
    if problems:
        raise DataError(problems, hint=f"{len(problems)} of {len(kept)} responses could not be judged")
    return outcome


def _describe(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
