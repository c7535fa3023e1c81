"""The page of `cutlm inspect`, in a real browser: its figures are eq. 5's, texts are texts, and it asks for nothing."""

import math
import re
from dataclasses import replace

import pytest
from browser import open_browser, visit
from inspected_rows import OUTPUTS, describe, flag, list_flagged, list_pieces, make_rows, read_figures, write
from report_scores import NASTY, make_scores

from cutlm.blame.token_scores import TokenScores
from cutlm.data.records import JudgedRecord
from cutlm.inspect.columns import make_columns
from cutlm.inspect.inspection import write_inspection


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


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
