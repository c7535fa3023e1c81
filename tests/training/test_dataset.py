"""What each objective sees of a record: the exact tokens that are learned, read back as text."""

import pytest
from tiny import make_tokenizer

from cutlm.data.records import JudgedRecord
from cutlm.generation.files import encode_refinement_prompts
from cutlm.prompting.encoding import Encoder, encode_records
from cutlm.prompting.templates import render_alpaca_prompt, render_refinement_prompt
from cutlm.training.config import CUTConfig
from cutlm.training.dataset import View, choose_view

WRONG = JudgedRecord(
    instruction="Name the capital of Australia.",
    output="Sydney is.",
    judgment="It is wrong.",
    i_ans="Canberra is.",
    wrong_spans=[[0, 6]],
)
RIGHT = JudgedRecord(instruction="Name the capital of Australia.", output="Canberra is.", judgment=None)
WRONG_ELSEWHERE = WRONG.model_copy(update={"i_ans": None, "wrong_spans": None})


def make_view(objective: str, **settings: object) -> View:
    return choose_view(CUTConfig(objective=objective, use_cpu=True, report_to="none", **settings))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer("bpe"), "alpaca")


def read(encoder: Encoder, record: JudgedRecord, objective: str, **options: object) -> dict:
    """The view's row, with the prompts and the response as text; `|` stands for an end of sequence."""
    view = make_view(objective, **options)(record, encoder)
    assert not isinstance(view, str), view
    texts = {
        name: None if ids is None else encoder.tokenizer.decode(ids).replace("<eos>", "|")
        for name, ids in (
            ("prompt", view.prompt_ids),
            ("judged_prompt", view.judged_prompt_ids),
            ("response", view.response_ids),
        )
    }
    return texts | view.extra


def prompt_of(judgment: str | None) -> str:
    return render_alpaca_prompt(WRONG.instruction, judgment).text


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
def test_each_objective_learns_its_own_sequences(encoder, objective, record, prompt_judgment, judged, response):
    seen = read(encoder, record, objective)
    assert seen["prompt"] == prompt_of(prompt_judgment)
    assert seen["judged_prompt"] == (None if judged is None else prompt_of(judged))
    assert seen["response"] == response


@pytest.mark.parametrize("objective", ["dual_cut", "hindsight", "forward_prediction"])
def test_an_objection_to_a_response_that_its_score_makes_satisfactory_is_not_taken_for_praise(encoder, objective):
    seen = read(encoder, WRONG.model_copy(update={"score": 8.0}), objective)
    assert "It is wrong." not in str(seen)
    assert "Perfect." in str(seen)


def test_praise_is_kept_in_its_own_words(encoder):
    praised = RIGHT.model_copy(update={"judgment": "Perfect, thank you."})
    assert read(encoder, praised, "hindsight")["prompt"] == prompt_of("Perfect, thank you.")


def test_spans_that_meet_no_token_leave_the_record_out(encoder):
    blank = WRONG.model_copy(update={"output": "So  is.", "wrong_spans": ((3, 4),)})
    assert make_view("cut", detector="spans")(blank, encoder) == (
        "unsatisfactory, and its wrong_spans contain no token"
    )


def test_dual_cut_knows_praise_from_objection(encoder):
    assert read(encoder, WRONG, "dual_cut")["is_praised"] is False
    assert read(encoder, RIGHT, "dual_cut")["is_praised"] is True


def test_unlikelihood_blames_every_token_of_an_unsatisfactory_response_and_none_of_another(encoder):
    num_tokens = len(encoder.encode_response(WRONG.output))
    seen = read(encoder, WRONG, "unlikelihood", unlikelihood_weight=0.5)
    assert seen["is_flagged"] == [True] * num_tokens
    assert seen["weights"] == [0.5] * num_tokens
    assert "is_flagged" not in read(encoder, RIGHT, "unlikelihood")


def test_wrong_spans_take_the_place_of_flags(encoder):
    seen = read(encoder, WRONG, "cut", detector="spans", unlikelihood_weight=0.5)
    ids = encoder.encode_response(WRONG.output)
    flagged = [index for index, is_flagged in zip(ids, seen["is_flagged"], strict=True) if is_flagged]
    assert encoder.tokenizer.decode(flagged) == "Sydney"
    assert seen["weights"] == [0.5 * is_flagged for is_flagged in seen["is_flagged"]]
    assert seen["judged_prompt"] is not None


@pytest.mark.parametrize(
    ("objective", "options", "reason"),
    [
        ("likelihood", {"satisfactory_only": True}, "unsatisfactory, and satisfactory_only is on"),
        ("ilf_mle", {}, "unsatisfactory, and without an improved response in i_ans (cutlm refine makes them)"),
        ("cut", {"detector": "spans"}, "unsatisfactory, and without wrong_spans"),
    ],
)
def test_what_a_view_leaves_out_is_counted_by_its_reason(encoder, objective, options, reason):
    view = make_view(objective, **options)
    records = [RIGHT, WRONG_ELSEWHERE, WRONG_ELSEWHERE]
    encoded = encode_records(records, ["a", "b", "c"], encoder, 512, view)
    assert [row["location"] for row in encoded.rows] == ["a"]
    assert encoded.describe_left_out() == [f"2 records left out: {reason}"]
    assert encoded.num_left_out == 2
    assert "2 records left out" in encoded.describe(512)


def test_a_table_has_the_columns_of_every_view_whatever_comes_first(encoder):
    rows = encode_records([RIGHT, WRONG], ["a", "b"], encoder, 512, make_view("unlikelihood")).rows
    assert rows[0]["is_flagged"] is None
    assert all(rows[1]["is_flagged"])


def test_views_are_cut_to_length_like_records(encoder):
    long = WRONG.model_copy(update={"instruction": "Name it. " * 200})
    encoded = encode_records([long], ["a"], encoder, 64, make_view("hindsight"))
    assert encoded.num_truncated == 1
    assert len(encoded.rows[0]["prompt_ids"]) + len(encoded.rows[0]["response_ids"]) == 64


def test_the_request_for_a_better_response_holds_draft_and_judgment(encoder):
    (ids,) = encode_refinement_prompts([WRONG], encoder)
    text = encoder.tokenizer.decode(ids)
    assert text == render_refinement_prompt(WRONG.instruction, WRONG.output, WRONG.judgment).text
    assert "### Draft:\nSydney is.\n\n### Judgment:\nIt is wrong.\n\n### Response:\n" in text


def test_the_request_for_a_better_response_is_one_turn_of_a_chat():
    encoder = Encoder(make_tokenizer("bpe", chat=True), "chat")
    text = encoder.tokenizer.decode(encode_refinement_prompts([WRONG], encoder)[0])
    assert text.startswith("<|im_start|>user\nName the capital of Australia.\n\nA draft of the response:\nSydney is.")
    assert text.endswith("Write an improved response, and nothing else.<|im_end|>\n<|im_start|>assistant\n")
