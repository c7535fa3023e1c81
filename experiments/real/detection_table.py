"""The table of detectors, in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutlm.data.files import open_atomic
from cutlm.inspect.tables import format_table

_TITLES = {
    "format": "Format rules broken by the model's own responses",
    "planted": "Planted errors in right answers",
}
_ABOUT = """\
SmolLM2-135M-Instruct scores the tokens of responses in which the wrong characters are known exactly. A token is wrong
if it overlaps these. Average precision is computed over all tokens of a kind's responses; *chance* is the share of
wrong tokens, which a random order reaches. Brackets are 95 % bootstrap intervals over responses. F1 is at threshold
1.1 (at p = 0.1 for `surprise`), F1 (auto) at the smallest threshold at which at most 1 % of the tokens are flagged
under judgments of other responses.

| detector | score of a token |
|---|---|
| `chat`, `alpaca` | log ratio of its probability with and without the judgment (eq. 5), under a prompt template |
| `..._foreign` | log ratio to the mean log-probability under two judgments of other responses |
| `..._perfect` | log ratio to its probability under the judgment "Perfect." |
| `..._perfect_surprise` | the same, and a quarter of its surprise there: `surprise_weight: 0.25` |
| `..._perfect_smooth` | the latter, averaged over each token and its two neighbours; not in the library |
| `taught_...` | the same by a LoRA adapter trained with `hindsight` on the other half and on further errors |
| `surprise` | minus its log-probability without any judgment: knows nothing of the judgment |
| `words` | whether the judgment quotes it or mentions its word: knows no model |

For rules about the case of the whole text only the first run of wrong letters is wrong, because the rest can be
predicted from it. What exceeds a limit of words or sentences is wrong as a whole. Planted errors change one number,
name or clause of a right answer; an editor quotes what is wrong and what is right, a reader says only what would be
right, an assistant quotes the passage, and a vague judgment says only what kind of thing is wrong."""


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Write the results of detection.py, as far as they are measured."""
    parts = ["# Detection of wrong tokens by a real model", _ABOUT]
    for kind, title in _TITLES.items():
        rows = [row for row in content["results"] if row["kind"] == kind]
        if rows:
            parts += [f"## {title}", _tabulate(rows)]
            parts += [_tabulate_groups(rows, group) for group in rows[0]["by_group"]]
    if content["sensitivity"]:
        parts += [
            "## Sensitivity",
            _ABOUT_SENSITIVITY,
            _tabulate_sensitivity(content["sensitivity"], ["model", "kind"]),
        ]
    if content["scale"]:
        parts += ["## The scale: the tiny world during pretraining", _ABOUT_SCALE]
        parts.append(_tabulate_sensitivity(content["scale"], ["num_steps"]))
    parts.append(f"Measured on {content['date']}. To measure again: `{content['command']}`.")
    with open_atomic(path) as file:
        file.write(("\n\n".join(parts) + "\n").encode())


_ABOUT_SENSITIVITY = """\
`flag_signal` is 1 minus the ratio of the shares of tokens flagged under judgments of other responses and under their
own; `pairwise` is the share of responses whose largest log ratio is larger under their own judgment. Threshold 1.1."""
_ABOUT_SCALE = """\
The same measurements for the tiny world's base model after more and more steps of pretraining, on the packaged model's
wrong responses to the development tasks."""


def _tabulate(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "detector",
        "average precision",
        "chance",
        "times chance",
        "F1",
        "F1 (auto)",
        "auto threshold",
        "responses",
    ]
    return format_table(
        header,
        [
            [
                f"`{row['detector']}`",
                f"{row['average_precision']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
                f"{row['chance']:.3f}",
                f"{row['average_precision'] / row['chance']:.1f}",
                f"{row['f1']:.3f}",
                _show(row["f1_auto"]),
                _show(row["threshold_auto"]),
                f"{row['num_records']}",
            ]
            for row in rows
        ],
    )


def _tabulate_groups(rows: Sequence[dict[str, Any]], group: str) -> str:
    values = rows[0]["by_group"][group]
    header = [
        f"average precision by {group}",
        *(f"{value} ({found['num_records']})" for value, found in values.items()),
    ]
    cells = [["chance", *(f"{found['chance']:.3f}" for found in values.values())]]
    for row in rows:
        found = row["by_group"][group]
        cells.append([f"`{row['detector']}`", *(f"{found[value]['average_precision']:.3f}" for value in values)])
    return format_table(header, cells)


def _tabulate_sensitivity(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    shown = ["flagged_share_own", "flagged_share_foreign", "flag_signal", "pairwise"]
    header = [*(name.replace("_", " ") for name in names), "flagged, own", "flagged, foreign", *shown[2:]]
    if "average_precision" in rows[0]:
        shown += ["average_precision", "chance", "f1", "f1_auto"]
        header += ["average precision", "chance", "F1", "F1 (auto)"]
    return format_table(
        header, [[*(f"{row[name]}" for name in names), *(_show(row[name]) for name in shown)] for row in rows]
    )


def _show(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"
