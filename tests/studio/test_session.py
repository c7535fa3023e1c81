"""Journals, the merging of reviewers, and the review of records."""

import json
import os
import signal
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from commands import write_lines
from report_scores import make_scores
from studio_server import make_rows, read_lines, send, started

from cutlm.cli import main
from cutlm.data.records import JudgedRecord, check_records
from cutlm.errors import DataError, UserError
from cutlm.flagging.token_scores import write_token_scores
from cutlm.studio.items import Draft, read_items
from cutlm.studio.journal import Journal, Verdict, name_journal, read_journals
from cutlm.studio.merge import compare_reviewers, merge_verdicts
from cutlm.studio.security import Access
from cutlm.studio.session import Change, Session
from cutlm.training.run import load_data


def read(folder, rows, *, is_reviewing=False):
    path = write_lines(folder / "read.jsonl", rows)
    return read_items(*((None, [path]) if is_reviewing else ([path], None)))[0]


def change(state, revision=0, **values):
    return Change.model_validate({"state": state, "revision": revision, "tab": "test", **values})


def test_a_journal_keeps_the_last_verdict_and_drops_an_incomplete_line(tmp_path):
    path = name_journal(tmp_path / "out.jsonl", "ann")
    with Journal(path) as journal:
        journal.append("a", Verdict("open", "One"))
        saved = journal.append("a", Verdict("unsatisfactory", "One two", ((0, 3),), ((4, 5),), "Better."))
        journal.append("b", Verdict("satisfactory"))
    assert (saved.revision, saved.time > 0) == (2, True)
    for end in ('{"key": "b", "sta', '{"key": "b"}'):  # without a line end neither was reported as saved
        with open(path, "a", encoding="utf-8") as file:
            file.write(end)
        assert read_journals(tmp_path / "out.jsonl")["ann"]["a"] == saved
        with Journal(path) as journal:
            assert journal.verdicts["a"] == saved
            assert journal.verdicts["b"].state == "satisfactory"
        assert path.read_text("utf-8").endswith("}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_records_are_written_when_the_studio_is_stopped(tmp_path, number):
    responses, out = write_lines(tmp_path / "responses.jsonl", make_rows(2)), tmp_path / "records.jsonl"
    arguments = ["--responses", str(responses), "--out", str(out), "--reviewer", "ann", "--port", "0"]
    with started(arguments) as (process, url):
        address = urlsplit(url)
        access = Access("127.0.0.1", address.port, token=address.query.removeprefix("token="))
        verdict = {"state": "satisfactory", "revision": 0, "tab": "test"}
        status = None
        while status is None:
            with suppress(ConnectionRefusedError):  # the address is printed a moment before the server answers
                status = send(access, "PUT", "/api/items/0", verdict)[0]
        assert status == 200
        process.send_signal(number)
        assert process.wait().exit_code == 0
    assert [row["judgment"] for row in read_lines(out)] == [None]


def test_drafts_may_come_while_the_work_is_summarized(tmp_path):
    items = read(tmp_path, make_rows(3))
    with Journal(name_journal(tmp_path / "out.jsonl", "ann")) as journal:
        session = Session(items, tmp_path / "out.jsonl", journal)
        session.drafts[0] = Draft("Wrong.")

        def draft_and_get(index):
            session.drafts[index + 1] = Draft("Wrong.")
            return Verdict()

        session.get_verdict = draft_and_get
        assert session.summarize()["num_drafts"] == 4


def test_a_damaged_journal_is_named_and_kept(tmp_path):
    path = name_journal(tmp_path / "out.jsonl", "ann")
    path.parent.mkdir()
    for line in ("nonsense", '{"key": "a", "state": "other"}', '{"state": "open"}', "[]"):
        path.write_text(f"{line}\n")
        with pytest.raises(DataError, match=r"ann\.jsonl:1"), Journal(path):
            pass
        assert path.read_text() == f"{line}\n"


def test_a_journal_has_one_writer(tmp_path):
    path = name_journal(tmp_path / "out.jsonl", "ann")
    with Journal(path), pytest.raises(UserError, match="another cutlm studio"), Journal(path):
        pass
    with Journal(path):
        pass


def test_a_long_journal_is_compacted_when_it_is_opened(tmp_path):
    path = name_journal(tmp_path / "out.jsonl", "ann")
    with Journal(path) as journal:
        for number in range(12):
            journal.append("a", Verdict("open", f"{number} " * 50_000))
        last = journal.append("a", Verdict("satisfactory"))
    assert path.stat().st_size > 2**20
    with Journal(path) as journal:
        assert journal.verdicts == {"a": last}
        journal.append("b", Verdict())
    assert len(path.read_text("utf-8").splitlines()) == 2


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = name_journal(tmp_path / "out.jsonl", "ann")
    with Journal(path) as journal:
        saved = journal.append("a", Verdict("satisfactory"))
        before = path.read_bytes()

        def fail(handle):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="No space"):
                journal.append("a", Verdict("unsatisfactory", "No."))
        assert path.read_bytes() == before
        assert journal.verdicts["a"] == saved
        assert journal.append("a", Verdict("skipped")).revision == 2
    assert len(path.read_text("utf-8").splitlines()) == 2


def test_reviewers_are_merged(tmp_path):
    items = read(tmp_path, make_rows(5))
    keys = [item.key for item in items]
    verdicts = {
        "ann": {
            keys[0]: Verdict("unsatisfactory", "Wrong.", ((0, 4),), i_ans="Right."),
            keys[1]: Verdict("satisfactory", "a left-over text"),
            keys[2]: Verdict("satisfactory"),
            keys[3]: Verdict("unsatisfactory", "Twice."),
            keys[4]: Verdict("open", "Not decided"),
        },
        "bob": {
            keys[0]: Verdict("unsatisfactory", "Not right.", ((2, 6),)),
            keys[1]: Verdict("satisfactory"),
            keys[2]: Verdict("unsatisfactory", "Wrong."),
            keys[3]: Verdict("unsatisfactory", "Twice."),
            keys[4]: Verdict("skipped"),
        },
        "cay": {},
    }
    merged = merge_verdicts(items, verdicts)
    assert [(row["judgment"], row["reviewers"]) for row in merged.rows] == [
        ("Wrong.", ["ann"]),
        ("Not right.", ["bob"]),
        (None, ["ann", "bob"]),
        ("Twice.", ["ann", "bob"]),
    ]
    assert (merged.rows[0]["wrong_spans"], merged.rows[0]["i_ans"]) == ([[0, 4]], "Right.")
    assert [row["output"] for row in merged.disputed] == [items[2].output]
    assert check_records(write_lines(tmp_path / "merged.jsonl", merged.rows)).problems == []
    (agreement,) = compare_reviewers(items, verdicts)
    assert (agreement.reviewers, agreement.num_both, agreement.num_equal) == (("ann", "bob"), 4, 3)
    assert (agreement.num_marked, agreement.span_overlap, agreement.disputed) == (1, 2 / 6, [2])


def test_the_same_response_twice_has_two_verdicts(tmp_path):
    items = read(tmp_path, [*make_rows(1), *make_rows(1)])
    assert len({item.key for item in items}) == 2


def test_reviewed_records_replace_the_old_judgment(tmp_path):
    rows = [
        make_rows(3)[0] | {"judgment": "Old.", "score": 3, "wrong_spans": [[0, 1]], "source": "x"},
        make_rows(3)[1] | {"judgment": "Kept.", "score": 2},
        make_rows(3)[2] | {"judgment": None, "score": 9},
    ]
    out = tmp_path / "out.jsonl"
    items = read(tmp_path, rows, is_reviewing=True)
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        assert session.drafts[0].judgment == "Old."
        session.save(0, change("unsatisfactory", judgment="New."))
        session.save(1, change("unsatisfactory", judgment="Kept."))
        session.save(2, change("unsatisfactory", judgment="A fault after all."))
        assert session.list_judgments() == {0: "New.", 1: "Kept.", 2: "A fault after all."}
    first, second, third = read_lines(out)
    assert (first["judgment"], first["source"], first.get("score"), first.get("wrong_spans")) == (
        "New.",
        "x",
        None,
        None,
    )
    assert second["score"] == 2  # the judgment that it belongs to is the same
    assert "score" not in third  # it would make the record satisfactory
    assert check_records(out).num_unsatisfactory == 3


def test_an_objection_that_is_confirmed_counts_whatever_the_score_was(tmp_path):
    rows = [
        make_rows(2)[0] | {"judgment": "It is wrong.", "score": 8},
        make_rows(2)[1] | {"judgment": None, "score": 8},
    ]
    out = tmp_path / "out.jsonl"
    items = read(tmp_path, rows, is_reviewing=True)
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        session.save(0, change("unsatisfactory", judgment="It is wrong."))
        session.save(1, change("satisfactory"))
    assert [record.is_satisfactory for record in check_records(out).records] == [False, True]
    assert [row.get("score") for row in read_lines(out)] == [None, 8]


def test_reviewed_token_scores_become_records_without_the_flags_of_the_old_judgment(tmp_path):
    path, out = tmp_path / "scores.jsonl", tmp_path / "out.jsonl"
    write_token_scores(path, [make_scores("One two."), make_scores("Three.")])
    items, _ = read_items(None, [path])
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        session.save(0, change("unsatisfactory", judgment="New."))
        session.save(1, change("satisfactory"))
    data = load_data([str(out)])
    assert [type(row) for row in data.rows] == [JudgedRecord, JudgedRecord]
    assert [set(row) for row in read_lines(out)] == [{"instruction", "output", "judgment", "reviewers"}] * 2


def test_a_withdrawn_verdict_leaves_no_record(tmp_path):
    out = tmp_path / "out.jsonl"
    items = read(tmp_path, make_rows(1))
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        session.save(0, change("satisfactory"))
        session.write()
        assert len(read_lines(out)) == 1
        session.save(0, change("open", revision=1))
    assert not out.exists()


def test_verdicts_on_other_responses_are_not_dropped(tmp_path):
    out = tmp_path / "out.jsonl"
    items = read(tmp_path, make_rows(2))
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        session.save(1, change("satisfactory"))
    arguments = ["studio", "--responses", str(write_lines(tmp_path / "one.jsonl", make_rows(1))), "--out", str(out)]
    assert main([*arguments, "--reviewer", "bob"]) == 2
    assert len(read_lines(out)) == 1


def test_conversations_are_kept(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
    ]
    out = tmp_path / "out.jsonl"
    items = read(tmp_path, [{"messages": messages}])
    with Journal(name_journal(out, "ann")) as journal, Session(items, out, journal) as session:
        session.save(0, change("unsatisfactory", judgment="Too brief."))
    (row,) = read_lines(out)
    assert row["messages"] == messages
    (record,) = check_records(out).records
    assert (record.judgment, record.output, len(record.conversation.messages)) == ("Too brief.", "Hello.", 2)
    assert json.dumps(row)
