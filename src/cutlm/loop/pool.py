"""The instructions of an online run: read, shuffled, and drawn from so that none comes twice or is held out."""

import random
from dataclasses import dataclass
from typing import Any

from cutlm.data.files import read_rows
from cutlm.data.records import InstructionRow, validate_row
from cutlm.errors import DataError, UserError
from cutlm.loop.settings import Plan


def read_instructions(path: str) -> list[dict[str, Any]]:
    """Reads a file of instructions.

    Raises:
        DataError: Rows cannot be used; all are named.
    """
    rows, problems = read_rows(path)
    for row in rows:
        validate_row(row, InstructionRow, problems)
    if problems:
        raise DataError(problems, hint=f"{len(problems)} problems in {path}; mend them, nothing was skipped")
    return [row.value for row in rows]


@dataclass(frozen=True)
class Pool:
    """Instructions to draw from, each once, in the order in which iterations take them.

    Attributes:
        rows: As in the file.
        num_repeated: Left out, as the same instruction stands before.
        num_held_out: Left out, as they are evaluated on.
    """

    rows: list[dict[str, Any]]
    num_repeated: int
    num_held_out: int


def make_pool(plan: Plan) -> Pool:
    """Reads and shuffles the instructions.

    Raises:
        UserError: There are fewer than the iterations take.
    """
    path = str(plan.arguments.instructions)
    rows = read_instructions(path)
    held_out = plan.arguments.eval_instructions
    evaluated = {_key(row) for row in read_instructions(held_out)} if held_out else set()
    unique = {_key(row): row for row in reversed(rows)}
    kept = [unique[key] for key in dict.fromkeys(map(_key, rows)) if key not in evaluated]
    pool = Pool(
        random.Random(f"{plan.seed} instructions").sample(kept, len(kept)),
        len(rows) - len(unique),
        len(unique) - len(kept),
    )
    num_wanted = plan.arguments.num_iterations * plan.arguments.num_instructions
    if len(kept) < num_wanted:
        left_out = f" ({pool.num_repeated} repeated and {pool.num_held_out} held-out ones left out)"
        raise UserError(
            f"{path}: expected {num_wanted} instructions, {plan.arguments.num_instructions} for each of"
            f" {plan.arguments.num_iterations} iterations, got {len(kept)}"
            f"{left_out if len(kept) < len(rows) else ''}; give more, or lower num_instructions or num_iterations"
        )
    return pool


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["instruction"], row.get("input") or ""
