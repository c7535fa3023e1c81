"""What each objective learns of a record, read back as text; and rows that were encoded elsewhere."""

import math
from pathlib import Path
from typing import Any

import pytest
from commands import ON_CPU
from datasets import Dataset
from tiny import make_model, make_tokenizer

from cutlm import CUTTrainer
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.generation.files import encode_refinement_prompts
from cutlm.prompting.encoding import Encoder, View, encode_rendered
from cutlm.prompting.rows import encode_records
from cutlm.prompting.templates import render_alpaca_prompt, render_refinement_prompt
from cutlm.training.config import CUTConfig
from cutlm.training.dataset import choose_view

WRONG = JudgedRecord(
    instruction="Name the capital of Australia.",
    output="Sydney is.",
    judgment="It is wrong.",
    i_ans="Canberra is.",
    wrong_spans=[[0, 6]],
)
RIGHT = JudgedRecord(instruction="Name the capital of Australia.", output="Canberra is.", judgment=None)
WRONG_ONLY = WRONG.model_copy(update={"i_ans": None, "wrong_spans": None})


def make_view(objective: str, **settings: Any) -> View:
    return choose_view(CUTConfig(objective=objective, **ON_CPU | settings))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer("bpe"), "alpaca")


def read(encoder: Encoder, record: JudgedRecord, objective: str, **settings: Any) -> dict[str, Any]:
    """What the view makes of a record, with prompts and response as text; `|` is an end-of-sequence token."""
    rendered = make_view(objective, **settings)(record, encoder)
    assert not isinstance(rendered, str), rendered
    (view,) = encode_rendered([rendered], encoder)
    extra = rendered.annotate(view.response_ids) if rendered.annotate else {}
    assert isinstance(extra, dict), extra
    texts = {
        name: None if ids is None else encoder.tokenizer.decode(ids).replace("<eos>", "|")
        for name, ids in (
            ("prompt", view.prompt_ids),
            ("judged_prompt", view.judged_prompt_ids),
            ("response", view.response_ids),
        )
    }
    return texts | view.extra | extra


def render(judgment: str | None) -> str:
    return render_alpaca_prompt(WRONG.instruction, judgment).text


# ---- Views ----


@pytest.mark.parametrize(
    ("objective", "record", "prompt_judgment", "judged", "response"),
    [
        ("cut", WRONG, None, "It is wrong.", "Sydney is.|"),
        ("cut", RIGHT, None, None, "Canberra is.|"),
        ("dual_cut", WRONG, None, "It is wrong.", "Sydney is.|"),
        ("dual_cut", RIGHT, None, "Perfect.", "Canberra is.|"),
        ("likelihood", WRONG, None, None, "Sydney is.|"),
        ("hindsight", WRONG, "It is wrong.", None, "Sydney is.|"),
        ("hindsight", RIGHT, "Perfect.", None, "Canberra is.|"),
        ("forward_prediction", WRONG, None, None, "Sydney is.|\n\n### Judgment:\nIt is wrong.|"),
        ("forward_prediction", RIGHT, None, None, "Canberra is.|\n\n### Judgment:\nPerfect.|"),
        ("ilf_mle", WRONG, None, None, "Canberra is.|"),
        ("ilf_mle", RIGHT, None, None, "Canberra is.|"),
        ("unlikelihood", WRONG, None, None, "Sydney is.|"),
    ],
)
def test_each_objective_learns_its_own_sequences(
    encoder: Encoder,
    objective: str,
    record: JudgedRecord,
    prompt_judgment: str | None,
    judged: str | None,
    response: str,
) -> None:
    seen = read(encoder, record, objective)
    assert seen["prompt"] == render(prompt_judgment)
    assert seen["judged_prompt"] == (None if judged is None else render(judged))
    assert seen["response"] == response


@pytest.mark.parametrize("objective", ["dual_cut", "hindsight", "forward_prediction"])
def test_criticism_of_a_response_with_a_satisfactory_score_is_not_used_as_praise(
    encoder: Encoder, objective: str
) -> None:
    seen = read(encoder, WRONG.model_copy(update={"score": 8.0}), objective)
    assert "It is wrong." not in str(seen)
    assert "Perfect." in str(seen)


def test_praise_keeps_its_own_words(encoder: Encoder) -> None:
    praised = RIGHT.model_copy(update={"judgment": "Perfect, thank you."})
    assert read(encoder, praised, "hindsight")["prompt"] == render("Perfect, thank you.")


def test_dual_cut_marks_praise(encoder: Encoder) -> None:
    assert read(encoder, WRONG, "dual_cut")["is_praised"] is False
    assert read(encoder, RIGHT, "dual_cut")["is_praised"] is True


def test_unlikelihood_flags_every_token_of_unsatisfactory_responses_only(encoder: Encoder) -> None:
    num_tokens = len(encoder.encode_response(WRONG.output))
    seen = read(encoder, WRONG, "unlikelihood", unlikelihood_weight=0.5)
    assert seen["is_flagged"] == [True] * num_tokens
    assert seen["weights"] == [0.5] * num_tokens
    assert "is_flagged" not in read(encoder, RIGHT, "unlikelihood")
    # All rows of a table have the same columns, whatever comes first.
    rows = encode_records([RIGHT, WRONG], ["a", "b"], encoder, 512, make_view("unlikelihood")).rows
    assert rows[0]["is_flagged"] is None
    assert all(rows[1]["is_flagged"])


def test_wrong_spans_replace_the_detector(encoder: Encoder) -> None:
    seen = read(encoder, WRONG, "cut", detector="spans", unlikelihood_weight=0.5)
    ids = encoder.encode_response(WRONG.output)
    flagged = [token for token, is_flagged in zip(ids, seen["is_flagged"], strict=True) if is_flagged]
    assert encoder.tokenizer.decode(flagged) == "Sydney"
    assert seen["weights"] == [0.5 * is_flagged for is_flagged in seen["is_flagged"]]
    assert seen["judged_prompt"] is not None


@pytest.mark.parametrize(
    ("record", "objective", "settings"),
    [
        (WRONG_ONLY, "likelihood", {"satisfactory_only": True}),
        (WRONG_ONLY, "ilf_mle", {}),
        (WRONG_ONLY, "cut", {"detector": "spans"}),
        # Its span contains nothing but a space, and so no token.
        (
            WRONG.model_copy(update={"output": "So  is.", "wrong_spans": ((3, 4),)}),
            "cut",
            {"detector": "spans"},
        ),
    ],
)
def test_records_without_what_the_objective_learns_are_left_out_and_counted(
    encoder: Encoder, record: JudgedRecord, objective: str, settings: dict[str, Any]
) -> None:
    view = make_view(objective, **settings)
    encoded = encode_records([RIGHT, record, record], ["a", "b", "c"], encoder, 512, view)
    assert [row["location"] for row in encoded.rows] == ["a"]
    assert encoded.indices == [0]
    ((reason, num_skipped),) = encoded.skipped.items()
    assert reason.startswith("unsatisfactory, and ")
    assert num_skipped == encoded.num_left_out == 2


def test_prompts_of_every_view_are_truncated_to_fit(encoder: Encoder) -> None:
    long = WRONG.model_copy(update={"instruction": "Name it. " * 200})
    encoded = encode_records([long], ["a"], encoder, 64, make_view("hindsight"))
    assert encoded.num_truncated == 1
    assert len(encoded.rows[0]["prompt_ids"]) + len(encoded.rows[0]["response_ids"]) == 64


def test_a_refinement_request_contains_draft_and_judgment(encoder: Encoder) -> None:
    (ids,) = encode_refinement_prompts([WRONG], encoder)
    text = encoder.tokenizer.decode(ids)
    assert text == render_refinement_prompt(WRONG.instruction, WRONG.output, WRONG.judgment).text
    assert "### Draft:\nSydney is.\n\n### Judgment:\nIt is wrong.\n\n### Response:\n" in text


def test_a_refinement_request_is_one_turn_of_a_chat() -> None:
    encoder = Encoder(make_tokenizer("bpe", chat=True), "chat")
    text = encoder.tokenizer.decode(encode_refinement_prompts([WRONG], encoder)[0])
    assert text.startswith("<|im_start|>user\nName the capital of Australia.\n\n")
    assert text.index("Sydney is.") < text.index("It is wrong.")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>") == 2


# ---- Rows encoded elsewhere ----

ROW = {"prompt_ids": [1, 5], "judged_prompt_ids": [1, 5, 9], "response_ids": [7, 8, 2]}
FLAGGED = ROW | {"is_flagged": [True, False, True], "weights": [1.0, 0.0, 0.5]}
SATISFACTORY = ROW | {"judged_prompt_ids": None}
EITHER_KIND = pytest.mark.parametrize("kind", [list, Dataset.from_list])


def make_trainer(folder: Path, rows: Any, **settings: Any) -> CUTTrainer:
    values = ON_CPU | {"save_strategy": "no", "max_steps": 1} | settings
    return CUTTrainer(make_model(32), CUTConfig(output_dir=str(folder), **values), rows)


def find_problems(folder: Path, rows: Any, **settings: Any) -> list[str]:
    """The row and field of each problem, such as `1 weights`."""
    with pytest.raises(DataError) as caught:
        make_trainer(folder, rows, **settings)
    locations = (problem.split(": expected")[0] for problem in caught.value.problems)
    return [location.removeprefix("train_dataset[").replace("]: field", "").replace("'", "") for location in locations]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"objective": "likelihood"}, "objective likelihood"),
        ({"objective": "dual_cut"}, "is_praised"),
        ({"detector": "spans"}, "is_flagged"),
    ],
)
def test_rows_without_what_the_objective_learns_are_refused(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"^train_dataset: encoded rows .*{name}"):
        make_trainer(tmp_path, [ROW], **settings)


@EITHER_KIND
@pytest.mark.parametrize("detector", ["current", "spans"])
def test_flags_and_weights_of_rows_are_trained_on(tmp_path: Path, kind: Any, detector: str) -> None:
    trainer = make_trainer(tmp_path, kind([FLAGGED, SATISFACTORY]), detector=detector)
    assert trainer.train_dataset[0]["is_flagged"] == FLAGGED["is_flagged"]
    assert trainer.train_dataset[0]["weights"] == FLAGGED["weights"]
    assert math.isfinite(trainer.train().training_loss)


@EITHER_KIND
@pytest.mark.parametrize("detector", ["current", "spans"])
def test_flags_and_weights_that_do_not_fit_the_tokens_are_all_reported(
    tmp_path: Path, kind: Any, detector: str
) -> None:
    rows = [
        FLAGGED,
        FLAGGED | {"is_flagged": [True]},
        FLAGGED | {"weights": None},
        FLAGGED | {"weights": [1.0, -1.0, 0.5]},
        ROW | {"is_flagged": None, "weights": None},
        SATISFACTORY | {"is_flagged": None, "weights": [1.0]},
    ]
    expected = ["1 is_flagged", "2 weights", "3 weights", "4 is_flagged", "4 weights", "5 is_flagged", "5 weights"]
    assert find_problems(tmp_path, kind(rows), detector=detector) == expected


def test_values_of_the_wrong_type_are_all_reported(tmp_path: Path) -> None:
    rows = [
        FLAGGED | {"is_flagged": ["yes", "no", "no"]},
        FLAGGED | {"is_flagged": 3},
        FLAGGED | {"is_praised": "yes"},
        "no row",
        ROW | {"response_ids": []},
        ROW | {"prompt_ids": [-1]},
    ]
    expected = ["0 is_flagged", "1 is_flagged", "2 is_praised", "3]", "4 response_ids", "5 prompt_ids"]
    assert find_problems(tmp_path, rows) == expected


@EITHER_KIND
def test_dual_cut_rows_must_say_whether_they_are_praised(tmp_path: Path, kind: Any) -> None:
    rows = [ROW | {"is_praised": True}, ROW | {"is_praised": None}, SATISFACTORY | {"is_praised": None}, ROW]
    assert find_problems(tmp_path, kind(rows), objective="dual_cut") == ["1 is_praised", "3 is_praised"]
    assert make_trainer(tmp_path, kind(rows[::2]), objective="dual_cut").train_dataset[0]["is_praised"]


@EITHER_KIND
def test_rows_without_a_judged_prompt_are_satisfactory(tmp_path: Path, kind: Any) -> None:
    row = {key: value for key, value in ROW.items() if key != "judged_prompt_ids"}
    (prepared,) = make_trainer(tmp_path, kind([row])).train_dataset
    assert prepared["judged_prompt_ids"] is None
    assert prepared["is_satisfactory"]


def test_a_mapping_of_several_datasets_is_refused(tmp_path: Path) -> None:
    args = CUTConfig(output_dir=str(tmp_path), **ON_CPU)
    with pytest.raises(ConfigError, match=r"^eval_dataset: .*\(a, b\)"):
        CUTTrainer(make_model(32), args, [ROW], eval_dataset={"a": [ROW], "b": [ROW]})
