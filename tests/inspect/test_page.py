"""The token page in a real browser: flags and counts follow eq. 5, texts stay texts, every look works."""

import math
import random
import re
from dataclasses import replace

import pytest
from browser import visit
from inspected_rows import OUTPUTS, describe, flag, list_flagged, list_pieces, make_rows, read_figures, write
from report_scores import NASTY, make_scores

from cutlm.data.records import JudgedRecord
from cutlm.flagging.detector import FlagSettings, flag_response
from cutlm.flagging.report import Sensitivity
from cutlm.flagging.token_scores import TokenScores
from cutlm.inspect.page import PageRecord, Picture, Table, write_page

LISTED = "[...document.querySelectorAll('article')].map(e => Number(e.dataset.index))"
TEXTS = "selector => [...document.querySelectorAll(selector)].map(e => e.textContent)"


# ---- Flags and counts ----


def test_flags_and_counts_follow_the_threshold(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        assert read_figures(page) == describe(rows)
        for threshold in (1, 1.5, 40, 1e6):
            page.fill("#threshold", str(threshold))
            flagged = [flag(scores, threshold) for scores in rows]
            assert read_figures(page) == describe(flagged)
            for index, scores in enumerate(flagged):
                assert list_flagged(page, index) == list_pieces(scores)
        assert "by eq. 5 at \u03bb = 1000000" in page.inner_text("#figures")
        assert "the 3 records with wrong_spans." in page.inner_text("#notes")
        page.click("#stored")
        assert read_figures(page) == describe(rows)

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


def test_flags_take_surprise_into_account_and_leave_out_what_the_template_writes(browser, tmp_path):
    rows = []
    for scores in make_rows():
        num_own = len(scores.tokens)
        # The template's two tokens get more likely by the judgment than any other.
        changes = {name: [*([0] * 2), *getattr(scores, name)] for name in ("token_ids", "is_flagged", "weights")}
        changes |= {"tokens": ["<", ">", *scores.tokens], "spans": [(0, 0), (0, 0), *scores.spans]}
        changes |= {"logps_without": [-9.0, -9.0, *scores.logps_without], "surprise_weight": 0.5}
        changes["logps_with"] = scores.logps_with and [-0.1, -0.1, *scores.logps_with]
        changes["is_flagged"] = [False] * (num_own + 2)
        rows.append(replace(scores, **changes))

    def flag_at(scores, threshold):
        settings = FlagSettings(threshold, surprise_weight=0.5)
        if scores.record.is_satisfactory:
            return scores
        flags, weights = flag_response(scores.logps_without, scores.logps_with, settings, 2)
        return replace(scores, is_flagged=flags, weights=weights)

    rows = [flag_at(scores, 1.1) for scores in rows]
    with visit(browser, write(tmp_path, rows)) as page:
        assert page.evaluate("records.some((record) => record.sides[0].isEdited)") is False
        for threshold in (1, 3, 30):
            page.fill("#threshold", str(threshold))
            assert read_figures(page) == describe([flag_at(scores, threshold) for scores in rows])


def test_the_sensitivity_of_each_file_is_shown_and_noise_is_named_once(browser, tmp_path):
    good = Sensitivity(64, 0.1, 0.02, 0.8, 0.95)
    bad = Sensitivity(64, 0.15, 0.156, -0.04, 0.37)
    unflagged = Sensitivity(5, 0.0, 0.1, None, 0.2)
    rows = make_rows()
    for sensitivities in ([good], [bad], [unflagged], [None], [], [bad, unflagged], [None, good]):
        files = [rows] * max(1, len(sensitivities))
        with visit(browser, write(tmp_path, *files, sensitivities=sensitivities)) as page:
            known = [one for one in sensitivities if one]
            noisy = [one for one in known if one.describe_noise()]
            assert page.locator("#sensitivity").is_visible() == bool(known)
            lines = page.locator("#sensitivity p").all_inner_texts()
            assert len(lines) == len(known) + bool(noisy)
            for line, one in zip(lines, known, strict=False):
                signal = "undefined" if one.flag_signal is None else f"{one.flag_signal:.2f}".replace("-", "\u2212")
                assert all(text in line for text in (signal, f"{one.flagged_share_own:.1%}", f"{one.pairwise:.2f}"))
            if noisy:
                assert noisy[-1].describe_noise() in lines[-1]


def test_curves_agree_with_the_counts_and_can_be_clicked(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        page.wait_for_selector("#marker", state="attached")
        names = page.evaluate("[...document.querySelectorAll('#curves path')].map(e => e.getAttribute('class'))")
        assert sorted(names) == sorted(["curve precision", "curve recall", "curve share"] * 2)  # lines and legend
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


def test_a_token_exactly_at_the_threshold_is_not_flagged(browser, tmp_path):
    scores = make_scores("x y", spans=[(0, 1), (2, 3), (3, 3)], token_ids=[1, 2, 3], tokens=["x", " y", ""])
    # The log ratio of the first token is exactly log 2.
    scores = replace(scores, logps_without=[math.log(2) * -2, -3.0, -1.0], logps_with=[-math.log(2), -1.0, -1.0])
    scores = flag(scores, 1.1)
    assert scores.is_flagged == [True, True, False]
    with visit(browser, write(tmp_path, [scores])) as page:
        assert list_flagged(page, 0) == ["x", "y"]
        page.fill("#threshold", "2")
        assert list_flagged(page, 0) == ["y"]


def test_edited_flags_are_shown_first_and_can_be_restored(browser, tmp_path):
    rows = make_rows()
    flags = [False, True] + [False] * (len(rows[0].tokens) - 2)
    rows[0] = replace(rows[0], is_flagged=flags, weights=[0.25 * is_flagged for is_flagged in flags])
    with visit(browser, write(tmp_path, rows)) as page:
        assert list_flagged(page, 0) == list_pieces(rows[0])
        assert page.get_attribute("#stored", "aria-pressed") == "true"
        assert "1 record with stored flags that differ from eq. 5" in page.inner_text("#notes")
        page.select_option("#filter", "edited")
        assert page.evaluate(LISTED) == [0]
        page.select_option("#filter", "all")
        page.fill("#threshold", "1.1")
        assert list_flagged(page, 0) == list_pieces(flag(rows[0], 1.1)) != list_pieces(rows[0])
        assert page.get_attribute("#stored", "aria-pressed") == "false"
        page.click("#stored")
        assert list_flagged(page, 0) == list_pieces(rows[0])


def test_scores_without_log_probs_keep_their_flags(browser, tmp_path):
    rows = make_rows()
    rows[2] = replace(rows[2], logps_without=None, logps_with=None)
    rows[1] = replace(rows[1], logps_with=None)
    with visit(browser, write(tmp_path, rows)) as page:
        curve = page.evaluate("measureCurve(records, 0).map(p => [THRESHOLDS[p.step], p.share, p.precision, p.recall])")
        for threshold, *shares in curve[::50]:
            page.fill("#threshold", str(threshold))
            shown = [f"{100 * share:.1f}%" for share in shares if share is not None]
            figures = read_figures(page)
            assert shown == re.findall(r"[\d.]+%", " ".join(figures)), f"curves and counts agree: {figures}"
        page.fill("#threshold", "1000000")
        assert list_flagged(page, 2) == list_pieces(rows[2]) != []
        assert list_flagged(page, 0) == []
        assert "1 unsatisfactory record without log-probs in both contexts" in page.inner_text("#notes")
        page.locator("article[data-index='2'] .t").first.hover()
        assert page.inner_text("#tip").split("\n")[0].split("\t") == ["log p without", "\u2013"]


def test_a_satisfactory_record_with_praise_is_shaded_but_never_flagged(browser, tmp_path):
    scores = flag(make_scores(OUTPUTS[0], "Perfect!"), 1.1)
    assert scores.logps_with is not None
    with visit(browser, write(tmp_path, [scores])) as page:
        page.fill("#threshold", "1")
        assert list_flagged(page, 0) == []
        assert page.locator("article .p4, article .p3, article .p2").count() > 0
        assert not page.is_visible("#wrong-legend"), "no record has wrong_spans"


def test_a_threshold_below_1_in_the_file_is_valid(browser, tmp_path):
    rows = make_rows()
    rows = [
        replace(row, threshold=0.5, is_flagged=[find_ratio(row, index) > 0.5 for index in range(len(row.tokens))])
        for row in rows
    ]
    with visit(browser, write(tmp_path, rows)) as page:
        assert page.input_value("#threshold") == "0.5"
        assert page.locator("#threshold:invalid").count() == 0
        assert "differ from eq. 5" not in page.inner_text("#notes")
        figures = read_figures(page)
        page.fill("#threshold", "0.25")
        assert page.locator("#threshold:invalid").count() == 1
        assert read_figures(page) == figures, "an invalid threshold changes nothing"
        page.fill("#threshold", "1")
        assert read_figures(page) == describe([flag(scores, 1) for scores in rows])


def find_ratio(scores: TokenScores, index: int) -> float:
    """How much more likely the judgment makes a token; 0 if it cannot be flagged."""
    if scores.record.is_satisfactory or scores.logps_with is None or scores.logps_without is None:
        return 0.0
    return math.exp(scores.logps_with[index] - scores.logps_without[index])


# ---- Numbers of a token ----


def test_exact_numbers_of_a_token_on_hover_and_focus(browser, tmp_path):
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
        "annotated as wrong\tyes",
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
        assert "log p with\t-0.12345678" in page.inner_text("#tip"), "as many digits as the file has"
        page.fill("#threshold", "2")
        page.hover("article .t >> nth=2")
        assert "weight\t0.88386" in page.inner_text("#tip")  # e^-0.12345678, with gamma 1


def test_the_bytes_of_an_emoji_are_one_piece_with_the_numbers_of_each(browser, tmp_path):
    scores = make_scores("a \U0001f600 b", kind="llama")
    parts = [index for index, span in enumerate(scores.spans) if span == (2, 3)]
    assert len(parts) > 1
    with visit(browser, write(tmp_path, [scores])) as page:
        token = page.locator("article .t").filter(has_text="\U0001f600")
        assert token.count() == 1
        token.hover()
        assert page.inner_text("#tip").count("log p without") == len(parts)
        assert f"token 1 of {len(parts)} here" in page.inner_text("#tip")


# ---- Texts and security ----


def test_texts_from_outside_are_never_markup(browser, tmp_path):
    records = []
    for index, text in enumerate(NASTY):
        record = JudgedRecord(instruction=text, input=text, output=text, judgment=text)
        kind = ("bpe", "llama", "unigram")[index % 3]
        records.append(PageRecord((replace(make_scores(text, kind=kind), record=record),), text, text, text))
    path = tmp_path / "report.html"
    sections = [*(Table(text, [text, text], [[text, text]]) for text in NASTY), Picture(b"", None, NASTY[1])]
    names = ['</script><script>alert("1")</script>']
    write_page(path, records, title=NASTY[1], lead=NASTY, sections=sections, names=names)
    with visit(browser, path, height=9000) as page:
        page.wait_for_function("document.querySelectorAll('.response').length === " + str(len(NASTY)))
        for selector in (".response", ".judgment", ".answer", "caption", "#lead p", "#sections td"):
            assert page.evaluate(TEXTS, selector) == list(NASTY), selector
        assert page.evaluate(TEXTS, ".instruction") == [f"{text}\n{text}" for text in NASTY]
        assert page.evaluate(TEXTS, ".verdict") == [f"\u2717 {text}" for text in NASTY]
        assert page.evaluate(TEXTS, "h1") == [NASTY[1]]
        assert page.evaluate("document.images[0].alt") == NASTY[1]
        assert page.locator("script").count() == 1
        odd = page.evaluate("[...document.querySelectorAll('bdi.odd')].map(e => e.dataset.name)")
        assert {"U+202E", "U+001B", "CR", "\u21e5"} <= set(odd)
        assert 'alert("1")' in page.inner_text("#counts")


def test_invisible_characters_are_named(browser, tmp_path):
    with visit(browser, write(tmp_path, make_rows())) as page:
        show = "text => appendText(make('p', ''), text).innerHTML"
        assert page.evaluate(show, "one two \U0001f468\u200d\U0001f469") == "one two \U0001f468\u200d\U0001f469"
        shown = page.evaluate(show, "a\u202eb  c\n")
        assert '<bdi class="odd" data-name="U+202E">\u202e</bdi>' in shown
        assert shown.count('<i class="space"> </i>') == 2
        assert '<i class="line">\n</i>' in shown


def test_policy_allows_only_the_page_s_own_script_and_style(browser, tmp_path):
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
        assert page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
            " document.body.append(s); return window.hacked === undefined; }"
        )
    finally:
        page.close()


# ---- Navigation ----


def test_search_filters_and_orders(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        page.fill("#query", "SYDNEY")
        assert page.evaluate(LISTED) == [0, 3]
        assert read_figures(page) == describe([rows[0], rows[3]])
        assert "2 of 5 records" in page.inner_text("#figures")
        page.fill("#query", "nowhere")
        assert page.is_visible("#nothing")
        page.fill("#query", "")
        page.select_option("#filter", "satisfactory")
        assert page.evaluate(LISTED) == [1]
        page.select_option("#filter", "unsatisfactory")
        assert page.evaluate(LISTED) == [0, 2, 3, 4]
        page.fill("#threshold", "1000000")
        page.select_option("#filter", "unflagged")
        assert page.evaluate(LISTED) == [0, 2, 3, 4]
        page.locator("#threshold").press("Tab")
        page.fill("#threshold", "1")
        page.locator("#threshold").blur()
        unflagged = [not scores.record.is_satisfactory and not any(flag(scores, 1).is_flagged) for scores in rows]
        assert page.evaluate(LISTED) == [index for index in range(5) if unflagged[index]]
        page.click("#stored")
        page.select_option("#filter", "all")
        for order, rate in {
            "flagged": lambda scores: sum(scores.is_flagged),
            "judgment": find_peak,
            "surprise": lambda scores: -sum(scores.logps_without) / len(scores.tokens),
        }.items():
            page.select_option("#order", order)
            assert page.evaluate(LISTED) == sorted(range(5), key=lambda index: -rate(rows[index]))


def find_peak(scores: TokenScores) -> float:
    if scores.logps_with is None or scores.logps_without is None:
        return -1.0
    return max(abs(judged - plain) for judged, plain in zip(scores.logps_with, scores.logps_without, strict=True))


def test_keyboard_shortcuts(browser, tmp_path):
    rows = make_rows()
    with visit(browser, write(tmp_path, rows)) as page:
        press = page.keyboard.press
        for key, index in (("j", "0"), ("j", "1"), ("j", "2"), ("k", "1"), ("G", "4"), ("j", "4"), ("g", "0")):
            press(key)
            assert page.evaluate("document.activeElement.dataset.index") == index, key
        flagged = [[str(index), text] for index, row in enumerate(rows) for text in list_pieces(row)]
        focus = "[document.activeElement.closest('article').dataset.index, document.activeElement.textContent]"
        seen = []
        for _ in flagged:
            press("n")
            seen.append(page.evaluate(focus))
        assert seen == flagged
        press("p")
        assert page.evaluate(focus) == flagged[-2]
        press("/")
        page.keyboard.type("jk?")  # in the search field these are just letters
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


# ---- Two models, sections, groups ----


def test_two_files_are_compared_token_by_token(browser, tmp_path):
    before, after = make_rows(), make_rows(50)
    with visit(browser, write(tmp_path, before, after, unpaired=(2, 1))) as page:
        assert "only one file has them: 2 before, 1 after" in page.inner_text("#counts")
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


def test_different_tokens_are_shown_but_not_compared(browser, tmp_path):
    before = [make_scores(OUTPUTS[0])]
    after = [make_scores(OUTPUTS[0], kind="llama", logps_without=None)]
    with visit(browser, write(tmp_path, before, after, unpaired=(0, 0))) as page:
        page.wait_for_selector("article .t")
        assert page.locator("article .response").count() == 2
        assert "different tokens" in page.inner_text("article")
        page.locator("article .response").nth(1).locator(".t").nth(0).hover()
        assert page.inner_text("#tip").strip().split("\n")[0].strip() == "after"


def test_sections_groups_and_new_answers(browser, tmp_path):
    rows = make_rows()
    answers = [("Fixed.", None), ("Still bad.", "It is wrong."), (None, None), ("x", None), ("y", None)]
    groups = ["one", "two", "two", "one", ""]
    records = [PageRecord((row,), group, *answer) for row, group, answer in zip(rows, groups, answers, strict=True)]
    path = tmp_path / "page.html"
    sections = [Table("Caption", ["", "a"], [["x", "1%"], ["mean", "2%"]]), Picture(b"light", b"dark", "alt")]
    write_page(path, records, title="Title", lead=["First.", "Second."], sections=sections)
    with visit(browser, path, height=2500) as page:
        texts = page.evaluate(TEXTS, "h1, #lead p, caption, #sections td")
        assert texts == ["Title", "First.", "Second.", "Caption", "1%", "2%"]
        light = page.get_attribute("#sections img", "src")
        page.click("#theme")
        assert page.get_attribute("#sections img", "src") != light
        page.wait_for_selector("article[data-index='4'] dd")
        assert page.evaluate(TEXTS, ".answer") == ["Fixed.", "Still bad.", "x", "y"]
        assert page.evaluate(TEXTS, ".verdict.bad") == ["\u2717 It is wrong."]
        page.select_option("#filter", label="two")
        assert page.evaluate(LISTED) == [1, 2]
    write_page(path, [], title="Title", sections=sections[:1])
    with visit(browser, path) as page:
        assert page.is_visible("caption")
        assert not page.is_visible("#query"), "no records, no controls"


# ---- Looks ----


def test_light_and_dark_follow_the_system_and_the_switch(browser, tmp_path):
    path = write(tmp_path, make_rows())
    color = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 251, 249)", "rgb(20, 23, 28)"
    with visit(browser, path) as page:
        assert page.evaluate(color) == light
        page.click("#theme")
        assert page.evaluate(color) == dark
        page.keyboard.press("t")
        assert page.evaluate(color) == light
    with visit(browser, path, color_scheme="dark") as page:
        assert page.evaluate(color) == dark
        page.click("#theme")
        assert page.evaluate(color) == light


# For all matching elements: the contrast (WCAG) of text, ::before and ::after, and of underlines, to the background.
CONTRASTS = """selector => {
  const parse = (color) => {
    const parts = [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
    return color.startsWith("color(") ? [...parts.slice(0, 3).map((part) => 255 * part), parts[3]] : parts;
  };
  const findBackground = (element) => {
    const [...own] = parse(getComputedStyle(element).backgroundColor);
    const below = own[3] < 1 && element.parentElement ? findBackground(element.parentElement) : own;
    return own.slice(0, 3).map((part, index) => part * own[3] + below[index] * (1 - own[3]));
  };
  const rate = (color) => {
    const scale = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const parts = color.map((part) => scale(part / 255));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const compare = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  return [...document.querySelectorAll(selector)].flatMap((element) => {
    const background = rate(findBackground(element));
    const styles = [null, "::before", "::after"].map((part) => getComputedStyle(element, part));
    const line = compare(rate(parse(styles[0].textDecorationColor)), background);
    return styles.map((style) => [compare(rate(parse(style.color)), background), line]);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_the_strongest_shades(browser, tmp_path, scheme):
    scores = make_scores("up\tto\nthis", "Wrong.")
    num = len(scores.tokens)
    strong = [5.0 * (-1) ** index for index in range(num)]  # alternately more and less likely, beyond every shade
    scores = flag(replace(scores, logps_without=[-8.0] * num, logps_with=[-8.0 + change for change in strong]), 1.1)
    with visit(browser, write(tmp_path, [scores]), color_scheme=scheme) as page:
        page.wait_for_selector("article .p5")
        assert page.locator("article .n5").count() > 0
        found = page.evaluate(CONTRASTS, ":is(article, .legend) .t, :is(article, .legend) .t *")
        assert min(text for text, _ in found) >= 4.5
        assert max(text for text, _ in found) < 21
        lines = page.evaluate(CONTRASTS, "article .flagged")
        assert min(line for _, line in lines) >= 3


def test_nothing_depends_on_color_alone(browser, tmp_path):
    style = "e => { const s = getComputedStyle(e); return [s.textDecorationLine, s.textDecorationStyle,"
    style += " s.textDecorationThickness, s.borderTopStyle]; }"
    rows = make_rows()
    rows[0] = replace(rows[0], record=rows[0].record.model_copy(update={"wrong_spans": ((0, 9),)}))
    with visit(browser, write(tmp_path, rows)) as page:
        shown = page.locator("article .t").evaluate_all(f"all => all.map(e => [e.className, ({style})(e)])")
        top = page.locator("article .wrong").first.bounding_box()["y"]
        label = page.locator("article dt", has_text="Response").first.bounding_box()
        assert top >= label["y"] + label["height"] + 3, "the dots leave room for the label above"
    lines = {"flagged": ["underline", "solid", "3px"], "less likely": ["underline", "dotted", "1px"]}
    seen = set()
    for name, (*line, border) in shown:
        classes = ["less likely" if part[0] == "n" else part for part in name.split()]
        expected = next((lines[kind] for kind in lines if kind in classes), None)
        assert line == expected or (expected is None and line[0] == "none"), name
        assert border == ("dotted" if "wrong" in classes else "none"), name
        seen |= set(classes)
    assert {"flagged", "wrong", "less likely"} <= seen


def test_a_narrow_window_does_not_scroll_sideways(browser, tmp_path):
    rows = make_rows()
    for files in ([rows], [rows, make_rows(9)]):
        path = write(tmp_path, *files, unpaired=(0, 0)[: 2 * (len(files) - 1)])
        with visit(browser, path, width=340, height=700) as page:
            page.locator("article .flagged").first.hover()
            assert page.evaluate("document.documentElement.scrollWidth") <= 340
            tip = page.locator("#tip").evaluate("e => [e.scrollWidth, e.clientWidth]")
            assert tip[0] <= tip[1]


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
    return replace(scores, weights=[float(f"{weight:.6g}") for weight in scores.weights])  # as `cutlm blame` does


# Scrolls half a window per frame and returns the median time of a frame in milliseconds.
SCROLL = """async () => {
  const frames = [];
  for (let last = performance.now(); frames.length < 20; ) {
    scrollBy(0, 400);
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return frames.sort((a, b) => a - b)[10];
}"""


def test_a_thousand_long_responses_are_small_and_drawn_only_near_the_window(browser, tmp_path):
    rng = random.Random(0)
    rows = [make_long(index, rng) for index in range(10)]
    path = tmp_path / "report.html"
    size = write_page(path, [PageRecord((scores,)) for scores in rows] * 100)
    assert size < 14e6, "35 bytes per token"
    with visit(browser, path) as page:
        page.wait_for_selector("article .t")
        opened = page.evaluate("performance.now()") / 1000
        assert page.locator("article").count() == 1000
        assert 1 <= page.locator("article .response").count() < 12
        print(f"1000 responses of 400 tokens, {size / 1e6:.1f} MB: first records after {opened:.2f} s,")
        print(f"{page.evaluate(SCROLL):.0f} ms per frame while scrolling")
        page.keyboard.press("G")
        last = page.locator("article[data-index='999']")
        assert last.locator(".response").evaluate("e => e.textContent") == rows[-1].record.output
        page.wait_for_function("document.querySelectorAll('article .response').length < 12")
        page.evaluate("setThreshold(1.5)")
        num_flagged = 100 * sum(sum(flag(row, 1.5).is_flagged) for row in rows)
        assert read_figures(page)[0].startswith(f"{num_flagged:,} tokens")
