"""The measurement of detection in experiments/real: what breaks a rule, planted errors, scores, metrics and results."""

import json
import random
import time
from pathlib import Path

import detection
import numpy as np
import pytest
from contexts import NUM_FOREIGN, draw_foreign, score_contexts
from detection import Size, measure, measure_detectors, score_taught
from format_rules import NAMES, Rule, draw_rule, find_broken_spans, judge_response, recognize_rule, word_rule
from ifeval import Prompt, check_response
from metrics import (
    Response,
    choose_threshold,
    contrast_foreign,
    contrast_perfect,
    contrast_plain,
    measure_scores,
    measure_sensitivity,
    score_words,
)
from planted_errors import CHANGES, STYLES, Change, draw_change, judge_change, plant_errors
from real_data import draw_tasks, judge_tasks, load_right_answers
from teaching import teach_detector
from tiny_scale import judge_world_responses

from cutlm.data.records import JudgedRecord
from cutlm.evaluation.detection import compute_average_precision
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.world.base import base_path

ARGUMENTS = {
    "keywords:forbidden_words": {"forbidden_words": ["cat", "dog"]},
    "length_constraints:number_words": {"relation": "less than", "num_words": 4},
    "length_constraints:number_sentences": {"relation": "less than", "num_sentences": 2},
    "keywords:letter_frequency": {"letter": "o", "let_relation": "less than", "let_frequency": 2},
}


def make_rule(name: str) -> Rule:
    """The rule with a short name, and arguments for tests."""
    instruction_id = next(key for key, value in NAMES.items() if value == name)
    return Rule(instruction_id, ARGUMENTS.get(instruction_id, {}))


# ---- Format rules ----


@pytest.mark.parametrize(
    ("name", "response", "wrong"),
    [
        ("commas", "One, two, three.", [",", ","]),
        ("commas", "One and two.", []),
        ("lowercase", "this is NASA and ESA", ["NASA"]),
        ("lowercase", "1. The Answer", ["T"]),
        ("lowercase", "all is well, été", []),
        ("capitals", "IT is done", ["is"]),
        ("capitals", "THE Great day", ["reat"]),
        ("capitals", "ALL IS WELL, ÉTÉ 5", []),
        ("forbidden words", "A Cat, a catalog and my DOG.", ["Cat", "DOG"]),
        ("forbidden words", "Cats and dogs.", []),
        ("number of words", "One two three four, five.\n", ["four, five."]),
        ("number of words", "It's over.", []),  # three words for IFEval: It, s, over
        ("number of sentences", "This is one. This is two! Three?", ["This is two! Three?"]),
        ("number of sentences", "This is the only one.", []),
        ("letter frequency", "Our long cord", ["o", "o"]),
        ("letter frequency", "Only this here", []),
    ],
)
def test_spans_are_what_breaks_the_rule(name: str, response: str, wrong: list[str]) -> None:
    spans = find_broken_spans(make_rule(name), response)
    assert [response[start:end] for start, end in spans] == wrong


ENGLISH = [
    "The river is wide, and the old bridge over it is long. It was built of stone! Who built it?",
    "the cat sat on the mat and the dog slept near the door of the house",
    "THE QUICK BROWN FOX RAN OVER THE HILL AND WAS NOT SEEN AGAIN",
    "Yes. No.",
    "Birds sing",
]


@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("response", ENGLISH)
def test_a_response_has_spans_if_ifeval_says_that_it_breaks_the_rule(name: str, response: str) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")
    rule = make_rule(name)
    (is_followed,) = check_response(Prompt("", (rule.instruction_id,), (rule.arguments,)), response)
    assert (find_broken_spans(rule, response) == []) == is_followed


@pytest.mark.parametrize("name", NAMES.values())
def test_a_broken_rule_is_judged_in_several_wordings(name: str) -> None:
    rule = make_rule(name)
    response = "My dog sat over the long, long road. It was Monday."
    judged = [judge_response(rule, response, random.Random(seed)) for seed in range(40)]
    assert len({judgment for judgment, _ in judged}) >= 3
    assert all(spans == find_broken_spans(rule, response) for _, spans in judged)
    assert all(judgment and "{" not in judgment for judgment, _ in judged)
    assert len({word_rule(rule, random.Random(seed)) for seed in range(20)}) >= 2


def test_a_rule_that_is_followed_has_no_judgment() -> None:
    assert judge_response(make_rule("commas"), "None here.", random.Random(0)) == (None, [])


def test_forbidden_words_are_those_that_the_answer_uses() -> None:
    rule = draw_rule(
        "keywords:forbidden_words", "Why do rivers meander?", "Rivers erode their banks.", random.Random(0)
    )
    assert rule == Rule("keywords:forbidden_words", {"forbidden_words": ["rivers", "erode"]})
    assert draw_rule("keywords:forbidden_words", "Two and two?", "4", random.Random(0)) is None


@pytest.mark.parametrize(
    ("judgment", "name", "arguments"),
    [
        ("The response uses commas, 5 of them, although ...", "commas", {}),
        (
            "The response uses a forbidden word, one of ['construction', 'passage'].",
            "forbidden words",
            {"forbidden_words": ["construction", "passage"]},
        ),
        (
            "The response has 80 words, but it should have less than 50 words.",
            "number of words",
            {"relation": "less than", "num_words": 50},
        ),
        ("The response lacks a postscript.", None, None),
    ],
)
def test_the_rule_of_a_known_judgment_is_recognized(judgment: str, name: str | None, arguments: dict | None) -> None:
    rule = recognize_rule(judgment)
    assert (rule and rule.name, rule and rule.arguments) == (name, arguments)


# ---- Planted errors ----

ANSWERS = [
    "Mozart was born in 1756 in Salzburg because his parents had moved to that town some years before.",
    "1. Boil 3 eggs for 7 minutes.\n2. Cool them in cold water, which stops them from cooking any further.",
    "The treaty was signed in Paris by Benjamin Franklin, which ended the long war between both of them.",
    "Water boils at 100 degrees, which is why cooks like Auguste Escoffier measured everything with great care.",
    "On Monday the team went to Norway because the new ship had been waiting there for its first crew.",
]


def test_planted_errors_differ_from_the_answer_exactly_in_their_span() -> None:
    sources = [JudgedRecord(instruction=f"Question {index}?", output=text) for index, text in enumerate(ANSWERS * 4)]
    records = plant_errors(sources, 12, seed=3)
    assert records == plant_errors(sources, 12, seed=3)
    assert records != plant_errors(sources, 12, seed=4)
    assert {record.model_extra["change"] for record in records} == set(CHANGES)
    assert {record.model_extra["style"] for record in records} == set(STYLES)
    outputs = {source.instruction: source.output for source in sources}
    for record in records:
        ((start, end),) = record.wrong_spans
        original = outputs[record.instruction]
        num_kept = len(record.output) - end
        assert record.output[:start] == original[:start]
        assert record.output[end:] == original[len(original) - num_kept :]
        assert record.output != original
        assert not record.is_satisfactory


def test_list_markers_are_not_changed() -> None:
    for seed in range(30):
        change = draw_change("number", ANSWERS[1], random.Random(seed), [], [])
        assert change.right in ("3", "7")
        assert change.wrong != change.right


def test_a_name_is_replaced_by_one_of_its_kind() -> None:
    change = draw_change("name", ANSWERS[4], random.Random(0), [], [])
    assert (change.right, change.wrong in ANSWERS[4]) == ("Norway", False)
    assert draw_change("name", "No name here, only 1 number.", random.Random(0), ["Anna"], []) is None


def test_a_clause_keeps_the_word_that_introduces_it() -> None:
    clauses = [("because", "the weather had been too cold for the whole week"), ("which", "is never right")]
    change = draw_change("clause", ANSWERS[0], random.Random(0), [], clauses)
    assert change.apply(ANSWERS[0]).endswith("because the weather had been too cold for the whole week.")


def test_only_an_editor_names_the_wrong_text_and_a_vague_judgment_names_nothing() -> None:
    answer = "He was born in 1756 in Salzburg."
    change = Change("number", 15, "1756", "1799")
    changed = change.apply(answer)
    for seed in range(20):
        texts = {style: judge_change(change, changed, style, random.Random(seed)) for style in STYLES}
        assert "1799" in texts["editor"]
        assert "1756" in texts["editor"]
        assert "1756" in texts["reader"]
        assert "1799" not in texts["reader"]
        assert "1799 in Salzburg" in texts["assistant"]
        assert not any(number in texts["vague"] for number in ("1756", "1799"))


# ---- Scores and metrics ----


def make_response(wrong: list[tuple[int, int]], **logps: list[float]) -> Response:
    """A response "abcd" of four tokens and the end of the turn."""
    record = JudgedRecord.model_validate(
        {"instruction": "x", "output": "a b c d", "judgment": 'The "b" is wrong.', "wrong_spans": wrong, "rule": "r"}
    )
    spans = [(0, 1), (2, 3), (4, 5), (6, 7), (7, 7)]
    return Response(record, spans, {name: np.array(values) for name, values in logps.items()})


RESPONSES = [
    make_response(
        [(2, 3)],
        plain=[-1.0, -3.0, -1.0, -1.0, -1.0],
        own=[-1.0, -1.0, -0.5, -2.0, -1.0],
        perfect=[-1.0, -3.0, -1.0, -1.0, -1.0],
        foreign_0=[-1.0, -2.0, -1.0, -1.0, -1.0],
        foreign_1=[-1.0, -4.0, -1.0, -0.8, -1.0],
    ),
    make_response(
        [(6, 7)],
        plain=[-1.0, -1.0, -1.0, -2.0, -1.0],
        own=[0.0, -1.0, -1.0, -1.75, -1.0],
        perfect=[-1.0, -1.0, -1.0, -1.0, -1.0],
        foreign_0=[-0.2, -1.0, -1.0, -2.0, -1.0],
        foreign_1=[-0.2, -1.0, -1.0, -2.0, -1.0],
    ),
]


def test_contrasts_are_log_ratios_to_their_reference() -> None:
    logps = RESPONSES[0].logps
    assert contrast_plain(logps).tolist() == [0.0, 2.0, 0.5, -1.0, 0.0]
    assert contrast_perfect(logps).tolist() == [0.0, 2.0, 0.5, -1.0, 0.0]
    assert contrast_foreign(logps).tolist() == pytest.approx([0.0, 2.0, 0.5, -1.1, 0.0])
    # A foreign judgment is compared with the others, not with itself.
    assert contrast_foreign(logps, "foreign_0").tolist() == pytest.approx([0.0, 2.0, 0.0, -0.2, 0.0])


def test_average_precision_chance_and_f1_of_hand_computed_scores() -> None:
    scores = [contrast_plain(response.logps) for response in RESPONSES]
    # In order: b (wrong), a of the second, c of the first, d of the second (wrong), then the rest.
    found = measure_scores(RESPONSES, scores, threshold=1.1, auto_threshold=2.0, groups=["rule"])
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert found["chance"] == 0.2
    assert (found["precision"], found["recall"]) == (0.5, 1.0)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["f1_auto"] == 0.5  # log 2: b, and a of the second response
    assert found["num_records"] == 2
    assert found["by_group"]["rule"]["r"]["average_precision"] == found["average_precision"]
    assert found["interval"][0] <= found["average_precision"] <= found["interval"][1]
    pairs = zip(np.concatenate(scores), np.concatenate([item.is_wrong for item in RESPONSES]), strict=True)
    assert compute_average_precision(pairs) == pytest.approx(found["average_precision"])


def test_the_automatic_threshold_flags_hardly_anything_under_foreign_judgments() -> None:
    # The largest of ten ratios is 1.0, and not even one in ten may be flagged.
    assert choose_threshold(contrast_plain, RESPONSES) == pytest.approx(np.e)
    assert choose_threshold(contrast_plain, RESPONSES[1:]) == pytest.approx(np.exp(0.8))


def test_sensitivity_compares_own_and_foreign_judgments() -> None:
    found = measure_sensitivity(RESPONSES)
    assert found["flagged_share_own"] == pytest.approx(0.4)
    assert found["flagged_share_foreign"] == pytest.approx(0.2)
    assert found["flag_signal"] == pytest.approx(0.5)
    assert found["pairwise"] == 1.0


def test_the_lexical_baseline_prefers_quotes() -> None:
    record = JudgedRecord(instruction="x", output="It is red and big", judgment='Not "red and", but big.')
    spans = [(0, 2), (3, 5), (6, 9), (10, 13), (14, 17), (17, 17)]
    assert score_words(Response(record, spans, {})).tolist() == [0, 0, 2, 2, 1, 0]


def test_foreign_judgments_say_something_else_about_another_rule() -> None:
    rows = [("Commas.", "commas"), ("A comma!", "commas"), ("Long.", "length"), ("Too long.", "length"), ("x", "x")]
    records = [
        JudgedRecord.model_validate({"instruction": "i", "output": "o", "judgment": judgment, "rule": rule})
        for judgment, rule in rows
    ]
    drawn = draw_foreign(records, "rule", 0)
    assert all(len(set(texts)) == NUM_FOREIGN for texts in drawn)
    assert not {"Commas.", "A comma!"} & set(drawn[0] + drawn[1])
    assert all(
        record.judgment not in texts for record, texts in zip(records, draw_foreign(records, None, 0), strict=True)
    )


# ---- With the tiny world's model ----


def test_scores_resume_where_a_run_stopped(tmp_path: Path) -> None:
    records = judge_world_responses()[:20]
    foreign = draw_foreign(records, None, 0)
    arguments = (base_path(), "alpaca", records, foreign, tmp_path)
    whole = score_contexts(*arguments)
    (path,) = tmp_path.glob("scores-*.partial")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 1 + len(records)
    path.write_text("".join(lines[:17]) + lines[17][:30], "utf-8")  # killed inside of the second block
    again = score_contexts(*arguments)
    assert path.read_text("utf-8").splitlines(keepends=True)[:17] == lines[:17]
    assert list(whole) == list(again) == list(range(20))
    for one, other in zip(whole.values(), again.values(), strict=True):
        assert set(one) == {"plain", "own", "perfect", "foreign_0", "foreign_1"}
        assert all(one[name] == pytest.approx(other[name], abs=1e-4) for name in one)


def test_after_the_deadline_what_is_scored_is_returned(tmp_path: Path) -> None:
    records = judge_world_responses()[:20]
    foreign = draw_foreign(records, None, 0)
    arguments = (base_path(), "alpaca", records, foreign, tmp_path)
    assert score_contexts(*arguments, deadline=time.monotonic() - 1) == {}
    assert list(score_contexts(*arguments, keep=[3, 5])) == [3, 5]


def write_data(folder: Path) -> None:
    """Published judgments and Shepherd's file, in small."""
    (folder / "judgments").mkdir(parents=True)
    (folder / "shepherd").mkdir()
    rows = [{"instruction": f"Tell me about {index}?", "output": text} for index, text in enumerate(ANSWERS * 6)]
    judged = [{"instruction": "What?", "output": "An answer that is bad.", "judgment": "It is bad."}]
    for number in (1, 2, 3):
        path = folder / "judgments" / f"iter{number}.json"
        path.write_text(json.dumps([row | {"judgment": None} for row in rows[number - 1 :: 3]] + judged), "utf-8")
    line = {"dataset": "GSM8K", "metadata": {"context": "Sum?", "output_correct": "2 + 2 is 4, of course.\n"}}
    invented = {"dataset": "proofwriter", "metadata": {"context": "Dog?", "output_correct": "The dog likes it."}}
    text = "".join(f"{json.dumps(row)}\n" for row in (line, invented))
    (folder / "shepherd" / "human_data_raw.jsonl").write_text(text, "utf-8")


def test_right_answers_are_the_satisfactory_ones(tmp_path: Path) -> None:
    write_data(tmp_path)
    answers = load_right_answers(tmp_path)
    assert len(answers) == 31
    assert "2 + 2 is 4, of course." in {answer.output for answer in answers}
    assert all(answer.is_satisfactory for answer in answers)


def test_tasks_have_every_rule_equally_often_and_judging_limits_each(tmp_path: Path) -> None:
    write_data(tmp_path)
    tasks = draw_tasks(load_right_answers(tmp_path), 14, 0)
    assert sorted(rule.name for _, rule in tasks) == sorted([*NAMES.values()] * 2)
    broken, followed = judge_tasks(tasks, ["So, it is. OK, boo!" for _ in tasks], 1, 0)
    assert max(sum(record.model_extra["rule"] == name for record in broken) for name in NAMES.values()) == 1
    assert all(record.wrong_spans for record in broken)
    assert all(record.is_satisfactory for record in followed)


def test_results_of_other_parts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data")
    # The tiny model's own responses break few rules.
    monkeypatch.setattr(detection, "answer_tasks", lambda model, texts, cache: ["So, it is. OK, boo!"] * len(texts))
    monkeypatch.setattr(detection, "measure_scale", lambda cache: [])
    size = Size(num_tasks=14, max_per_rule=2, num_planted=6, num_steps=1)
    out = tmp_path / "out"
    for parts in (["chat"], ["alpaca"], ["scale"]):
        measure(parts, base_path(), tmp_path / "data", tmp_path / "cache", out, size)
    content = json.loads((out / "detection.json").read_text("utf-8"))
    keys = [(row["detector"], row["kind"]) for row in content["results"]]
    suffixes = ("", "_foreign", "_perfect", "_perfect_surprise", "_perfect_smooth")
    names = ["surprise", "words", *(f"{name}{suffix}" for name in ("chat", "alpaca") for suffix in suffixes)]
    assert sorted(keys) == sorted((name, kind) for name in names for kind in ("format", "planted"))
    assert {"average_precision", "chance", "f1", "num_records"} <= set(content["results"][0])
    assert [(row["model"], row["kind"]) for row in content["sensitivity"]] == [
        (name, kind) for name in ("chat", "alpaca") for kind in ("planted", "format")
    ]
    assert content["command"]
    table = (out / "detection.md").read_text("utf-8")
    assert all(f"`{name}`" in table for name in names)
    assert content["command"] in table


def test_each_half_is_scored_by_a_detector_that_learned_from_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = judge_world_responses()[:7]
    halves = [records[::2], records[1::2]]
    arguments = (base_path(), "alpaca", records, draw_foreign(records, None, 0), halves, tmp_path, 1)
    taught = []

    def teach(model: Path, template: str, others: list[JudgedRecord], cache: Path, num_steps: int) -> Path:
        taught.append(others)
        return teach_detector(model, template, others, cache, num_steps)

    monkeypatch.setattr(detection, "teach_detector", teach)
    scores = score_taught(*arguments)
    assert taught == [records[1::2], records[::2]]
    tokenizer = load_tokenizer(base_path())
    lengths = [len(Encoder(tokenizer, "alpaca").encode_response(record.output)) for record in records]
    assert {index: len(logps["own"]) for index, logps in scores.items()} == dict(enumerate(lengths))
    adapters = sorted(path.parent for path in tmp_path.glob("*/adapter_config.json"))
    assert len(adapters) == 2
    written = [adapter.stat().st_mtime_ns for adapter in adapters]
    score_taught(*arguments)
    assert [adapter.stat().st_mtime_ns for adapter in adapters] == written


def test_rows_of_a_part_have_a_baseline_only_once() -> None:
    rows, sensitivity = measure_detectors("taught_chat", "format", RESPONSES, has_baselines=False)
    assert [row["detector"] for row in rows] == [
        f"taught_chat{suffix}" for suffix in ("", "_foreign", "_perfect", "_perfect_surprise", "_perfect_smooth")
    ]
    assert (sensitivity["model"], sensitivity["kind"]) == ("taught_chat", "format")
