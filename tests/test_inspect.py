"""The page of `cutlm inspect`, in a real browser: its figures are eq. 5's, texts are texts, and it asks for nothing.

What needs no browser, such as the command's messages and the data in the page, is tested here too.
"""

import json
import math
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import open_browser, visit
from report_scores import NASTY, make_scores
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.objectives import blame_tokens
from cutlm.records import JudgedRecord
from cutlm.report.columns import make_columns
from cutlm.report.inspection import render_inspection, write_inspection
from cutlm.report.pages import Example, write_page
from cutlm.report.pairing import pair_scores
from cutlm.token_scores import TokenScores, flag_spans, read_token_scores, write_token_scores

OUTPUTS = (
    "The capital is Sydney, a large city.",
    "Canberra is the capital.",
    "12 + 34 = 47, and so on.",
    "Hello world! Sydney is not the capital.",
    "A new line.",
)


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


def make_rows(seed: int = 0) -> list[TokenScores]:
    """Five records: the second satisfactory, all others wrong in one place but the fourth, of which nobody knows."""
    rows = []
    for index, output in enumerate(OUTPUTS):
        judgment = None if index == 1 else f"Number {index} is wrong."
        scores = make_scores(output, judgment, seed=seed + index)
        record = JudgedRecord(
            instruction=f"Task {index}?",
            output=output,
            judgment=judgment,
            wrong_spans=None if index in (1, 3) else ((4, 11),),  # type: ignore[arg-type]
        )
        without, judged = (
            None if logps is None else [round(logp, 6) for logp in logps]  # as `cutlm blame` writes them
            for logps in (scores.logps_without, scores.logps_with)
        )
        rows.append(flag(replace(scores, record=record, logps_without=without, logps_with=judged), 1.1))
    return rows


def flag(scores: TokenScores, threshold: float) -> TokenScores:
    """Scores with the flags of eq. 5."""
    if scores.logps_with is None or scores.logps_without is None or scores.record.is_satisfactory:
        return replace(scores, is_flagged=[False] * len(scores.tokens), weights=[0.0] * len(scores.tokens))
    without, judged = (torch.tensor(logps, dtype=torch.float64) for logps in (scores.logps_without, scores.logps_with))
    blame = blame_tokens(without, judged, threshold=threshold, unlikelihood_weight=1.0, gamma=1.0)
    return replace(scores, is_flagged=blame.is_flagged.tolist(), weights=blame.weights.tolist())


def describe(rows: list[TokenScores]) -> list[str]:
    """What the page must say of flags: how many, and precision and recall where wrong_spans are known."""
    num_flagged = sum(sum(scores.is_flagged) for scores in rows)
    wrong = [scores for scores in rows if not scores.record.is_satisfactory]
    num_tokens = sum(len(scores.tokens) for scores in wrong)
    known = [scores for scores in wrong if scores.record.wrong_spans]
    truths = [flag_spans(scores.spans, scores.record.wrong_spans or ()) for scores in known]
    hits = sum(
        a and b
        for scores, truth in zip(known, truths, strict=True)
        for a, b in zip(scores.is_flagged, truth, strict=True)
    )
    num_found = sum(sum(scores.is_flagged) for scores in known)
    num_wrong = sum(map(sum, truths))
    share = f"{100 * hits / num_found:.1f}%" if num_found else "\u2013"
    return [
        f"{num_flagged} token{'' if num_flagged == 1 else 's'} flagged ({100 * num_flagged / num_tokens:.1f}%)",
        f"{sum(not any(scores.is_flagged) for scores in wrong)} unsatisfactory without a flag",
        f"precision {share} ({hits} of {num_found})",
        f"recall {100 * hits / num_wrong:.1f}% ({hits} of {num_wrong})",
    ]


def write(folder: Path, *files: list[TokenScores], unpaired: tuple[int, ...] = ()) -> Path:
    names = ("before.jsonl", "after.jsonl")[: len(files)]
    path = folder / "report.html"
    write_inspection(path, make_columns(names, list(zip(*files, strict=True)), unpaired))
    return path


def read_figures(page: Any, line: int = 0) -> list[str]:
    return page.locator("#figures p").nth(line).locator("span:not(.side)").all_inner_texts()


def list_flagged(page: Any, record: int) -> list[str]:
    return page.locator(f"article[data-index='{record}'] .flagged").evaluate_all("all => all.map(e => e.textContent)")


def list_pieces(scores: TokenScores) -> list[str]:
    """The flagged tokens' texts, of tokens that have a character each or more."""
    spans = zip(scores.spans, scores.is_flagged, strict=True)
    return [scores.record.output[start:end] for (start, end), is_flagged in spans if is_flagged]


# ---- Flags and figures ----


def test_flags_and_figures_follow_the_threshold_by_equation_5(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        assert read_figures(page) == describe(rows)
        for threshold in (1, 1.05, 1.5, 3, 40, 1e6):
            page.fill("#threshold", str(threshold))
            flagged = [flag(scores, threshold) for scores in rows]
            assert read_figures(page) == describe(flagged)
            for index, scores in enumerate(flagged):
                assert list_flagged(page, index) == list_pieces(scores)
        assert f"by eq. 5 at \u03bb = {1000000}" in page.inner_text("#figures")
        assert "Precision and recall are of the 3 records with wrong_spans." in page.inner_text("#notes")
        page.click("#stored")
        assert read_figures(page) == describe(rows)


def test_the_slider_moves_the_threshold(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        steps = page.evaluate("THRESHOLDS")
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (1, 100)
        assert {1.05, 1.1, 1.2, 1.5, 2, 3, 10} <= set(steps)
        page.locator("#slider").evaluate("s => { s.value = findStep(3); s.dispatchEvent(new Event('input')); }")
        assert page.input_value("#threshold") == "3"
        assert read_figures(page) == describe([flag(scores, 3) for scores in rows])
        page.locator("#slider").press("ArrowRight")
        assert float(page.input_value("#threshold")) == steps[steps.index(3) + 1]
        page.keyboard.press("0")
        assert page.input_value("#threshold") == "1.1"
        assert page.evaluate("THRESHOLDS[document.getElementById('slider').value]") == 1.1


def test_the_curves_are_those_of_equation_5_and_can_be_pressed(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        page.wait_for_selector("#marker", state="attached")
        names = page.evaluate("[...document.querySelectorAll('#curves path')].map(e => e.getAttribute('class'))")
        assert sorted(names) == sorted(["curve precision", "curve recall", "curve share"] * 2)  # a line and its key
        points = page.evaluate("measureCurve(records, 0).map(p => [THRESHOLDS[p.step], p.precision, p.recall])")
        for threshold, precision, recall in points[::25]:
            expected = describe([flag(scores, threshold) for scores in rows])[2:]
            shown = "\u2013" if precision is None else f"{100 * precision:.1f}%"
            assert expected[0].startswith(f"precision {shown} (")
            assert expected[1].startswith(f"recall {100 * recall:.1f}% (")
        box = page.locator("#curves").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.999, box["y"] + box["height"] / 2)
        assert page.input_value("#threshold") == "100"
        assert read_figures(page) == describe([flag(scores, 100) for scores in rows])


def test_a_token_at_the_threshold_is_not_flagged(browser, tmp_path):
    scores = make_scores("x y", spans=[(0, 1), (2, 3), (3, 3)], token_ids=[1, 2, 3], tokens=["x", " y", ""])
    # -1 - -1.6931... is log 2 exactly where the difference is exact.
    scores = replace(scores, logps_without=[math.log(2) * -2, -3.0, -1.0], logps_with=[-math.log(2), -1.0, -1.0])
    scores = flag(scores, 1.1)
    assert scores.is_flagged == [True, True, False]
    with visit(browser, write(tmp_path, [scores])) as page:
        assert list_flagged(page, 0) == ["x", "y"]
        page.fill("#threshold", "2")
        assert list_flagged(page, 0) == ["y"]


def test_flags_that_a_person_edited_are_shown_first_and_can_be_returned_to(browser, tmp_path):
    rows = make_rows()
    flags = [False, True] + [False] * (len(rows[0].tokens) - 2)
    rows[0] = replace(rows[0], is_flagged=flags, weights=[0.25 * is_flagged for is_flagged in flags])
    with visit(browser, write(tmp_path, rows)) as page:
        assert list_flagged(page, 0) == list_pieces(rows[0])
        assert page.get_attribute("#stored", "aria-pressed") == "true"
        assert "1 record with other flags in the file than eq. 5 gives" in page.inner_text("#notes")
        page.select_option("#filter", "edited")
        assert page.locator("article").evaluate_all("all => all.map(e => e.dataset.index)") == ["0"]
        page.select_option("#filter", "all")
        page.fill("#threshold", "1.1")
        assert list_flagged(page, 0) == list_pieces(flag(rows[0], 1.1)) != list_pieces(rows[0])
        assert page.get_attribute("#stored", "aria-pressed") == "false"
        page.click("#stored")
        assert list_flagged(page, 0) == list_pieces(rows[0])


def test_scores_without_log_probs_keep_their_flags_and_say_so(browser, tmp_path):
    rows = make_rows()
    rows[2] = replace(rows[2], logps_without=None, logps_with=None)
    rows[1] = replace(rows[1], logps_with=None)
    with visit(browser, write(tmp_path, rows)) as page:
        page.fill("#threshold", "1000000")
        assert list_flagged(page, 2) == list_pieces(rows[2]) != []
        assert list_flagged(page, 0) == []
        curve = page.evaluate("measureCurve(records, 0).map(p => [THRESHOLDS[p.step], p.share, p.precision, p.recall])")
        for threshold, *shares in curve[::25]:
            page.fill("#threshold", str(threshold))
            shown = [f"{100 * share:.1f}%" for share in shares if share is not None]
            figures = read_figures(page)
            assert shown == re.findall(r"[\d.]+%", " ".join(figures)), f"the curves are those of the figures, {figures}"
        page.fill("#threshold", "1000000")
        assert "1 unsatisfactory record without log-probs in both contexts; their flags stay" in page.inner_text(
            "#notes"
        )
        page.locator("article[data-index='2'] .t").first.hover()
        assert page.inner_text("#tip").split("\n")[0].split("\t") == ["log p without", "\u2013"]


def test_a_satisfactory_record_with_praise_is_shaded_and_never_flagged(browser, tmp_path):
    scores = flag(make_scores(OUTPUTS[0], "Perfect!"), 1.1)
    assert scores.logps_with is not None
    with visit(browser, write(tmp_path, [scores])) as page:
        page.fill("#threshold", "1")
        assert list_flagged(page, 0) == []
        assert page.locator("article .p4, article .p3, article .p2").count() > 0


# ---- Figures of a token ----


def test_the_exact_figures_of_a_token_are_shown_on_hover_and_on_focus(browser, tmp_path):
    scores = make_scores("x y", spans=[(0, 1), (2, 3), (3, 3)], token_ids=[1, 2, 3], tokens=["x", " y", "<eos>"])
    record = scores.record.model_copy(update={"wrong_spans": ((0, 1),)})
    scores = replace(
        scores,
        record=record,
        logps_without=[-3.5, -0.00001, -1.0],
        logps_with=[-0.25, -2.5, -0.12345678],
        is_flagged=[True, False, False],
        weights=[0.7788, 0.0, 0.0],
    )
    expected = [
        "log p without\t-3.500000",
        "log p with\t-0.250000",
        "difference\t+3.250000",
        "times as likely\t25.7903",  # e^3.25
        "flagged\tyes",
        "weight\t0.7788",
        "marked as wrong\tyes",
    ]
    with visit(browser, write(tmp_path, [scores])) as page:
        assert not page.is_visible("#tip")
        page.hover("article .t >> nth=0")
        assert page.inner_text("#tip").split("\n") == expected
        page.hover("h1")
        assert not page.is_visible("#tip")
        page.keyboard.press("j")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#tip").split("\n") == expected
        assert page.locator(":focus").get_attribute("aria-describedby") == "tip"
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#tip").split("\n")[:3] == [
            "log p without\t-0.000010",
            "log p with\t-2.500000",
            "difference\t-2.499990",
        ]
        page.keyboard.press("ArrowRight")
        assert "log p with\t-0.12345678" in page.inner_text("#tip")  # as many digits as the file has
        page.fill("#threshold", "2")
        page.hover("article .t >> nth=2")
        assert "weight\t0.88386" in page.inner_text("#tip")  # e^-0.12345678, at gamma 1


# ---- Texts ----


@pytest.mark.parametrize("kind", ["bpe", "llama", "unigram"])
def test_texts_from_outside_are_text_to_the_letter(browser, tmp_path, kind):
    rows = []
    for text in NASTY:
        record = JudgedRecord(instruction=text, input=text, output=text, judgment=text)
        rows.append(replace(make_scores(text, kind=kind), record=record))
    path = tmp_path / "report.html"
    write_inspection(path, make_columns(['</script><script>alert("1")</script>'], [(row,) for row in rows]))
    with visit(browser, path, viewport={"width": 1100, "height": 4000}) as page:
        texts = "selector => [...document.querySelectorAll(selector)].map(e => e.textContent)"
        assert page.evaluate(texts, ".response") == list(NASTY)
        assert page.evaluate(texts, ".instruction") == [f"{text}\n{text}" for text in NASTY]
        assert page.evaluate(texts, ".judgment") == list(NASTY)
        assert page.locator("script").count() == 1
        assert page.evaluate("[...document.querySelectorAll('bdi.odd')].map(e => e.dataset.name)").count("U+202E") > 0
        assert 'alert("1")' in page.inner_text("#lead")


def test_the_bytes_of_an_emoji_are_one_piece_with_the_figures_of_each(browser, tmp_path):
    scores = make_scores("a \U0001f600 b", kind="llama")
    parts = [place for place, span in enumerate(scores.spans) if span == (2, 3)]
    assert len(parts) > 1
    with visit(browser, write(tmp_path, [scores])) as page:
        pieces = page.locator("article .t")
        token = pieces.filter(has_text="\U0001f600")
        assert token.count() == 1
        token.hover()
        assert page.inner_text("#tip").count("log p without") == len(parts)
        assert f"token 1 of {len(parts)} here" in page.inner_text("#tip")


def test_the_policy_allows_its_own_script_and_style_alone(browser, tmp_path):
    path = write(tmp_path, make_rows())
    text = path.read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]{44}'; script-src 'sha256-[\w+/=]{44}'; base-uri 'none';"
        r" form-action 'none'",
        policy[1],
    )
    assert not re.search(
        r"<[^>]* (on\w+|style|src|href)=", text.partition("<style>")[0] + text.partition("<body>")[2][:9000]
    )
    page = browser.new_page()
    try:
        page.goto(path.as_uri())
        blocked = page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
            " document.body.append(s); return window.hacked === undefined; }"
        )
        assert blocked
    finally:
        page.close()


# ---- Finding one's way ----


def test_records_are_searched_filtered_and_sorted(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        listed = "[...document.querySelectorAll('article')].map(e => Number(e.dataset.index))"
        page.fill("#query", "SYDNEY")
        assert page.evaluate(listed) == [0, 3]
        assert read_figures(page) == describe([rows[0], rows[3]])
        assert "2 of 5 records" in page.inner_text("#figures")
        page.fill("#query", "nowhere")
        assert page.is_visible("#nothing")
        page.fill("#query", "")
        page.select_option("#filter", "satisfactory")
        assert page.evaluate(listed) == [1]
        page.select_option("#filter", "unsatisfactory")
        assert page.evaluate(listed) == [0, 2, 3, 4]
        page.fill("#threshold", "1000000")
        page.select_option("#filter", "unflagged")
        assert page.evaluate(listed) == [0, 2, 3, 4]
        page.locator("#threshold").press("Tab")
        page.fill("#threshold", "1")
        page.locator("#threshold").blur()
        unflagged = [not scores.record.is_satisfactory and not any(flag(scores, 1).is_flagged) for scores in rows]
        assert page.evaluate(listed) == [index for index in range(5) if unflagged[index]]
        page.click("#stored")
        page.select_option("#filter", "all")
        for order, rate in {
            "flagged": lambda scores: sum(scores.is_flagged),
            "judgment": find_peak,
            "surprise": lambda scores: -sum(scores.logps_without) / len(scores.tokens),
        }.items():
            page.select_option("#order", order)
            assert page.evaluate(listed) == sorted(range(5), key=lambda index: -rate(rows[index]))


def find_peak(scores: TokenScores) -> float:
    if scores.logps_with is None or scores.logps_without is None:
        return -1.0
    return max(abs(judged - plain) for judged, plain in zip(scores.logps_with, scores.logps_without, strict=True))


def test_everything_can_be_done_by_keys(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        focus = "document.activeElement.dataset.index"
        press = page.keyboard.press
        for key, index in (("j", "0"), ("j", "1"), ("j", "2"), ("k", "1"), ("G", "4"), ("j", "4"), ("g", "0")):
            press(key)
            assert page.evaluate(focus) == index, key
        flagged = [(str(index), text) for index, row in enumerate(rows) for text in list_pieces(row)]
        seen = []
        for _ in flagged:
            press("n")
            seen.append(
                page.evaluate(
                    "[document.activeElement.closest('article').dataset.index, document.activeElement.textContent]"
                )
            )
        assert [tuple(pair) for pair in seen] == flagged
        press("p")
        assert page.evaluate("document.activeElement.textContent") == flagged[-2][1]
        press("/")
        page.keyboard.type("jk?")  # these are letters here
        assert page.input_value("#query") == "jk?"
        press("Escape")
        assert page.input_value("#query") == ""
        press("Escape")
        press("]")
        assert page.input_value("#threshold") != "1.1"
        press("0")
        assert page.input_value("#threshold") == "1.1"
        press("f")
        assert page.input_value("#filter") == "unsatisfactory"
        press("o")
        assert page.input_value("#order") == "flagged"
        press("?")
        assert page.is_visible("#keys")
        press("Escape")
        assert not page.is_visible("#keys")


def test_the_page_is_light_or_dark_as_the_system_is_and_by_a_switch(browser, tmp_path):
    path = write(tmp_path, make_rows())
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 251, 249)", "rgb(20, 23, 28)"
    with visit(browser, path) as page:
        assert page.evaluate(colour) == light
        page.click("#theme")
        assert page.evaluate(colour) == dark
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
        page.keyboard.press("t")
        assert page.evaluate(colour) == light
    with visit(browser, path, color_scheme="dark") as page:
        assert page.evaluate(colour) == dark
        page.click("#theme")
        assert page.evaluate(colour) == light


# Of what each selector finds: the contrast (WCAG) of its text, and of what stands before and after it, with its ground.
CONTRASTS = """selector => {
  const parse = (colour) => [...colour.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const findGround = (element) => {
    const [...own] = parse(getComputedStyle(element).backgroundColor);
    const below = own[3] < 1 && element.parentElement ? findGround(element.parentElement) : own;
    return own.slice(0, 3).map((part, place) => part * own[3] + below[place] * (1 - own[3]));
  };
  const rate = (colour) => {
    const scale = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const parts = colour.map((part) => scale(part / 255));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const compare = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  return [...document.querySelectorAll(selector)].flatMap((element) => {
    const ground = rate(findGround(element));
    const styles = [null, "::before", "::after"].map((part) => getComputedStyle(element, part));
    const line = compare(rate(parse(styles[0].textDecorationColor)), ground);
    return styles.map((style) => [compare(rate(parse(style.color)), ground), line]);
  });
}"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_can_be_read_on_the_strongest_shades(browser, tmp_path, colours):
    scores = make_scores("up\tto\nthis", "Wrong.")
    num = len(scores.tokens)
    strong = [5.0 * (-1) ** place for place in range(num)]  # in turn likelier and less likely by more than any shade
    scores = flag(replace(scores, logps_without=[-8.0] * num, logps_with=[-8.0 + change for change in strong]), 1.1)
    for path in (write(tmp_path, [scores]), write_plain(tmp_path, scores)):
        with visit(browser, path, color_scheme=colours) as page:
            page.wait_for_selector("article .p5")
            assert page.locator("article .n5").count() > 0
            found = page.evaluate(CONTRASTS, ":is(article, .legend) .t, :is(article, .legend) .t *")
            assert min(text for text, _ in found) >= 4.5
            lines = page.evaluate(CONTRASTS, "article :is(.flagged, mark)")
            assert min(line for _, line in lines) >= 3


def write_plain(folder: Path, scores: TokenScores) -> Path:
    """The page without a script, of the same style."""
    write_page(folder / "plain.html", "Title", [], [Example(scores)])
    return folder / "plain.html"


def test_nothing_is_told_by_colour_alone(browser, tmp_path):
    rows = make_rows()
    style = "e => { const s = getComputedStyle(e); return [s.textDecorationLine, s.textDecorationStyle,"
    style += " s.textDecorationThickness, s.borderTopStyle]; }"
    with visit(browser, write(tmp_path, rows)) as page:
        shown = page.locator("article .t").evaluate_all(f"all => all.map(e => [e.className, ({style})(e)])")
    lines = {"flagged": ["underline", "solid", "3px"], "less likely": ["underline", "dotted", "1px"]}
    seen = set()
    for name, (*line, top) in shown:
        classes = ["less likely" if part[0] == "n" else part for part in name.split()]
        expected = next((lines[kind] for kind in lines if kind in classes), None)
        assert line == expected or (expected is None and line[0] == "none"), name
        assert top == ("dotted" if "wrong" in classes else "none"), name
        seen |= set(classes)
    assert {"flagged", "wrong", "less likely"} <= seen


def test_a_file_of_any_threshold_opens_without_a_complaint(browser, tmp_path):
    rows = make_rows()
    rows = [
        replace(row, threshold=0.5, is_flagged=[find_ratio(row, place) > 0.5 for place in range(len(row.tokens))])
        for row in rows
    ]
    with visit(browser, write(tmp_path, rows)) as page:
        assert page.input_value("#threshold") == "0.5"
        assert page.locator("#threshold:invalid").count() == 0
        assert page.inner_text("#notes") == "Precision and recall are of the 3 records with wrong_spans."
        figures = read_figures(page)
        page.fill("#threshold", "0.25")
        assert page.locator("#threshold:invalid").count() == 1
        assert read_figures(page) == figures, "an invalid one changes nothing"
        page.fill("#threshold", "1")
        assert read_figures(page) == describe([flag(scores, 1) for scores in rows])


def find_ratio(scores: TokenScores, place: int) -> float:
    """How much likelier the judgment makes a token; 0 where nothing can be flagged."""
    if scores.record.is_satisfactory or scores.logps_with is None or scores.logps_without is None:
        return 0.0
    return math.exp(scores.logps_with[place] - scores.logps_without[place])


def test_dots_above_the_first_line_leave_room_for_its_name(browser, tmp_path):
    rows = [replace(row, record=row.record.model_copy(update={"wrong_spans": ((0, 9),)})) for row in make_rows()[:1]]
    with visit(browser, write(tmp_path, rows)) as page:
        top = page.locator("article .wrong").first.bounding_box()["y"]
        name = page.locator("article dt", has_text="Response").bounding_box()
        assert top >= name["y"] + name["height"] + 3


def test_a_narrow_window_needs_no_sideways_scrolling(browser, tmp_path):
    rows = make_rows()
    for files in ([rows], [rows, make_rows(9)]):
        path = write(tmp_path, *files, unpaired=(0, 0)[: 2 * (len(files) - 1)])
        with visit(browser, path, viewport={"width": 340, "height": 700}) as page:
            page.locator("article .flagged").first.hover()
            assert page.evaluate("document.documentElement.scrollWidth") <= 340
            tip = page.locator("#tip").evaluate("e => [e.scrollWidth, e.clientWidth]")
            assert tip[0] <= tip[1]


# ---- Size ----


def make_long(index: int, rng: random.Random) -> TokenScores:
    """A response of 400 tokens."""
    words = [f"word{rng.randrange(1000)}" for _ in range(399)]
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    output = " ".join(words)
    is_judged = index % 3 > 0
    columns: list[list[float]] = [[round(-rng.expovariate(1), 6) for _ in range(400)] for _ in range(2)]
    scores = make_scores(
        "x",
        "Wrong." if is_judged else None,
        record=JudgedRecord(instruction=f"Task {index}?", output=output, judgment="Wrong." if is_judged else None),
        token_ids=list(range(400)),
        tokens=[*words, "<eos>"],
        spans=[*spans, (len(output), len(output))],
        logps_without=columns[0],
        logps_with=columns[1] if is_judged else None,
    )
    scores = flag(scores, 1.1)
    return replace(scores, weights=[float(f"{weight:.6g}") for weight in scores.weights])  # as `cutlm blame` writes


# Scrolls by half a window in each frame, and gives the median time of a frame in milliseconds.
SCROLL = """async () => {
  const frames = [];
  for (let last = performance.now(); frames.length < 40; ) {
    scrollBy(0, 400);
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return frames.sort((a, b) => a - b)[20];
}"""


def test_a_thousand_long_responses_open_within_two_seconds_and_are_drawn_when_seen(browser, tmp_path):
    rng = random.Random(0)
    rows = [make_long(index, rng) for index in range(50)]
    data = make_columns(["scores.jsonl"], [(scores,) for scores in rows])
    data["records"] *= 20
    path = tmp_path / "report.html"
    assert write_inspection(path, data) < 14e6  # 35 bytes a token
    seconds = math.inf
    for _ in range(3):  # other work on the machine slows an opening down, and nothing makes one quicker
        with visit(browser, path) as page:
            page.wait_for_selector("article .t")
            seconds = min(seconds, page.evaluate("performance.now()") / 1000)
        if seconds < 2:
            break
    assert seconds < 2
    with visit(browser, path) as page:
        page.wait_for_selector("article .t")
        assert page.locator("article").count() == 1000
        assert 1 <= page.locator("article .response").count() < 12
        frame = page.evaluate(SCROLL) / 1000
        print(
            f"1000 responses of 400 tokens, {path.stat().st_size / 1e6:.1f} MB: drawn {seconds:.2f} s after the start,"
        )
        print(f"and a frame in {1000 * frame:.0f} ms while scrolling")
        assert frame < 0.1
        page.keyboard.press("G")
        last = page.locator("article[data-index='999']")
        assert last.locator(".response").evaluate("e => e.textContent") == rows[-1].record.output
        page.wait_for_function("document.querySelectorAll('article .response').length < 12")
        seconds = page.evaluate(
            "() => { const start = performance.now(); setThreshold(1.5); return (performance.now() - start) / 1000; }"
        )
        assert seconds < 0.5
        assert read_figures(page)[0].startswith(f"{20 * sum(sum(flag(row, 1.5).is_flagged) for row in rows):,} tokens")


# ---- Two models ----


def test_two_files_show_what_training_changed_token_by_token(browser, tmp_path):
    before, after = make_rows(), make_rows(50)
    with visit(browser, write(tmp_path, before, after, unpaired=(2, 1))) as page:
        assert "In one file alone, and not shown: 2 before, 1 after." in page.inner_text("#lead")
        assert read_figures(page, 0) == describe(before)
        assert read_figures(page, 1) == describe(after)
        article = page.locator("article[data-index='0']")
        assert article.locator(".response").count() == 3
        article.locator(".response").nth(2).locator(".t").nth(1).hover()
        rows = [line.split("\t") for line in page.inner_text("#tip").strip().split("\n")]
        assert [cell.strip() for cell in rows[0] if cell.strip()] == ["before", "after", "change"]
        old, new = (scores[0].logps_without[1] for scores in (before, after))  # type: ignore[index]
        assert [float(cell) for cell in rows[1][1:]] == pytest.approx([old, new, new - old], abs=1e-6)
        for line in rows[1:4]:
            assert all(re.fullmatch(r"[+-]?\d+\.\d{6}", cell) for cell in line[1:]), line
        assert page.locator(".paired").count() == 2
        classes = article.locator(".response >> nth=2 >> .t").evaluate_all("all => all.map(e => e.className)")
        levels = {kind: sum(bool(re.search(rf"\b{kind}\d", name)) for name in classes) for kind in "pn"}
        changes = [b - a for a, b in zip(before[0].logps_without, after[0].logps_without, strict=True)]  # type: ignore[arg-type]
        assert levels == {"p": sum(c >= 0.1 for c in changes), "n": sum(c <= -0.1 for c in changes)}
        page.select_option("#order", "training")
        assert page.locator("article").count() == 5


def test_other_tokens_are_shown_side_by_side_and_not_compared(browser, tmp_path):
    before = [make_scores(OUTPUTS[0])]
    after = [make_scores(OUTPUTS[0], kind="llama", logps_without=None)]
    with visit(browser, write(tmp_path, before, after, unpaired=(0, 0))) as page:
        page.wait_for_selector("article .t")
        assert page.locator("article .response").count() == 2
        assert "split into other tokens" in page.inner_text("article")
        page.locator("article .response").nth(1).locator(".t").nth(0).hover()
        assert page.inner_text("#tip").strip().split("\n")[0].strip() == "after"


def test_records_are_paired_by_what_they_say_and_how_often():
    rows = make_rows()
    first = [rows[0], rows[0], rows[1], rows[2]]
    second = [rows[2], replace(rows[0], detector="other"), rows[4], rows[3]]
    pairs, num_unpaired = pair_scores(first, second)
    assert pairs == [(rows[0], second[1]), (rows[2], rows[2])]
    assert num_unpaired == (2, 2)
    changed = replace(rows[0], record=rows[0].record.model_copy(update={"judgment": "Other."}))
    assert pair_scores([rows[0]], [changed]).num_unpaired == (1, 1)


# ---- The command ----


def run(*options: str) -> int:
    return main(["inspect", *options])


def test_the_command_makes_a_page_of_one_file_or_of_two(tmp_path, capsys):
    before, after = str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")
    write_token_scores(before, make_rows())
    write_token_scores(after, make_rows(50)[1:])
    page = tmp_path / "report.html"
    assert run("--scores", before, "--out", str(page)) == 0
    assert "report.html: 5 records, " in capsys.readouterr().out
    assert run("--scores", before, "--out", str(page)) == 2
    assert "report.html: exists; name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert run("--scores", before, "--scores", after, "--out", str(page), "--overwrite") == 0
    printed = capsys.readouterr()
    assert "report.html: 4 pairs of records, " in printed.out
    assert "before.jsonl: 1 records are not in the other file, and are left out" in printed.err
    content = re.search('<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"))
    assert content is not None
    data = json.loads(content[1])
    assert data["unpaired"] == [1, 0]
    assert data["records"][0]["sides"][0]["without"] == make_rows()[1].logps_without


def test_a_model_scores_records_first_and_leaves_the_scores_beside_the_page(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"instruction": "i", "output": o, "judgment": "Bad."}) + "\n" for o in OUTPUTS))
    page = tmp_path / "report.html"
    assert run("--model", str(model), "--data", str(data), "--out", str(page), "--threshold", "1.3") == 0
    printed = capsys.readouterr().out
    assert "5 records scored (0 satisfactory, 5 unsatisfactory)" in printed
    scores = read_token_scores(tmp_path / "report.scores.jsonl")
    assert {row.threshold for row in scores} == {1.3}
    assert page.read_text("utf-8") == render_inspection(
        make_columns(["report.scores.jsonl"], [(row,) for row in scores])
    )


def test_what_is_wrong_is_said_in_a_sentence(tmp_path, capsys):
    scores, out = str(tmp_path / "scores.jsonl"), str(tmp_path / "report.html")
    write_token_scores(scores, make_rows())
    other = tmp_path / "other.jsonl"
    write_token_scores(other, [make_scores("Something else.")])
    records = tmp_path / "records.jsonl"
    records.write_text('{"instruction": "i", "output": "o"}\n')
    for options, sentence in (
        ([], "expected --scores FILE, or --model MODEL and --data FILE; give the one or the other"),
        (["--model", "m"], "expected --scores FILE, or --model MODEL and --data FILE"),
        (["--scores", scores, "--data", "d"], "--scores: of no use with --model and --data"),
        (["--scores", scores] * 3, "--scores: expected one file or two, got 3"),
        (["--scores", scores, "--threshold", "2"], "--threshold: of use with --model alone, for the scores are there"),
        (["--scores", str(tmp_path / "none")], "none: no such file; check the path"),
        (["--scores", str(records)], "records.jsonl:1: field 'schema_version': expected 1, got no such field"),
        (
            ["--scores", scores, "--scores", str(other)],
            "got none with the same instruction, input, output and judgment",
        ),
        (["--scores", scores, "--out", scores], "expected a file of its own, got one of the inputs"),
        (["--model", "m", "--data", "d", "--out", ""], "--out '': expected a file to write, got a folder; name a file"),
        (["--scores", scores, "--out", "."], "--out .: expected a file to write, got a folder; name a file inside it"),
    ):
        assert run("--out", out, *options) == 2
        assert sentence in capsys.readouterr().err
    assert not Path(out).exists()


def test_help_and_a_page_of_scores_need_no_torch(tmp_path):
    write_token_scores(tmp_path / "s.jsonl", make_rows())
    code = "import sys; from cutlm.cli import main; {}; assert 'torch' not in sys.modules"
    for options in (["--scores", "s.jsonl", "--out", "r.html"],):
        call = f"main(['inspect', *{options!r}])"
        subprocess.run([sys.executable, "-c", code.format(call)], cwd=tmp_path, check=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cutlm", "inspect", "--help"], capture_output=True, text=True, check=True
    )
    assert "--scores" in done.stdout
    assert time.perf_counter() - started < 5
