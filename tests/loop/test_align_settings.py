"""What the loop is asked for, checked before anything runs, and what it reports in the end."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from loop_plans import make_plan, make_workplace, run_here

from cutlm.cli import main
from cutlm.errors import ConfigError, UserError
from cutlm.loop.loop import run_loop
from cutlm.loop.pool import make_pool
from cutlm.loop.report import describe_seconds, draw, make_status, make_table, summarize
from cutlm.loop.settings import parse_options

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "online").glob("*.yaml"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("settings"))


# Settings.


def test_instructions_that_are_repeated_or_held_out_are_left_out(workplace: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a"},
        {"instruction": "a", "input": "b"},
        {"instruction": "a"},
        {"instruction": "Name a river, 1."},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    further = {"instructions": tmp_path / "rows.json", "num_iterations": 1, "num_instructions": 2}
    pool = make_pool(make_plan(workplace, "pool", **further))
    assert sorted(pool.rows, key=len) == [{"instruction": "a"}, {"instruction": "a", "input": "b"}]
    assert (pool.num_repeated, pool.num_held_out) == (1, 1)
    with pytest.raises(UserError, match=r"expected 3 .* got 2 \(1 repeated and 1 held-out ones left out\); give more"):
        make_pool(make_plan(workplace, "pool", **(further | {"num_instructions": 3})))


def test_all_bad_settings_are_named_at_once(workplace: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(
            workplace,
            "bad",
            instructions="",
            num_iterations=0,
            generate="--temprature 1",
            judge="http --base_url x",
            eval_judge="human",
            eval_command="true",
            server_command="vllm serve",
            max_failure_rate=1,
            threshold=0.5,
        )
    text = str(caught.value)
    for part in (
        "instructions: expected a file of instructions, got none",
        "num_iterations: expected a whole number of at least 1, got 0",
        "generate: unknown arguments of cutlm generate: --temprature 1",
        "judge: --judge http: expected --judge_model too, got none",
        "eval_judge: expected a judge that answers at once, got human",
        "eval_command: expected {model} and {out} in it, got 'true'",
        "server_command: expected {model} in it, got 'vllm serve'",
        "max_failure_rate: expected a share from 0 to below 1, got 1.0",
        "threshold: expected a number of at least 1",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("generate", "--seed 1 --model x", "--seed, --model: given by the loop itself; leave it out"),
        ("generate", "'", "expected options as on a command line"),
        ("judge", "oracle", "invalid choice: 'oracle'"),
        ("judge", "rules", "--judge rules: expected --rules too, got none"),
    ],
)
def test_options_of_a_stage_are_checked_beforehand(command: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(command, text)
    assert message in str(caught.value)


def test_a_filled_folder_is_not_taken(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"base is not empty and holds no align\.yaml; name another folder"):
        run_loop(make_plan(workplace, "base"), run=run_here)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--config", str(recipe), "--use_cpu", "--dry_run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert {"instructions", "judge", "threshold", "output_dir"} <= set(resolved)


# The report.


def test_the_table_shows_each_figure_where_it_is_known() -> None:
    stages = {
        "generate": {"num_responses": 1000, "num_empty": 2},
        "judge": {"num_judged": 990, "num_satisfactory": 297, "num_missing": 8, "num_empty": 2},
        "train": {"loss_start": 2.0, "loss_end": 1.5, "num_steps": 9, "flagged_share": 0.125},
        "evaluate": {"share_satisfactory": 0.5, "num_judged": 10, "win_rate": 61.06},
    }
    known = {name: {"state": "done", "seconds": 1800.0, "figures": figures} for name, figures in stages.items()}
    first = summarize({"iteration": 0, "stages": {"evaluate": {"state": "done", "seconds": 1.0, "figures": {}}}})
    table = make_table([first, summarize({"iteration": 1, "stages": known})])
    # 297 / 990 are satisfactory; 8 + 2 have no judgment; 4 x 1800 s are 2 h.
    assert table.splitlines()[2:] == [
        "| before |  |  |  |  |  |  |  | 1.0 s |",
        "| 1 | 1,000 | 10 | 30.0% | 12.5% | 2.000 → 1.500 | 50.0% | 61.06 | 2 h 00 min |",
    ]
    assert table.splitlines()[0] == (
        "| iteration | responses | no judgment | satisfactory | flagged tokens | loss | held-out satisfactory |"
        " held-out win rate | time |"
    )
    status = make_status(
        [{"iteration": 1, "stages": known | {"merge": {"state": "-", "seconds": None, "figures": {}}}}]
    )
    assert status.splitlines()[1].split() == ["1", *["done", "30", "min"] * 4, "-"]


def test_the_picture_has_a_panel_for_each_figure_that_a_command_measured() -> None:
    def draw_with(**evaluation: float) -> int:
        trained = {"loss_start": 2.0, "loss_end": 1.5, "num_steps": 9, "flagged_share": 0.1}
        stages = {
            "judge": {"num_judged": 10, "num_satisfactory": 5, "num_missing": 0, "num_empty": 0},
            "train": trained,
            "evaluate": evaluation,
        }
        known = {name: {"state": "done", "seconds": 1.0, "figures": figures} for name, figures in stages.items()}
        picture = draw([summarize({"iteration": number, "stages": known}) for number in (1, 2)])
        assert picture is not None
        return int.from_bytes(picture[20:24])  # the height, in a PNG's header

    plain = draw_with()
    assert draw_with(share_satisfactory=0.5) == plain  # a line in a panel that is there
    assert draw_with(win_rate=50.0) == 2 * plain
    assert draw_with(a=1.0, b=2.0, c=3.0, num_d=4.0) == 2 * plain  # counts are in report.json alone
    assert draw_with(a=1.0, b=2.0, c=3.0, d=4.0) == 3 * plain


def test_durations_are_said_in_words() -> None:
    assert [describe_seconds(value) for value in (3.14, 99.9, 120, 5400, 6000)] == [
        *("3.1 s", "99.9 s", "2 min", "90 min", "1 h 40 min"),
    ]
