"""The judge of a round: asked about its responses until enough of them have a judgment, or a person is waited for.

Who judges is `cutlm judge`'s affair; here its records and failures are counted, and told from those of a run that was
killed between the two.
"""

import shlex
from pathlib import Path
from typing import Any

from cutlm.data.files import read_rows
from cutlm.data.records import check_records
from cutlm.judges.responses import EMPTY_RESPONSE, name_failures_file
from cutlm.loop.runner import Runner, StageFailed, check_status
from cutlm.loop.settings import Plan


class WaitingForPerson(Exception):
    """Responses are there to be judged by a person.

    Args:
        todo: The list to fill.
    """

    def __init__(self, todo: Path) -> None:
        super().__init__(str(todo))
        self.todo = todo


def ask_judge(plan: Plan, runner: Runner, judge: str, responses: Path, cache: str = "judge") -> dict[str, Any]:
    """Judges responses into `records.jsonl` beside them.

    Args:
        plan: The loop's.
        runner: Runs the command.
        judge: Who judges, and how, as `cutlm judge` takes it after `--judge`.
        responses: What is judged.
        cache: Name of what is kept of a paid judge's answers, one for all iterations: so caps are of them all.

    Returns:
        Counts of what is said.
    """
    records = responses.with_name("records.jsonl")
    num_responses = len(read_rows(responses)[0])
    counts = count_records(records, num_responses)
    if counts is None or _is_too_few(counts, plan.arguments.max_failure_rate):
        arguments = ["judge", "--responses", str(responses), "--out", str(records), "--judge", *shlex.split(judge)]
        if judge.split()[0] == "http" and not any(part.partition("=")[0] == "--cache" for part in arguments):
            arguments += ["--cache", str(plan.folder / f"{cache}.cache.sqlite")]
        arguments += ["--overwrite"] * records.exists()
        todo = _find_todo(records) if judge.split()[0] == "human" else None
        arguments += ["--labels", str(todo)] if todo else []
        status = runner.run(arguments)
        counts = count_records(records, num_responses)
        if status == 0 and counts is None and judge.split()[0] == "human":
            raise WaitingForPerson(records.with_name(f"{records.name}.todo.csv"))
        if status not in (0, 1) or counts is None:
            check_status(status or 1, arguments)
        assert counts is not None
        if _is_too_few(counts, plan.arguments.max_failure_rate):
            num_without = counts["num_missing"] + counts["num_empty"]
            empty = f" ({counts['num_empty']} of them are empty)" if counts["num_empty"] else ""
            # A model at hand would say the same again.
            again = "" if judge.split()[0] == "local" else "start again to ask for these alone, or "
            raise StageFailed(
                f"{num_without} of {num_responses} responses have no judgment{empty}, more than max_failure_rate"
                f" ({plan.arguments.max_failure_rate:.0%}); {name_failures_file(records)} says why; {again}raise"
                " max_failure_rate",
                1,
            )
    return counts


def _find_todo(records: Path) -> Path | None:
    """The list that a person has filled: of the two, the one that was written to last."""
    lists = [records.with_name(f"{records.name}.todo.{kind}") for kind in ("csv", "jsonl")]
    there = [path for path in lists if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime_ns) if there else None


def count_records(records: Path, num_responses: int | None = None) -> dict[str, Any] | None:
    """What was said of how many responses; None where that is not known yet.

    Args:
        records: Their file; that of failures is beside it.
        num_responses: What both must add up to, unless a person may have edited them.
    """
    if not records.exists():
        return None
    check, failures = check_records(records), name_failures_file(records)
    failed = [row.value.get("kind") for row in read_rows(failures)[0]] if failures.exists() else []
    if num_responses is not None and len(check.records) + len(failed) != num_responses:
        return None  # a kill came between the two files, which are not of one run
    num_empty = failed.count(EMPTY_RESPONSE.kind)
    return {
        "num_judged": len(check.records),
        "num_satisfactory": check.num_satisfactory,
        "num_missing": len(failed) - num_empty,
        "num_empty": num_empty,
    }


def _is_too_few(counts: dict[str, Any], max_failure_rate: float) -> bool:
    num_without = counts["num_missing"] + counts["num_empty"]
    return num_without > max_failure_rate * (num_without + counts["num_judged"])
