"""The judge by rules: a Python function of instruction and response that says what is wrong, or None.

    def judge(instruction: str, response: str) -> str | None: ...

Finding the function and calling it is all there is here; `cutlm.world.judge:judge` is an example of one.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from cutlm.data.records import describe_value, is_praise
from cutlm.errors import DataError, UserError
from cutlm.judges import Outcome, Response
from cutlm.judges.responses import set_aside_empty

Rules = Callable[[str, str], str | None]


def load_rules(name: str) -> Rules:
    """Imports a function.

    Args:
        name: `package.module:function`, on Python's path or in the current directory.

    Raises:
        UserError: There is none of this name, or its module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--rules: expected package.module:function, got {name!r}")
    # As `python -m` does, and the installed command does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script's last line may well be sys.exit
        # Not what the module itself fails to import.
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"--rules {name}: no module {error.name!r} on Python's path or in {os.getcwd()}; check the name, or set"
                " PYTHONPATH"
            ) from None
        raise UserError(f"--rules {name}: its module cannot be imported ({_describe(error)}); mend it") from None
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        got = "nothing of that name" if function is None else type(function).__name__
        raise UserError(f"--rules {name}: expected a function {function_name!r} in {module.__name__}, got {got}")
    return function


def judge_by_rules(responses: Sequence[Response], rules: Rules, *, show_progress: bool = True) -> Outcome:
    """Judges responses by a function.

    Args:
        responses: What is to be judged.
        rules: Gets the instruction (and after a newline, its input) and the response; returns what is wrong, or None.
        show_progress: Whether to show a progress bar.

    Raises:
        DataError: The function raised, or returned something else, for some responses; all of them are named.
    """
    kept, outcome = set_aside_empty(responses)
    problems = []
    for index in tqdm(kept, desc="judging", unit="response", disable=not show_progress):
        response = responses[index]
        try:
            judgment = rules(response.full_instruction, response.output)
        except (Exception, SystemExit) as error:
            problems.append(f"{response.location}: the rules raised {_describe(error)}; fix them or remove the row")
            continue
        problem = _describe_wrong_return(judgment)
        if problem is not None:
            problems.append(
                f"{response.location}: expected the rules to return what is wrong, or None, got {problem}; mend them"
            )
            continue
        outcome.judgments[index] = None if judgment is None or is_praise(judgment) else judgment.strip()
    if problems:
        raise DataError(problems, hint=f"{len(problems)} of {len(kept)} responses could not be judged; nothing written")
    return outcome


def _describe_wrong_return(judgment: Any) -> str | None:
    if judgment is None:
        return None
    if not isinstance(judgment, str):
        return describe_value(judgment)
    if not judgment.strip():
        return "an empty string"
    if "\0" in judgment:
        return "a string with a null byte"
    try:
        judgment.encode()
    except UnicodeEncodeError:
        return "a string with half of a surrogate pair"
    return None


def _describe(error: BaseException) -> str:
    """An exception's type and text, in one line."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
