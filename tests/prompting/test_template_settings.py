"""Arguments and dates of chat templates, through the commands."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ON_CPU, list_options, write_lines
from tiny import CHATML, save_tiny_model
from transformers import AutoTokenizer

from cutlm.cli import main
from cutlm.data.files import read_rows
from cutlm.flagging.token_scores import read_token_scores
from cutlm.model.loading import load_tokenizer
from cutlm.prompting import templates
from cutlm.prompting.templates import read_arguments

RECORDS = [
    {"instruction": f"Name {number}.", "output": "Sydney.", "judgment": "It is wrong." if number % 2 else None}
    for number in range(4)
]
TEMPLATE = "Today is {{ strftime_now('%d %b %Y') }}.{% if is_short is defined and is_short %} Be short.{% endif %}\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose chat template prints the date and has an argument."""
    folder = save_tiny_model(tmp_path / "model", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE + CHATML
    tokenizer.save_pretrained(folder)
    return folder


class Calendar(datetime.date):
    """A calendar whose day a test sets."""

    day_shown = datetime.date(2026, 11, 26)

    @classmethod
    def today(cls) -> datetime.date:  # type: ignore[override]
        return cls.day_shown


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Calendar]:
    monkeypatch.setattr(Calendar, "day_shown", datetime.date(2026, 11, 26))
    monkeypatch.setattr(templates.datetime, "date", Calendar)
    return Calendar


def run(*arguments: str, **options: Any) -> int:
    return main([*arguments, *list_options(**options)])


def blame(model: Path, tmp_path: Path, name: str = "scores.jsonl", **options: Any) -> Path:
    data, out = write_lines(tmp_path / "records.jsonl", RECORDS), tmp_path / name
    assert run("blame", model=model, data=data, out=out, template="chat", device="cpu", **options) == 0
    return out


def train(model: Path, data: Path, out: Path, *further: str, **options: Any) -> int:
    settings = ON_CPU | {"model_name_or_path": model, "data": data, "output_dir": out, "template": "chat"}
    return run("train", *further, **settings | {"max_steps": 1} | options)


def read_run(out: Path) -> dict[str, Any]:
    return json.loads((out / "cutlm_run.json").read_text())


def test_training_uses_the_date_of_the_token_scores(model: Path, tmp_path: Path, calendar: type[Calendar]) -> None:
    scores = blame(model, tmp_path)
    assert {row.template_date for row in read_token_scores(scores)} == {"2026-11-26"}
    calendar.day_shown = datetime.date(2026, 11, 27)
    assert train(model, scores, tmp_path / "out") == 0
    assert read_run(tmp_path / "out")["template_date"] == "2026-11-26"
    assert train(model, tmp_path / "records.jsonl", tmp_path / "today") == 0
    assert read_run(tmp_path / "today")["template_date"] == "2026-11-27"


def test_a_resumed_run_keeps_its_date(model: Path, tmp_path: Path, calendar: type[Calendar]) -> None:
    data, out = write_lines(tmp_path / "records.jsonl", RECORDS), tmp_path / "out"
    assert train(model, data, out, save_steps=1, max_steps=1) == 0
    calendar.day_shown = datetime.date(2026, 11, 27)
    assert train(model, data, out, save_steps=1, max_steps=2, resume_from_checkpoint="last") == 0
    assert read_run(out)["template_date"] == "2026-11-26"


def test_a_stopped_blame_keeps_its_date(
    model: Path, tmp_path: Path, calendar: type[Calendar], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cutlm.flagging.detector.write_token_scores", interrupt)
        data, out = write_lines(tmp_path / "records.jsonl", RECORDS), tmp_path / "scores.jsonl"
        assert run("blame", model=model, data=data, out=out, template="chat", device="cpu") == 130
    calendar.day_shown = datetime.date(2026, 11, 27)
    scores = read_token_scores(blame(model, tmp_path))
    assert {row.template_date for row in scores} == {"2026-11-26"}


def test_arguments_of_training_are_defaults_of_the_merged_model(model: Path, tmp_path: Path) -> None:
    arguments = '{"is_short": true}'
    scores = blame(model, tmp_path, chat_template_kwargs=arguments, template_date="2024-07-05")
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"chat_template_kwargs": {"is_short": True}}))
    assert train(model, scores, tmp_path / "out", "--config", str(config)) == 0
    assert run("merge", adapter=tmp_path / "out", out=tmp_path / "merged") == 0
    tokenizer = load_tokenizer(tmp_path / "merged")
    assert read_arguments(tokenizer.chat_template) == ({"is_short": True}, TEMPLATE + CHATML)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert ". Be short.<|im_start|>user" in text
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"instruction": "Name it."}])
    shared = {"prompts": prompts, "max_new_tokens": 3, "device": "cpu", "template_date": "2024-07-05"}
    trained, plain, given = (tmp_path / f"{name}.jsonl" for name in ("trained", "plain", "given"))
    assert run("generate", model=tmp_path / "merged", out=trained, **shared) == 0
    merged_without = load_tokenizer(tmp_path / "merged")
    merged_without.chat_template = TEMPLATE + CHATML
    merged_without.save_pretrained(tmp_path / "merged")
    assert run("generate", model=tmp_path / "merged", out=given, chat_template_kwargs=arguments, **shared) == 0
    assert run("generate", model=tmp_path / "merged", out=plain, **shared) == 0
    outputs = [read_rows(path)[0][0].value["output"] for path in (trained, given, plain)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chat_template_kwargs": '{"is_shrt": true}'}, "is_shrt"),
        ({"chat_template_kwargs": '{"messages": []}'}, "messages"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs"),
        ({"template_date": "26.11.2026"}, "template_date"),
    ],
)
def test_bad_arguments_and_dates_are_named(
    model: Path, tmp_path: Path, options: dict[str, str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "records.jsonl", RECORDS)
    try:
        status = run("blame", model=model, data=data, out=tmp_path / "out", template="chat", **options)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert named in capsys.readouterr().err
    assert train(model, data, tmp_path / "trained", **options) == 2
    assert named in capsys.readouterr().err


def test_training_with_other_arguments_than_blame_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = blame(model, tmp_path, chat_template_kwargs='{"is_short": true}')
    assert train(model, scores, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("field 'template'") == len(RECORDS)
