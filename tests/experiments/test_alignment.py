"""The comparison of alignment methods on a real model: instructions with a rule, judgments, and the whole way."""

import json
from pathlib import Path

import alignment_shepherd
import pytest
from alignment import Size, bootstrap, describe_rows, main, make_row
from alignment_data import RULES, UNFINISHED, Task, draw_held_out, draw_tasks, judge
from alignment_runs import BASE, METHODS
from ifeval import Prompt, check_response, measure_strict
from tiny import save_tiny_model

from cutlm.training.config import CUTConfig

SIZE = Size(
    num_responses=4,
    max_response_tokens=4,
    num_dev=1,
    num_held_out=2,
    max_new_tokens=3,
    num_tested=2,
    learning_rates=(1e-3,),
    num_steps=1,
    batch_size=2,
    seeds=(1, 2, 3),
    num_best=1,
    num_seeds_of_others=2,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of published judgments and IFEval prompts, as in shared/data."""
    folder = tmp_path / "data"
    (folder / "judgments").mkdir(parents=True)
    (folder / "ifeval").mkdir()
    rows = [
        {
            "instruction": f"Name {number} rivers of Europe",
            "input": "",
            "output": "Danube, Rhine, Elbe.",
            "judgment": "Perfect." if number % 2 else "The answer is short.",
        }
        for number in range(30)
    ]
    rows.append({"instruction": "Sing!", "input": "la", "output": "La.", "judgment": "Perfect."})
    for index, name in enumerate(("iter1", "iter2", "iter3")):
        (folder / "judgments" / f"{name}.json").write_text(json.dumps(rows[index::3]))
    tested = [
        {"key": 1, "prompt": "Name 7 rivers of Europe. No commas.", "instruction_id_list": ["punctuation:no_comma"]},
        {"key": 2, "prompt": "Say yes in capitals.", "instruction_id_list": ["change_case:english_capital"]},
        {"key": 3, "prompt": "Quote.", "instruction_id_list": ["startend:quotation", "punctuation:no_comma"]},
    ]
    lines = [json.dumps(row | {"kwargs": [{}] * len(row["instruction_id_list"])}) for row in tested]
    (folder / "ifeval" / "even.jsonl").write_text("\n".join(lines))
    return folder


def read_tested(data: Path) -> list[Prompt]:
    from ifeval import read_prompts

    return read_prompts(data / "ifeval" / "even.jsonl")


# ---- Rules ----

# Rule, arguments, a response, where it is wrong (None: nothing is), and a word of the judgment.
CASES = [
    ("punctuation:no_comma", {}, "Red and blue.", None, ""),
    ("punctuation:no_comma", {}, "Red, blue, both.", [(3, 4), (9, 10)], "2 commas"),
    ("change_case:english_lowercase", {}, "this is all in small letters.", None, ""),
    ("change_case:english_lowercase", {}, "this is Not so in Berlin.", [(8, 11), (18, 24)], "Berlin"),
    ("change_case:english_capital", {}, "THIS IS the CAPITAL of france.", [(8, 11), (20, 22), (23, 29)], "the"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NATO, the UN and the EU",
        [(10, 12), (21, 23)],
        "3 words",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["day", "sun"]}, "A sunny Day.", [(8, 11)], "Day"),
    ("keywords:existence", {"keywords": ["moon", "sun"]}, "The sun.", [(8, 8)], "moon"),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        "The sun.",
        [(8, 8)],
        "1 time",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "b", "let_frequency": 2, "let_relation": "less than"},
        "Bob and a cab",
        [(2, 3), (12, 13)],
        "letters b",
    ),
    ("startend:quotation", {}, '"Yes."', None, ""),
    ("startend:quotation", {}, '"Yes.', [(5, 5)], "at its end"),
    ("startend:quotation", {}, "Yes.", [(0, 0), (4, 4)], "start and end"),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}, "No.", [(3, 3)], "Any other"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end. Or not", [(12, 19)], "after"),
    ("detectable_format:title", {}, "Sea", [(0, 0)], "title"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", None, ""),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a", [(3, 3)], "1 bullet point"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n* b", [(4, 7)], "2 bullet points"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "plain", [(5, 5)], "highlighted"),
    ("detectable_format:json_format", {}, '{"a": 1}', None, ""),
    ("detectable_format:json_format", {}, "a: 1", [(0, 0)], "JSON"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name]", [(11, 11)], "1 placeholder"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. P.S. Thanks", None, ""),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.", [(4, 4)], "P.S."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b c d", [(4, 7)], "4 words"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b", [(3, 3)], "only 2 words"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "It is. It was. Yes.",
        [(7, 19)],
        "3 sentences",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", None, ""),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\nb", [(3, 3)], "2 paragraphs"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\nc", [(8, 13)], "2 paragraphs"),
    ("combination:two_responses", {}, "Yes.", [(4, 4)], "two different"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", None, ""),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Hi!", [(0, 0)], "repeat"),
]


@pytest.mark.parametrize(("rule", "arguments", "response", "spans", "word"), CASES)
def test_a_response_is_judged_in_words_and_places(rule, arguments, response, spans, word):
    judgment, found = judge(Task("Do it.", rule, arguments), response)
    assert (judgment is None) == (spans is None)
    assert found == (spans or [])
    assert word in (judgment or "")


def test_every_rule_has_a_case_that_breaks_it():
    assert {rule for rule, _, _, spans, _ in CASES if spans} == set(RULES)


def test_a_response_that_was_stopped_is_unsatisfactory():
    task = Task("Do it.", "punctuation:no_comma", {})
    assert judge(task, "Red and", is_unfinished=True) == (UNFINISHED, [(7, 7)])
    judgment, spans = judge(task, "Red, and", is_unfinished=True)
    assert judgment is not None
    assert judgment.endswith(UNFINISHED)
    assert spans == [(3, 4), (8, 8)]


def test_strict_accuracies_count_instructions_and_prompts():
    prompt = Prompt("Quote.", ("startend:quotation", "punctuation:no_comma"), ({}, {}))
    assert check_response(prompt, '"Yes, sir."') == [True, False]
    assert check_response(prompt, "") == [False, False]
    assert measure_strict([[True, False], [True, True]]) == {"instruction_strict": 0.75, "prompt_strict": 0.5}


# ---- Instructions ----


def test_tasks_have_every_rule_equally_often_and_nothing_of_the_test(data):
    tasks = draw_tasks(data / "judgments", read_tested(data), 28)
    counts = [sum(task.rule == rule for task in tasks) for rule in RULES]
    assert set(counts) == {1, 2}
    assert not any(task.prompt.startswith(("Name 7 rivers", "Sing!")) for task in tasks)
    assert len({task.prompt for task in tasks}) == 28
    assert tasks == draw_tasks(data / "judgments", read_tested(data), 28)
    assert tasks != draw_tasks(data / "judgments", read_tested(data), 28, seed=1)


def test_too_few_instructions_are_an_error(data):
    with pytest.raises(ValueError, match="30"):
        draw_tasks(data / "judgments", read_tested(data), 30)


def test_held_out_responses_are_satisfactory_and_of_other_instructions(data):
    tasks = draw_tasks(data / "judgments", read_tested(data), 10)
    held_out = draw_held_out(data / "judgments", tasks, 100)
    assert held_out
    assert all(record.is_satisfactory for record in held_out)
    assert not any(task.prompt.startswith(record.instruction + ".") for task in tasks for record in held_out)


# ---- Runs ----


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_settings_of_every_method_are_valid(tmp_path, method):
    CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", template="chat", **method.settings)


def test_runs_continue_where_they_stopped(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTLM_CACHE", str(tmp_path / "cache"))
    model, out = save_tiny_model(tmp_path / "model", chat=True), tmp_path / "out"
    out.mkdir()
    skip = [method.name for method in METHODS if method.name not in ("cut_spans", "cut_frozen")]
    command = ["--data", str(data), "--model", str(model), "--out", str(out), "--skip", *skip]
    # No time: nothing is run.
    assert main([*command, "--minutes", "0"], SIZE) == 1
    assert json.loads((out / "alignment.json").read_text())["results"] == []
    assert main([*command, "--until", "base"], SIZE) == 0
    content = json.loads((out / "alignment.json").read_text())
    assert [row["method"] for row in content["results"]] == ["base"]
    assert content["num_test_runs"] == {"finished": 1, "planned": 6}
    assert content["command"].endswith(f"--skip {' '.join(skip)}")
    assert main(command, SIZE) == 0
    content = json.loads((out / "alignment.json").read_text())
    rows = {row["method"]: row for row in content["results"]}
    assert set(rows) == {"base", "cut_spans", "cut_frozen"}
    assert content["num_test_runs"] == {"finished": 6, "planned": 6}
    # The base model has no seeds; one method is the best, and the other has two seeds.
    assert sorted(len(row["instruction_strict"]) for row in rows.values()) == [1, 2, 3]
    assert rows["cut_spans"]["num_judged"] == 4
    assert rows["cut_spans"]["seconds"][0] > 0
    assert rows["base"]["retention"][0] < 0
    # Each adapter is trained once, although it is measured on two splits.
    (cache,) = (tmp_path / "cache" / "alignment").iterdir()
    assert len(list((cache / "adapters").iterdir())) == 5
    before = (out / "alignment-runs.jsonl").read_bytes()
    capsys.readouterr()
    assert main(command, SIZE) == 0
    assert (out / "alignment-runs.jsonl").read_bytes() == before
    assert "Not complete" not in capsys.readouterr().out


# ---- The table ----


def make_run(method: str, followed: list[str]) -> dict:
    numbers = dict.fromkeys(("retention", "seconds", "mean_response_words", "num_judged", "num_prompts"), 1)
    accuracies = {
        "instruction_strict": "".join(followed).count("1") / len("".join(followed)),
        "prompt_strict": sum("0" not in text for text in followed) / len(followed),
    }
    return {"method": method, "learning_rate": None, "followed": followed} | numbers | accuracies


def test_intervals_are_of_prompts_drawn_again():
    def rate(followed):
        return sum("0" not in text for text in followed) / len(followed)

    assert bootstrap([["1", "1", "1"]], rate) == [1.0, 1.0]
    low, high = bootstrap([["1", "0"] * 50], rate)
    assert low == pytest.approx(0.4, abs=0.03)
    assert high == pytest.approx(0.6, abs=0.03)
    # The same prompts are drawn for the base model, so equal results have no gain.
    assert bootstrap([["1", "0"] * 50], rate, ["1", "0"] * 50) == [0.0, 0.0]


def test_a_row_has_the_gain_over_base():
    base = make_run("base", ["0", "0", "10"])
    row = make_row(METHODS[0], [make_run("cut_spans", ["1", "1", "11"])] * 2, base)
    assert row["instruction_strict"] == [1.0, 1.0]
    assert row["gain"] == pytest.approx(0.75)
    assert row["gain_interval"][0] > 0
    base_row = make_row(BASE, [base], base)
    assert "gain" not in base_row
    content = {
        "size": {"max_new_tokens": 1, "num_tested": 2, "num_held_out": 1, "num_steps": 1, "batch_size": 1},
        "num_test_runs": {"finished": 3, "planned": 4},
        "date": "today",
        "command": "the command",
        "dtype": "float32",
    }
    table = describe_rows([base_row, row], content)
    assert table.index("`cut_spans`") < table.index("`base`")
    assert "Not complete: 3 of 4" in table
    assert "`the command`" in table
    assert "drawn by a fixed seed" in table


# ---- Shepherd ----


def test_shepherd_is_measured_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTLM_CACHE", str(tmp_path / "cache"))
    source, out = tmp_path / "data" / "shepherd", tmp_path / "out"
    source.mkdir(parents=True)
    out.mkdir()
    judged, raw = [], []
    for number in range(8):
        texts = {"question": f"Add {number // 2} and 1.", "answer": f"{number}", "feedback": f"It is not {number}."}
        judged.append({"id": number, "dataset": "sums"} | texts)
        metadata = {"context": texts["question"], "output_correct": f"{number // 2 + 1}"}
        metadata |= {"output_candidate": texts["answer"]}
        raw.append({"id": number, "dataset": "sums", "metadata": metadata})
    for name, rows in (("human_data_for_model", judged), ("human_data_raw", raw)):
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = alignment_shepherd.Size(num_held_out=4, num_steps=1, batch_size=2)
    train, held_out = alignment_shepherd.split_records(source, size)
    assert len(held_out) == 4
    assert not {record.instruction for record in train} & {record.instruction for record in held_out}
    model = save_tiny_model(tmp_path / "model", chat=True)
    command = ["--data", str(tmp_path / "data"), "--model", str(model), "--out", str(out)]
    monkeypatch.setattr(alignment_shepherd, "METHODS", alignment_shepherd.METHODS[:3])
    assert alignment_shepherd.main(command, size) == 0
    content = json.loads((out / "alignment_shepherd.json").read_text())
    assert [row["method"] for row in content["results"]] == ["base", "cut", "cut_frozen"]
    base, cut, _ = content["results"]
    assert base["response"] != cut["response"]
    assert base["sensitivity"]["num_records"] == 4
    before = (out / "alignment_shepherd.json").read_bytes()
    assert alignment_shepherd.main(command, size) == 0
    assert (out / "alignment_shepherd.json").read_bytes() == before
