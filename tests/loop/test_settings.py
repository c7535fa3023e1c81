"""Settings of the loop are checked before anything runs; the report shows each metric that is known."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from loop_plans import make_plan, make_workplace

from cutlm.cli import main
from cutlm.cli.align import parse_stage_options
from cutlm.errors import ConfigError, UserError
from cutlm.flagging.report import describe_noise
from cutlm.loop.report import draw, format_seconds, make_status, make_summary, make_table, summarize
from cutlm.loop.settings import find_differences
from cutlm.loop.stages import order_instructions

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "online").glob("*.yaml"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("settings"))


# ---- Settings ----


def test_repeated_and_held_out_instructions_are_left_out(workplace: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a"},
        {"instruction": "a", "input": "b"},
        {"instruction": "a"},
        {"instruction": "Name a river, 1."},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    further = {"instructions": tmp_path / "rows.json", "num_iterations": 1, "num_instructions": 2}
    ordered = order_instructions(make_plan(workplace, "pool", **further))
    assert sorted(ordered, key=len) == [{"instruction": "a"}, {"instruction": "a", "input": "b"}]
    with pytest.raises(UserError, match=r"expected 3 .* got 2 \(1 repeated and 1 held-out ones left out\)"):
        order_instructions(make_plan(workplace, "pool", **(further | {"num_instructions": 3})))


def test_all_invalid_settings_are_reported_at_once(workplace: Path) -> None:
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
    names = {problem.partition(":")[0] for problem in caught.value.problems}
    assert names >= {
        *("instructions", "num_iterations", "generate", "judge", "eval_judge", "eval_command", "server_command"),
        *("max_failure_rate", "threshold"),
    }
    assert "--temprature" in str(caught.value)


@pytest.mark.parametrize(
    ("command", "text", "named"),
    [
        ("generate", "--seed 1 --model x", "--seed, --model"),
        ("generate", "'", "as on a command line"),
        ("judge", "oracle", "'oracle'"),
        ("judge", "rules", "--rules"),
        ("judge", "", "--judge"),
    ],
)
def test_invalid_options_of_a_stage_are_refused(command: str, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_stage_options(command, text)


def test_limits_and_address_of_a_judge_may_change_but_not_its_model() -> None:
    before = "http --base_url http://a/v1 --judge_model m --max_requests 5"
    after = "http --judge_model m --base_url http://b/v1 --max_requests 50 --concurrency 2"
    assert find_differences({"judge": before}, {"judge": after}, parse_stage_options) == []
    other = after.replace("m ", "n ", 1)
    assert len(find_differences({"judge": before}, {"judge": other}, parse_stage_options)) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--config", str(recipe), "--use_cpu", "--dry_run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert {"instructions", "judge", "threshold", "output_dir"} <= set(resolved)


# ---- Report ----


def test_settings_are_read_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: object, **kwargs: object) -> None:
        (tmp_path / "asked").touch()  # settings are read in a process of their own

    monkeypatch.setattr("cutlm.model.loading.load_config", ask)
    recipe = next(path for path in RECIPES if path.stem == "two-nodes")
    assert main(["align", "--config", str(recipe), "--use_cpu", "--dry_run"]) == 0
    assert not (tmp_path / "asked").exists()


def test_table_shows_each_metric_that_is_known() -> None:
    stages = {
        "generate": {"num_responses": 1000, "num_empty": 2},
        "judge": {"num_judged": 990, "num_satisfactory": 297, "num_missing": 8, "num_empty": 2},
        "train": {"loss_start": 2.0, "loss_end": 1.5, "num_steps": 9, "flagged_share": 0.125},
        "evaluate": {"share_satisfactory": 0.5, "num_judged": 10, "win_rate": 61.06},
    }
    known = {name: {"state": "done", "seconds": 1800.0, "metrics": metrics} for name, metrics in stages.items()}
    first = summarize({"iteration": 0, "stages": {"evaluate": {"state": "done", "seconds": 1.0, "metrics": {}}}})
    lines = make_table([first, summarize({"iteration": 1, "stages": known})]).splitlines()
    # 297 / 990 are satisfactory; 8 + 2 have no judgment; 4 x 1800 s are 2 h.
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]] == [
        [
            *("iteration", "responses", "no judgment", "satisfactory", "flagged tokens", "loss"),
            *("held-out satisfactory", "held-out win rate", "time"),
        ],
        ["before", "", "", "", "", "", "", "", "1.0 s"],
        ["1", "1,000", "10", "30.0%", "12.5%", "2.000 → 1.500", "50.0%", "61.06", "2 h 00 min"],
    ]
    pending = {"merge": {"state": "-", "seconds": None, "metrics": {}}}
    status = make_status([{"iteration": 1, "stages": known | pending}])
    assert status.splitlines()[1].split() == ["1", *["done", "30", "min"] * 4, "-"]


@pytest.mark.parametrize("stage", ["blame", "train"])
def test_the_sensitivity_is_shown_and_noise_is_named_once(stage: str) -> None:
    signals = [0.8, 0.25, None]
    rows = []
    for number, signal in enumerate(signals, 1):
        metrics = {"flag_signal": signal, "pairwise": 0.5}
        known = {stage: {"state": "done", "seconds": 1.0, "metrics": metrics}}
        rows.append(summarize({"iteration": number, "stages": known}))
        lines = make_summary(rows).splitlines()
        header, last = ([cell.strip() for cell in lines[index].strip("|").split("|")] for index in (0, number + 1))
        shown = dict(zip(header, last, strict=True))
        assert shown["flag signal"] == ("" if signal is None else f"{signal:.2f}")
        assert shown["pairwise"] == "0.50"
        noise = describe_noise(signal)
        assert [line for line in lines if line.startswith("warning: ")] == ([f"warning: {noise}"] if noise else [])


def test_plot_has_a_panel_for_each_metric_of_the_eval_command() -> None:
    def draw_height(**evaluation: float) -> int:
        stages = {
            "judge": {"num_judged": 10, "num_satisfactory": 5, "num_missing": 0, "num_empty": 0},
            "train": {"loss_start": 2.0, "loss_end": 1.5, "num_steps": 9, "flagged_share": 0.1},
            "evaluate": evaluation,
        }
        known = {name: {"state": "done", "seconds": 1.0, "metrics": metrics} for name, metrics in stages.items()}
        plots = draw([summarize({"iteration": number, "stages": known}) for number in (1, 2)])
        assert plots is not None
        return int.from_bytes(plots[20:24])  # in a PNG's header

    one_row = draw_height(share_satisfactory=0.5)  # a line in a panel that exists anyway
    assert draw_height(a=1.0, b=2.0, c=3.0, num_d=4.0) == 2 * one_row  # counts are not drawn
    assert draw_height(a=1.0, b=2.0, c=3.0, d=4.0) == 3 * one_row


def test_durations_are_formatted() -> None:
    assert [format_seconds(value) for value in (3.14, 99.9, 120, 5400, 6000)] == [
        *("3.1 s", "99.9 s", "2 min", "90 min", "1 h 40 min"),
    ]
