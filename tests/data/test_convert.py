"""`cutlm convert`: the records of each source, what is left out and why, and what is refused."""

import json
from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlm.cli import main
from cutlm.data.convert import alpaca, critiques, shepherd, ultrafeedback
from cutlm.data.files import SourceRow, read_rows
from cutlm.data.records import check_records, check_rows
from cutlm.errors import DataError


def locate(values, name="data.jsonl"):
    return [SourceRow(f"{name}:{number}", value) for number, value in enumerate(values, start=1)]


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return str(path)


def read(path):
    rows, problems = read_rows(path)
    assert problems == []
    return [row.value for row in rows]


def values_of(conversion):
    return [row.value for row in conversion.rows]


# alpaca


def test_alpaca_rows_keep_their_fields_and_a_null_input_becomes_empty():
    row = {"id": 3, "instruction": "x", "input": None, "output": "y", "judgment": None, "reason": None}
    conversion = alpaca.convert(locate([row | {"score": None, "i_ans": ""}, row | {"score": 8, "i_ans": "z"}]))
    assert values_of(conversion) == [row | {"input": ""}, row | {"input": "", "score": 8, "i_ans": "z"}]
    assert (conversion.num_read, conversion.left_out) == (2, Counter())


def test_the_published_judgments_are_unchanged(shared_data, tmp_path, capsys):
    files = [shared_data / "judgments" / f"iter{number}.json" for number in (1, 2, 3)]
    assert main(["convert", "alpaca", *map(str, files), "--out", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == [
        row for file in files for row in json.loads(file.read_text())
    ]
    assert capsys.readouterr().out.splitlines() == [
        "3000 rows read, 3000 kept, 0 left out",
        f"{tmp_path / 'all.json'}: 3000 records, 2240 satisfactory, 760 unsatisfactory",
    ]


def test_every_invalid_alpaca_row_is_named_and_nothing_is_written(tmp_path, capsys):
    good = {"instruction": "x", "output": "y", "judgment": None}
    file = write(tmp_path / "in.jsonl", [good, good | {"output": ""}, good | {"judgment": ["z"]}, [1]])
    assert main(["convert", "alpaca", file, "--out", str(tmp_path / "out.jsonl")]) == 2
    err = capsys.readouterr().err
    for part in (":2: field 'output'", ":3: field 'judgment'", ":4: expected an object"):
        assert f"{file}{part}" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_without_a_judgment_gets_a_null_and_is_counted(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", [{"instruction": "x", "output": "y"}])
    assert main(["convert", "alpaca", file, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert read(tmp_path / "out.jsonl") == [{"instruction": "x", "output": "y", "judgment": None}]
    assert "1 records have no field 'judgment'" in capsys.readouterr().out


# shepherd

SHEPHERD_MODEL = [
    {"id": 0, "dataset": "sums", "question": "1 + 2?", "answer": "4\n", "feedback": "The sum is 3."},
    {"id": 1, "dataset": "sums", "question": "1 + 1?", "answer": "2", "feedback": "Perfect."},
]
SHEPHERD_RAW = [
    {"id": 0, "metadata": {"context": "1 + 2?", "output_candidate": "4\n", "output_correct": "3"}},
    {"id": 1, "metadata": {"context": "1 + 1?", "output_candidate": "2", "output_correct": ""}},
]
SHEPHERD_RECORDS = [
    {"instruction": "1 + 2?", "output": "4\n", "judgment": "The sum is 3.", "i_ans": "3", "id": 0, "dataset": "sums"},
    {"instruction": "1 + 1?", "output": "2", "judgment": "Perfect.", "id": 1, "dataset": "sums"},
]


def test_shepherds_two_files_are_accepted_in_either_order():
    one, other = locate(SHEPHERD_MODEL, "m"), locate(SHEPHERD_RAW, "r")
    for conversion in (shepherd.convert(one, other), shepherd.convert(other, one)):
        assert values_of(conversion) == SHEPHERD_RECORDS
        assert [row.location for row in conversion.rows] == ["m:1", "m:2"]


def test_shepherd_answers_and_feedback_without_text_are_left_out_and_counted():
    model, raw = deepcopy(SHEPHERD_MODEL), deepcopy(SHEPHERD_RAW)
    model[0]["answer"] = raw[0]["metadata"]["output_candidate"] = " "
    model[1]["feedback"] = ""
    conversion = shepherd.convert(locate(model), locate(raw))
    assert conversion.rows == []
    assert conversion.left_out == {"empty answer": 1, "empty feedback": 1}


def test_shepherd_rows_that_do_not_match_are_all_named_by_both_locations():
    raw = [
        {"metadata": {"context": "1 + 2 = ?", "output_candidate": "5"}},
        {"metadata": {"context": "1 + 1?", "output_candidate": "22"}},
    ]
    with pytest.raises(DataError) as error:
        shepherd.convert(locate(SHEPHERD_MODEL, "m"), locate(raw, "r"))
    assert [problem.partition(" to be")[0] for problem in error.value.problems] == [
        "m:1 and r:1: expected 'question' and 'metadata.context'",
        "m:1 and r:1: expected 'answer' and 'metadata.output_candidate'",
        "m:2 and r:2: expected 'answer' and 'metadata.output_candidate'",
    ]


def test_shepherd_files_of_different_length_or_of_one_kind_are_refused():
    model, raw = locate(SHEPHERD_MODEL, "m"), locate(SHEPHERD_RAW, "r")
    for one, other, message in (
        (raw[:1], model, "same length, got 2 rows without 'metadata' .*m:2.* and 1 rows with 'metadata' .*r:1"),
        (model, model, "got 2 rows without 'metadata' .* and 2 rows without 'metadata'"),
        (raw, raw, "got 2 rows with 'metadata' .* and 2 rows with 'metadata'"),
        (model, [], "got 2 rows without 'metadata' .* and a file without rows"),
    ):
        with pytest.raises(DataError, match=message):
            shepherd.convert(one, other)


def test_invalid_shepherd_fields_are_all_named_by_location_and_path():
    model = [SHEPHERD_MODEL[0] | {"feedback": None}, {"question": "x"}]
    raw = [SHEPHERD_RAW[0], {"metadata": {"context": 1, "output_candidate": "x", "output_correct": ["y"]}}]
    with pytest.raises(DataError) as error:
        shepherd.convert(locate(model, "m"), locate(raw, "r"))
    assert error.value.problems == [
        "m:1: field 'feedback': expected a string, got null",
        "m:2: field 'answer' is missing; the object has 'question'",
        "m:2: field 'feedback' is missing; the object has 'question'",
        "r:2: field 'metadata.context': expected a string, got a number (1)",
        "r:2: field 'metadata.output_correct': expected a string, got a list",
    ]


def test_the_shepherd_folder_gives_1317_records(shared_data, tmp_path, capsys):
    out = tmp_path / "shepherd.jsonl.gz"
    assert main(["convert", "shepherd", str(shared_data / "shepherd"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1317 rows read, 1317 kept, 0 left out",
        f"{out}: 1317 records, 0 satisfactory, 1317 unsatisfactory",
    ]
    check = check_records(out)
    assert (len(check.records), check.problems, check.duplicates) == (1317, [], [])
    assert all(record.i_ans for record in check.records)
    assert len({record.model_extra["id"] for record in check.records}) == 1317


def test_swapped_lines_of_shepherd_are_found(shared_data, tmp_path, capsys):
    folder = shared_data / "shepherd"
    lines = (folder / "human_data_raw.jsonl").read_text("utf-8").splitlines(keepends=True)
    changed = tmp_path / "raw.jsonl"
    changed.write_text("".join([*lines[:700], lines[701], lines[700], *lines[702:]]), "utf-8")
    model = folder / "human_data_for_model.jsonl"
    assert main(["convert", "shepherd", str(changed), str(model), "--out", str(tmp_path / "out.jsonl")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4
    for line, number in zip(err, (701, 701, 702, 702), strict=True):
        assert f"{model}:{number} and {changed}:{number}: " in line


# critiques


def make_answer(text="An answer.", pairs=None, rating=7, skip=False):
    if pairs is not None:
        pairs = [{"text": critique, "refinement": refinement} for critique, refinement in pairs]
    return {"answer": text, "feedback": {"skip": skip, "rating": rating, "critiques": pairs}}


def make_line(*questions):
    return {
        "id": "p1",
        "data": {
            "passage": {"title": None, "text": "A passage."},
            "questions": [
                {"question": f"Q{number}?", "rankings": rankings, "answers": answers}
                for number, (rankings, answers) in enumerate(questions, start=1)
            ],
        },
    }


def convert_question(rankings, *answers):
    conversion = critiques.convert(locate([make_line((rankings, list(answers)))]))
    assert conversion.num_read == len(conversion.rows) + conversion.left_out.total() == 1
    assert conversion.unit == "questions"
    return values_of(conversion), dict(conversion.left_out)


def test_critiques_are_joined_and_the_last_refinement_is_taken():
    answer = make_answer("Bad.", [(" It is", "Fix 1."), ("bad. ", "Fix 2.")], rating=3)
    record = {"instruction": "A passage.\nQ1?", "output": "Bad.", "judgment": "It is bad.", "i_ans": "Fix 2."}
    assert convert_question([1], answer) == ([record | {"id": "p1"}], {})


@pytest.mark.parametrize("none", [None, []])
def test_an_answer_without_critiques_is_satisfactory_only_when_rated_7(none):
    record = {"instruction": "A passage.\nQ1?", "output": "Good.", "judgment": None, "id": "p1"}
    assert convert_question([1], make_answer("Good.", none, rating=7)) == ([record], {})
    for rating in (6, 6.99, 8, None):
        assert convert_question([1], make_answer("Good.", none, rating)) == ([], {"no critiques, but not rated 7": 1})


@pytest.mark.parametrize(
    ("rankings", "best"),
    [([1, 3, 2], 1), ([3, 1, 2], 0), ([1, 2, 2], 1), ([0, 0, 0], 0), ([-3, -2, -1.5], 2)],
)
def test_the_first_answer_with_the_largest_ranking_is_taken(rankings, best):
    records, _ = convert_question(rankings, *(make_answer(f"Answer {number}.") for number in range(3)))
    assert records[0]["output"] == f"Answer {best}."


def test_if_the_best_answer_cannot_be_used_no_other_is_taken():
    good = make_answer("Good.")
    assert convert_question([2, 1], make_answer(skip=True), good) == ([], {"feedback was skipped": 1})
    assert convert_question([2, 1], make_answer(" \n"), good) == ([], {"empty answer": 1})
    assert convert_question([2, 1], {"answer": "x"}, good) == ([], {"no feedback": 1})
    for fix in ("", " ", None):
        answer = make_answer("Bad.", [("It is bad.", "Fix."), ("Really.", fix)])
        assert convert_question([2, 1], answer, good) == ([], {"empty refinement": 1})
    assert convert_question([2, 1], make_answer("Bad.", [(" ", "Fix.")]), good) == ([], {"critiques without text": 1})
    assert convert_question([]) == ([], {"no answer": 1})


@pytest.mark.parametrize("rankings", [None, [], [None], [1, 2, 3]])
def test_the_only_answer_needs_no_ranking(rankings):
    records, _ = convert_question(rankings, make_answer("Good."))
    assert records[0]["output"] == "Good."


@pytest.mark.parametrize(
    ("rankings", "got"),
    [(None, "none"), ([1], "1 of them"), ([], "0 of them"), ([1, None], "a null"), ([1, None, 2], "a null")],
)
def test_incomplete_rankings_are_named(rankings, got):
    answers = [make_answer(), make_answer()]
    line = make_line(([1, 2], answers), (rankings, answers))
    with pytest.raises(DataError, match=rf"data\.jsonl:1: field 'data\.questions\[1\]\.rankings': .* got {got}"):
        critiques.convert(locate([line]))
    del line["data"]["questions"][0]["rankings"]
    with pytest.raises(DataError) as error:
        critiques.convert(locate([line]))
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["data"], [], "field 'data': expected an object, got a list"),
        (["data", "passage", "text"], 5, "field 'data.passage.text': expected a string, got a number (5)"),
        (["data", "questions"], {}, "field 'data.questions': expected a list, got an object"),
        (["data", "questions", 0], "x", "field 'data.questions[0]': expected an object, got a string"),
        (
            ["data", "questions", 0, "rankings", 1],
            "2",
            "field 'data.questions[0].rankings[1]': expected a number, got a string",
        ),
        (
            ["data", "questions", 0, "answers", 1, "feedback", "skip"],
            "no",
            "field 'data.questions[0].answers[1].feedback.skip': expected a boolean, got a string",
        ),
        (
            ["data", "questions", 0, "answers", 1, "feedback", "critiques"],
            [{"refinement": "x"}],
            "field 'data.questions[0].answers[1].feedback.critiques[0].text' is missing; the object has 'refinement'",
        ),
    ],
)
def test_invalid_fields_of_critiques_are_named_by_location_and_path(path, value, message):
    line = make_line(([1, 2], [make_answer(), make_answer()]))
    inner = line
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(DataError) as error:
        critiques.convert(locate([line]))
    assert error.value.problems == [f"data.jsonl:1: {message}"]


def test_a_row_that_is_not_an_object_is_refused():
    with pytest.raises(DataError) as error:
        critiques.convert(locate([["x"], {}, None]))
    assert error.value.problems == [
        "data.jsonl:1: expected an object with the fields id, data, got a list",
        "data.jsonl:2: field 'data' is missing; the object has no fields",
        "data.jsonl:3: expected an object with the fields id, data, got null",
    ]


blank = st.sampled_from(["", " ", "text", "more text"])
answers = st.fixed_dictionaries(
    {"answer": blank},
    optional={
        "feedback": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "skip": st.booleans() | st.none(),
                "rating": st.integers(1, 7) | st.none(),
                "critiques": st.none()
                | st.lists(
                    st.fixed_dictionaries({"text": blank}, optional={"refinement": blank | st.none()}), max_size=3
                ),
            },
        )
    },
)


@given(st.lists(st.lists(answers, max_size=3), max_size=4))
def test_every_question_is_either_a_valid_record_or_left_out_with_a_reason(questions):
    line = make_line(*(([0.5] * len(group), group) for group in questions))
    conversion = critiques.convert(locate([line]))
    assert conversion.num_read == len(questions) == len(conversion.rows) + conversion.left_out.total()
    assert check_rows(conversion.rows).problems == []
    for record in values_of(conversion):
        assert (record["judgment"] is None) == ("i_ans" not in record)


# ultrafeedback


def make_completion(response="A response.", critique="It is fine.", score=5.0, ratings=(), **further):
    notes = {f"aspect{number}": {"Rating": rating, "Rationale": "..."} for number, rating in enumerate(ratings)}
    return {"response": response, "critique": critique, "overall_score": score, "annotations": notes} | further


def make_row(*completions):
    return {"instruction": "Say something.", "source": "sharegpt", "models": ["m"], "completions": list(completions)}


def convert_completion(*args, **kwargs):
    conversion = ultrafeedback.convert(locate([make_row(make_completion(*args, **kwargs))]))
    assert conversion.num_read == len(conversion.rows) + conversion.left_out.total() == 1
    assert check_rows(conversion.rows).problems == []
    return values_of(conversion), dict(conversion.left_out)


def test_every_completion_becomes_a_record_with_critique_and_score():
    row = make_row(make_completion("One.", "Bad.", 2, model="gpt-4"), make_completion("Two.", "Good.", 8.5))
    record = {"instruction": "Say something.", "source": "sharegpt"}
    assert values_of(ultrafeedback.convert(locate([row]))) == [
        record | {"output": "One.", "judgment": "Bad.", "score": 2, "model": "gpt-4"},
        record | {"output": "Two.", "judgment": "Good.", "score": 8.5},
    ]


@pytest.mark.parametrize(
    ("ratings", "score"),
    [(["1"], 1), (["5", 5], 10), (["3"], 5.5), (["4", "5", "N/A", None], 8.875), (["2.5"], 4.375)],
)
@pytest.mark.parametrize("missing", [None, "N/A"])
def test_without_an_overall_score_the_mean_rating_is_scaled(ratings, score, missing):
    ((record,), _) = convert_completion(score=missing, ratings=ratings)
    assert record["score"] == pytest.approx(score)


def test_a_score_may_be_missing_if_there_is_a_critique():
    completion = {"response": "x", "critique": "y"}
    (record,) = values_of(ultrafeedback.convert(locate([make_row(completion)])))
    assert record == {"instruction": "Say something.", "output": "x", "judgment": "y", "source": "sharegpt"}
    ((record,), _) = convert_completion(score=None, ratings=["N/A"])
    assert "score" not in record


def test_a_score_may_be_a_number_in_a_string():
    ((record,), _) = convert_completion(score="7.5", ratings=["1"])
    assert record["score"] == 7.5


@pytest.mark.parametrize("critique", [None, "", " \n"])
def test_a_completion_without_critique_is_kept_only_if_its_score_is_satisfactory(critique):
    ((record,), _) = convert_completion(critique=critique, score=7)
    assert record["judgment"] is None
    assert convert_completion(critique=critique, score=6.5) == ([], {"no critique, but scored below 7": 1})
    assert convert_completion(critique=critique, score=None) == ([], {"no critique and no score": 1})


def test_completions_without_text_or_with_an_impossible_score_are_left_out_and_counted():
    assert convert_completion(response=" ") == ([], {"empty response": 1})
    assert convert_completion(response=None) == ([], {"empty response": 1})
    assert convert_completion(score=0) == ([], {"score outside 1 to 10": 1})
    assert convert_completion(score=85) == ([], {"score outside 1 to 10": 1})
    assert convert_completion(score=None, ratings=["6"]) == ([], {"score outside 1 to 10": 1})


NOT_A_NUMBER = 'expected a finite number, null or "N/A", got a'


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (make_completion(critique=["x"]), "critique': expected a string, got a list"),
        (make_completion(score="high"), f"overall_score': {NOT_A_NUMBER} string"),
        (make_completion(score=True), f"overall_score': {NOT_A_NUMBER} boolean (True)"),
        (make_completion(score="nan"), f"overall_score': {NOT_A_NUMBER} string"),
        (make_completion(ratings=["4", [5]]), f"annotations.aspect1.Rating': {NOT_A_NUMBER} list"),
        (make_completion() | {"annotations": []}, "annotations': expected an object, got a list"),
    ],
)
def test_invalid_fields_of_ultrafeedback_are_named_by_location_and_path(completion, message):
    for convert in (ultrafeedback.convert, ultrafeedback.convert_to_pairs):
        with pytest.raises(DataError) as error:
            convert(locate([make_row(make_completion(), completion)]))
        assert error.value.problems == [f"data.jsonl:1: field 'completions[1].{message}"]


def test_pairs_are_all_completions_of_an_instruction_with_different_scores():
    low, high, same = (
        make_completion("Low.", score=2),
        make_completion("High.", "", 9),
        make_completion("Same.", score=2),
    )
    conversion = ultrafeedback.convert_to_pairs(
        locate([make_row(low, high, same), make_row(make_completion(score=10))])
    )
    pair = {"prompt": "Say something.", "chosen": "High.", "chosen_score": 9, "rejected_score": 2}
    assert values_of(conversion) == [pair | {"rejected": "Low."}, pair | {"rejected": "Same."}]
    assert (conversion.num_read, conversion.left_out, conversion.unit) == (3, {"the same score": 1}, "pairs")


def test_pairs_need_two_responses_and_two_scores():
    row = make_row(make_completion(), make_completion(" "), make_completion(score=None), make_completion(score=11))
    conversion = ultrafeedback.convert_to_pairs(locate([row]))
    assert conversion.rows == []
    assert conversion.left_out == {"empty response": 3, "no score": 1, "score outside 1 to 10": 2}


# the command


def test_the_command_prints_what_was_left_out_and_why(tmp_path, capsys):
    lines = [
        make_line(([1], [make_answer("Bad.", [("It is bad.", "Fix.")])]), ([1], [make_answer()])),
        make_line(([1], [make_answer(skip=True)]), ([1], [make_answer(skip=True)]), ([1], [make_answer("")])),
    ]
    out = tmp_path / "out.jsonl"
    files = [write(tmp_path / f"{number}.jsonl", [line]) for number, line in enumerate(lines)]
    assert main(["convert", "critiques", *files, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "5 questions read, 2 kept, 3 left out",
        "2 left out: feedback was skipped",
        "1 left out: empty answer",
        f"{out}: 2 records, 1 satisfactory, 1 unsatisfactory",
    ]
    assert [row["judgment"] for row in read(out)] == ["It is bad.", None]


def test_the_command_writes_pairs(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", [make_row(make_completion("Low.", score=2), make_completion("High.", score=9))])
    out = tmp_path / "pairs.json"
    assert main(["convert", "ultrafeedback", file, "--pairs", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 pairs read, 1 kept, 0 left out", f"{out}: 1 pairs"]
    assert [sorted(pair) for pair in read(out)] == [["chosen", "chosen_score", "prompt", "rejected", "rejected_score"]]


def test_if_nothing_is_kept_no_file_is_written_and_the_reasons_are_printed(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", [make_line(([1], [make_answer(skip=True)]))])
    assert main(["convert", "critiques", file, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "1 left out: feedback was skipped" in capsys.readouterr().err
    empty = write(tmp_path / "empty.jsonl", [])
    assert main(["convert", "alpaca", empty, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert f"{empty}: nothing to write" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_text_that_records_refuse_is_named_and_the_old_file_stays(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", [make_row(make_completion()), make_row(make_completion(critique="a\0"))])
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    assert main(["convert", "ultrafeedback", file, "--out", str(out)]) == 2
    assert f"{file}:2: field 'judgment': expected text without null bytes" in capsys.readouterr().err
    assert out.read_text() == "old"


def test_lines_that_are_not_json_are_named_for_every_file(tmp_path, capsys):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text('{}\n{"a"\n')
    assert main(["convert", "alpaca", *map(str, files), "--out", str(tmp_path / "out.jsonl")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"cutlm convert: {files[0]}:2: not JSON (")
    assert err[1].startswith(f"{files[1]}:2: not JSON (")
    assert len(err) == 2


@pytest.mark.parametrize("link", ["same", "dotted", "symbolic", "hard"])
def test_an_input_is_never_overwritten(link, tmp_path, capsys):
    row = {"instruction": "x", "output": "y", "judgment": None}
    file = tmp_path / "in.jsonl"
    write(file, [row])
    out = {"same": file, "dotted": tmp_path / ".." / tmp_path.name / "in.jsonl"}.get(link, tmp_path / "out.jsonl")
    if link == "symbolic":
        out.symlink_to(file)
    elif link == "hard":
        out.hardlink_to(file)
    assert main(["convert", "alpaca", str(file), "--out", str(out)]) == 2
    assert f"--out {out}" in capsys.readouterr().err
    assert read(file) == [row]


def test_wrong_inputs_give_exit_code_2_and_the_reason(tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    file = write(tmp_path / "in.jsonl", SHEPHERD_MODEL)
    for argv, message in (
        (["alpaca", str(tmp_path / "nothing")], "nothing: no such file"),
        (["critiques", str(tmp_path / "none")], "none: no such file"),
        (["shepherd", str(tmp_path)], "human_data_for_model.jsonl: no such file"),
        (["shepherd", file], "got 1 inputs"),
        (["shepherd", file, file, file], "got 3 inputs"),
        (["shepherd", file, file], "expected one file with 'question', 'answer' and 'feedback'"),
        (["alpaca", file, "--pairs"], "--pairs: expected the source 'ultrafeedback', got 'alpaca'"),
    ):
        assert main(["convert", *argv, "--out", out]) == 2
        assert message in capsys.readouterr().err
    for argv in (["nope", file, "--out", out], ["alpaca", "--out", out], ["alpaca", file]):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *argv])
        assert stop.value.code == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_a_converted_file_passes_the_check(tmp_path, capsys):
    write(tmp_path / "human_data_for_model.jsonl", SHEPHERD_MODEL)
    write(tmp_path / "human_data_raw.jsonl", SHEPHERD_RAW)
    out = tmp_path / "new" / "out.json.xz"
    for argv in (["convert", "shepherd", str(tmp_path), "--out", str(out)], ["check", str(out)]):
        assert main(argv) == 0
        printed = capsys.readouterr()
        assert "1 satisfactory, 1 unsatisfactory" in printed.out
        assert printed.err == ""
    assert read(out) == SHEPHERD_RECORDS
