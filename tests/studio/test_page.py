"""The studio in a real browser, without a model: reading, judging, saving, hostile texts, many responses."""

import json
import signal
from contextlib import ExitStack

import pytest
from commands import write_lines
from report_scores import NASTY
from studio_server import (
    browse,
    held_changes,
    make_rows,
    press,
    read_lines,
    running,
    send,
    started,
    wait_for_response,
    wait_until,
    wait_until_ready,
    wait_until_saved,
)

from cutlm.data.records import check_records

STATES = "[...document.querySelectorAll('#list li .state .unseen')].map(e => e.textContent)"


def test_from_responses_to_records_by_keyboard_alone(browser, tmp_path):
    responses, out = write_lines(tmp_path / "responses.jsonl", make_rows(5)), tmp_path / "records.jsonl"
    arguments = ["--responses", str(responses), "--out", str(out), "--reviewer", "ann", "--port", "0"]
    with started(arguments) as (process, url), browse(browser, url) as page:
        press(page, "w")
        page.keyboard.type("It is not City 0.")
        press(page, "Escape", "r", "ArrowRight", "Shift+ArrowLeft", "m")  # marks "City 0"
        press(page, "i", "Control+End", *["Backspace"] * len("think."))
        page.keyboard.type("know.")
        assert page.locator("#diff del").all_inner_texts() == ["think"]
        assert page.locator("#diff ins").all_inner_texts() == ["know"]
        press(page, "Control+Enter")
        wait_for_response(page, 2)
        press(page, "Escape", "s")
        wait_for_response(page, 3)
        press(page, "x")
        wait_for_response(page, 4)
        press(page, "w")
        page.keyboard.type("perfect, really")  # praise
        press(page, "Control+Enter")
        wait_for_response(page, 5)
        assert page.evaluate("document.activeElement.id") == "judgment"
        page.keyboard.type("Not finished")
        wait_until_saved(page)
        assert page.evaluate(STATES) == ["unsatisfactory", "satisfactory", "skipped", "satisfactory", "open"]
        assert "4 of 5 judged" in page.inner_text("#pace")
        press(page, "Escape", "k")  # leaving decides
        wait_for_response(page, 4)
        wait_until_saved(page)
        assert page.evaluate(STATES)[4] == "unsatisfactory"
        assert page.problems == []
        process.send_signal(signal.SIGINT)
        result = process.wait()
        assert result.exit_code == 0, result.stderr
        page.problems.clear()  # the browser logs requests that the stopped server did not answer
    rows = {row["instruction"]: row for row in read_lines(out)}
    assert [row["judgment"] for row in rows.values()] == ["It is not City 0.", None, None, "Not finished"]
    first = next(iter(rows.values()))
    assert (first["wrong_spans"], first["i_ans"]) == ([[0, 6]], "City 0 is the capital, I know.")
    assert all(row["reviewers"] == ["ann"] for row in rows.values())
    assert check_records(out).problems == []


def test_a_server_killed_between_keystrokes_loses_nothing(browser, tmp_path):
    responses, out = write_lines(tmp_path / "responses.jsonl", make_rows(2)), tmp_path / "records.jsonl"
    arguments = ["--responses", str(responses), "--out", str(out), "--reviewer", "ann", "--port"]
    with ExitStack() as stack:
        process, url = stack.enter_context(started([*arguments, "0"]))
        page = stack.enter_context(browse(browser, url))
        press(page, "w")
        page.keyboard.type("abc")
        wait_until_saved(page)
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = out.with_name("records.jsonl.studio") / "ann.jsonl"
        assert json.loads(journal.read_text("utf-8").splitlines()[-1])["judgment"] == "abc"
        with open(journal, "a", encoding="utf-8") as file:
            file.write('{"key": "cut off')  # what a kill within a write leaves
        page.keyboard.type("def")
        wait_until(page, "document.getElementById('saved').className === 'bad'")
        process, url = stack.enter_context(started([*arguments, url.split(":")[2].split("/")[0]]))
        with held_changes(page):  # the server sends what it has before what the browser kept reaches it
            page.goto(url)
            wait_until_ready(page)
            assert page.input_value("#judgment") == "abcdef"
        wait_until_saved(page)
        assert page.input_value("#judgment") == "abcdef"
        page.problems.clear()  # the browser logs requests that no server answered
        press(page, "w", "Control+Enter")
        wait_for_response(page, 2)
        wait_until_saved(page)
        process.send_signal(signal.SIGINT)
        assert process.wait().exit_code == 0
    assert [row["judgment"] for row in read_lines(out)] == ["abcdef"]


def test_what_is_not_saved_yet_is_shown_again(browser, tmp_path):
    with running(tmp_path, make_rows(2)) as server, browse(browser, server.access.url) as page:
        with held_changes(page):
            page.fill("#judgment", "The first")
            press(page, "Escape", "j")
            wait_for_response(page, 2)
            press(page, "k")
            wait_for_response(page, 1)
            assert page.input_value("#judgment") == "The first"
            page.keyboard.press("w")
            page.keyboard.type(" words")
        wait_until_saved(page)
        assert page.input_value("#judgment") == "The first words"
        assert server.studio.session.get_verdict(0).judgment == "The first words"


def test_tabs_keep_their_changes_apart_while_the_server_is_away(browser, tmp_path):
    with running(tmp_path, make_rows(3)) as server, browse(browser, server.access.url) as one:
        other = one.context.new_page()
        other.goto(server.access.url)
        wait_until_ready(other)
        press(other, "j")
        wait_for_response(other, 2)
        for page in (one, other):
            page.route("**/api/items/*", lambda route: route.abort())
        one.fill("#judgment", "From the first tab.")
        other.fill("#judgment", "From the second tab.")
        for page in (one, other):
            wait_until(page, "document.getElementById('saved').className === 'bad'")
        one.context.storage_state()
        for page in (one, other):
            page.close()
        page = one.context.new_page()
        page.goto(server.access.url)
        wait_until_ready(page)
        wait_until_saved(page)
        judgments = [server.studio.session.get_verdict(index).judgment for index in range(3)]
        assert judgments == ["From the first tab.", "From the second tab.", ""]
        assert page.evaluate("Object.keys(localStorage)") == []
        one.problems.clear()  # the browser logs the requests that were stopped


def test_two_tabs_never_overwrite_each_other(browser, tmp_path):
    with (
        running(tmp_path, make_rows(2)) as server,
        browse(browser, server.access.url) as one,
        browse(browser, server.access.url) as other,
    ):
        one.fill("#judgment", "From the first tab.")
        wait_until(other, "document.getElementById('judgment').value === 'From the first tab.'")
        # The other tab is away while the first one changes the verdict again.
        other.context.set_offline(True)
        other.fill("#judgment", "From the second tab.")
        one.fill("#judgment", "From the first tab again.")
        wait_until_saved(one)
        other.context.set_offline(False)
        other.wait_for_selector("#notice:not([hidden])")
        assert "From the first tab again." in other.inner_text("#notice")
        assert server.studio.session.get_verdict(0).judgment == "From the first tab again."
        other.click("text=Keep mine")
        wait_until(one, "document.getElementById('judgment').value === 'From the second tab.'")
        judgments = [
            row["judgment"]
            for row in read_lines(server.studio.session.out.with_name("records.jsonl.studio") / "ann.jsonl")
        ]
        assert {"From the first tab.", "From the first tab again.", "From the second tab."} <= {*judgments}
        other.problems.clear()  # the browser logs the requests that failed


def test_writing_before_the_choice_does_not_settle_a_conflict(browser, tmp_path):
    with running(tmp_path, make_rows(2)) as server, browse(browser, server.access.url) as page:
        verdict = {"state": "unsatisfactory", "judgment": "Theirs.", "revision": 0, "tab": "another"}
        page.route("**/api/events", lambda route: route.abort())
        with held_changes(page):
            page.focus("#judgment")
            page.keyboard.type("Mine")
            assert send(server.access, "PUT", "/api/items/0", verdict)[0] == 200
        page.wait_for_selector("#notice:not([hidden])")
        page.keyboard.type(" goes on.")
        wait_until_saved(page)
        press(page, "Escape", "j")
        wait_for_response(page, 2)
        press(page, "k")
        wait_for_response(page, 1)
        assert page.input_value("#judgment") == "Mine goes on."
        page.click("text=Use that")
        wait_until_saved(page)
        assert page.input_value("#judgment") == "Theirs."
        saved = server.studio.session.get_verdict(0)
        assert (saved.state, saved.judgment) == ("unsatisfactory", "Theirs.")
        page.problems.clear()  # the browser logs the refused request


def test_keys_before_the_next_response_has_come_change_neither(browser, tmp_path):
    held = []
    with running(tmp_path, make_rows(2)) as server, browse(browser, server.access.url) as page:
        page.route("**/api/items/1", lambda route: held.append(route))
        page.focus("#judgment")
        page.keyboard.type("Wrong.")
        press(page, "Control+Enter")
        wait_until(page, "document.querySelectorAll('#item-0 .bad').length === 1")
        page.keyboard.type("The")
        page.wait_for_timeout(50)
        held[0].continue_()
        page.unroute("**/api/items/1")
        wait_for_response(page, 2)
        page.keyboard.type("Next.")
        wait_until_saved(page)
        verdicts = [server.studio.session.get_verdict(index) for index in range(2)]
        assert [(verdict.state, verdict.judgment) for verdict in verdicts] == [
            ("unsatisfactory", "Wrong."),
            ("open", "Next."),
        ]


def test_a_long_text_of_any_script_is_saved(browser, tmp_path):
    text = "\u5b57" * 30_000  # more bytes than a browser sends for a page that is being closed
    with running(tmp_path, make_rows(1)) as server, browse(browser, server.access.url) as page:
        page.fill("#judgment", text)
        wait_until(page, "document.getElementById('saved').className !== 'saving'")
        wait_until_saved(page)
        assert server.studio.session.get_verdict(0).judgment == text


def test_two_reviewers_at_once(browser, tmp_path):
    rows = make_rows(3)
    with (
        running(tmp_path, rows) as ann,
        running(tmp_path, rows, reviewer="bob") as bob,
        browse(browser, ann.access.url) as one,
        browse(browser, bob.access.url) as other,
    ):
        for page, first in ((one, "Wrong city."), (other, "Not that city.")):
            press(page, "w")
            page.keyboard.type(first)
            press(page, "Escape", "r", *["ArrowRight"] * (page is other), "Shift+ArrowRight", "m")
            press(page, "Control+Enter")
            wait_for_response(page, 2)
        press(one, "s")
        wait_for_response(one, 3)
        press(one, "s")
        press(other, "s")
        wait_for_response(other, 3)
        press(other, "w")
        other.keyboard.type("Third is wrong.")
        press(other, "Control+Enter")
        wait_until_saved(one)
        wait_until_saved(other)
        assert [(row["judgment"], row["reviewers"]) for row in ann.read_records()] == [
            ("Wrong city.", ["ann"]),
            ("Not that city.", ["bob"]),
            (None, ["ann", "bob"]),
        ]
        (disputed,) = read_lines(ann.out.with_name("records.jsonl.disputed.jsonl"))
        assert [verdict["reviewers"] for verdict in disputed["verdicts"]] == [["ann"], ["bob"]]
        press(one, "Escape", "2")
        one.wait_for_selector("#summary-content table")
        cells = (
            one.locator("#summary-content table").nth(1).locator("tbody tr").first.locator("th, td").all_inner_texts()
        )
        # Marked: "City 0" and "0 is"; both have "0", of "City 0 is".
        assert cells == ["ann, bob", "3", "66.7% (2)", "11.1% (1 response)"]
        one.click("#summary-content p button")
        wait_for_response(one, 3)


def test_five_thousand_responses(browser, tmp_path):
    rows = make_rows(5000)
    rows[4321]["output"] = "A needle in the haystack."
    with running(tmp_path, rows) as server, browse(browser, server.access.url) as page:
        assert page.locator("#list li").count() == 5000
        press(page, "/")
        page.keyboard.type("NEEDLE")
        wait_until(page, "document.querySelectorAll('#list li').length === 1")
        page.click("#list li")
        wait_for_response(page, 4322)
        press(page, "s")
        wait_until_saved(page)
        page.fill("#query", "")
        wait_until(page, "document.querySelectorAll('#list li').length === 5000")
        page.select_option("#filter", "satisfactory")
        assert page.locator("#list li").count() == 1
        page.select_option("#filter", "open")
        assert page.locator("#list li").count() == 4999
        page.locator("#list li").last.click()
        wait_for_response(page, 5000)
        press(page, "Escape", "u")  # from the start again
        wait_for_response(page, 1)


def test_hostile_texts_stay_text(browser, tmp_path):
    texts = [*NASTY, "<img src=x onerror=alert(1)> " * 500, "</textarea></script><script>alert(2)</script>"]
    rows = [{"instruction": f"{text[:50]} q", "output": text} for text in texts]
    rows += [{"messages": [{"role": "system", "content": texts[1]}, {"role": "user", "content": texts[3]},
                           {"role": "assistant", "content": texts[5]}]}]  # fmt: skip
    with running(tmp_path, rows) as server, browse(browser, server.access.url) as page:
        for number, row in enumerate(rows, start=1):
            wait_for_response(page, number)
            output = row["output"] if "output" in row else row["messages"][-1]["content"]
            assert page.evaluate("document.querySelector('.response').textContent") == output
            assert page.locator("#sides :not(div, span, i, bdi)").count() == 0
            press(page, "Escape", "r", "Shift+ArrowRight", "m")
            page.fill("#judgment", row.get("instruction", texts[1]))
            page.focus("#judgment")
            press(page, "Control+Enter")
        wait_until_saved(page)
        records = server.read_records()
        assert [row["output"] for row in records] == [row.get("output", texts[5]) for row in rows]
        assert [row["output"][:30] for row in records if not row.get("wrong_spans")] == []
        press(page, "Escape", "2")
        page.wait_for_selector("#summary-content table")


def test_marks_by_mouse_are_characters_of_the_record(browser, tmp_path):
    rows = [{"instruction": "Hi.", "output": "Ein \U0001f600 Wort, noch ein \U0001f468\u200d\U0001f469 Wort."}]
    with running(tmp_path, rows) as server, browse(browser, server.access.url) as page:
        words = page.locator(".response .t")
        first, last = words.nth(4).bounding_box(), words.nth(5).bounding_box()  # "noch", "ein"
        page.mouse.move(first["x"] + 1, first["y"] + 5)
        page.mouse.down()
        page.mouse.move(last["x"] + last["width"] - 1, last["y"] + 5, steps=4)
        page.mouse.up()
        page.click("#mark:enabled")
        wait_until_saved(page)
        ((start, end),) = server.studio.session.get_verdict(0).wrong_spans
        assert rows[0]["output"][start:end] == "noch ein"
        assert page.locator(".response .wrong").all_inner_texts() == ["noch", "ein"]
        words.filter(has_text="noch").first.click()
        page.click("#unmark:enabled")
        wait_until_saved(page)
        assert server.studio.session.get_verdict(0).wrong_spans == ()


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_a_narrow_page_fits_and_every_control_has_a_name(browser, tmp_path, color_scheme):
    rows = [{"instruction": "x" * 300, "output": "y" * 500 + " z"}]
    with (
        running(tmp_path, rows) as server,
        browse(browser, server.access.url, width=400, color_scheme=color_scheme) as page,
    ):
        for view in ("judge", "summary", "train"):
            page.click(f"nav [data-view={view}]")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.click("nav [data-view=judge]")
        unnamed = page.evaluate(
            """[...document.querySelectorAll('button, input, select, textarea, [role=listbox], [role=group], svg')]
            .filter(e => !(e.labels?.length || e.ariaLabel || e.getAttribute('aria-label') || e.textContent.trim()))
            .map(e => e.outerHTML)"""
        )
        assert unnamed == []
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(20, 23, 28)") == (color_scheme == "dark")
