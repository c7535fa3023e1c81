"""Who may use the studio: requests without the token, from other pages or to other names are refused."""

import json

import pytest
from studio_server import make_rows, read_lines, running, send

from cutlm.cli import main

CHANGE = {"state": "unsatisfactory", "judgment": "No.", "revision": 0, "tab": "test"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("studio"), make_rows(2)) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/", "/?token=wrong", "/?token=", "/static/app.js", "/api/session", "/api/items/0", "/api/events"]
)
def test_without_the_token_nothing_is_shown(server, path):
    for headers in ({}, {"Cookie": f"{server.access.cookie}=wrong"}, {"Authorization": "Bearer x"}):
        status, content, _ = send(server.access, "GET", path, headers=headers, is_own=False)
        assert status == 403
        assert "country" not in str(content)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
    ],
)
def test_changes_from_other_pages_and_names_are_refused(server, headers):
    for method, path, body in (
        ("PUT", "/api/items/0", CHANGE),
        ("POST", "/api/training", {"detector": "current", "threshold": 1.1}),
        ("DELETE", "/api/training", None),
    ):
        assert send(server.access, method, path, body, headers=headers)[0] == 403
    assert server.studio.session.get_verdict(0).revision == 0


def test_a_change_without_origin_is_refused(server):
    cookie = {"Cookie": f"{server.access.cookie}={server.access.token}"}
    assert send(server.access, "PUT", "/api/items/0", CHANGE, headers=cookie, is_own=False)[0] == 403
    assert send(server.access, "GET", "/api/session", headers=cookie, is_own=False)[0] == 200


def test_the_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_cannot_use(server):
    path = f"/?token={server.access.token}"
    status, content, headers = send(server.access, "GET", path, headers={"Sec-Fetch-Site": "cross-site"}, is_own=False)
    cookie = headers["set-cookie"].lower()
    assert status == 200
    assert server.access.token not in content
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_every_answer_has_a_strict_policy(server):
    for path, is_own in (("/", True), ("/api/session", True), ("/static/app.js", True), ("/", False), ("/no", True)):
        _, _, headers = send(server.access, "GET", path, is_own=is_own)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nonsense", b'{"state": "open"}', json.dumps(CHANGE | {"state": "other"}).encode(),
        json.dumps(CHANGE | {"judgment": " "}).encode(), json.dumps(CHANGE | {"judgment": "a\0b"}).encode(),
        json.dumps(CHANGE | {"judgment": "\ud800"}).encode(), json.dumps(CHANGE | {"wrong_spans": [[0, 999]]}).encode(),
        json.dumps(CHANGE | {"wrong_spans": [[3, 1]]}).encode(), json.dumps(CHANGE | {"extra": 1}).encode(),
    ],
)  # fmt: skip
def test_what_is_not_a_verdict_is_refused_and_not_saved(server, body):
    status, content, _ = send(server.access, "PUT", "/api/items/1", body)
    assert status == 422
    assert content["problem"]
    assert server.studio.session.get_verdict(1).revision == 0


def test_requests_for_what_is_not_there(server):
    for method, path, body, expected in (
        ("GET", "/api/items/99", None, 404),
        ("GET", "/static/server.py", None, 404),
        ("GET", "/static/..%2Fserver.py", None, 404),
        ("POST", "/api/score", {"index": 0, "judgment": "No.", "tab": "t"}, 404),
        ("POST", "/api/plan", {"detector": "--config /etc/passwd", "threshold": 1.1}, 422),
        ("POST", "/api/plan", {"detector": "current"}, 422),
        ("POST", "/api/training", {"detector": "current", "threshold": 1.1}, 422),
    ):
        assert send(server.access, method, path, body)[0] == expected, path
    assert send(server.access, "PUT", "/api/items/0", b" " * (9 * 2**20))[0] == 413


def test_browsers_that_ask_for_an_icon_get_one(server):
    assert send(server.access, "GET", "/favicon.ico")[0] == 200


def test_an_old_revision_is_a_conflict(tmp_path):
    with running(tmp_path, make_rows(1)) as server:
        status, content, _ = send(server.access, "PUT", "/api/items/0", CHANGE)
        assert (status, content["verdict"]["revision"]) == (200, 1)
        status, content, _ = send(server.access, "PUT", "/api/items/0", CHANGE | {"judgment": "Other."})
        assert (status, content["verdict"]["judgment"]) == (409, "No.")
        assert server.studio.session.get_verdict(0).judgment == "No."
        server.read_records()
        assert [row["judgment"] for row in read_lines(server.out)] == ["No."]


def test_a_password_opens_a_server_that_others_can_reach(tmp_path):
    with running(tmp_path, make_rows(1), password="open sesame") as server:
        access = server.access
        assert send(access, "GET", "/", is_own=False)[0] == 401
        assert send(access, "GET", "/api/session", is_own=False)[0] == 403
        origin = {"Origin": f"http://127.0.0.1:{access.port}"}
        for password, expected in ((b"wrong", 401), (b"open+sesame", 200)):
            status, _, headers = send(access, "POST", "/login", b"password=" + password, headers=origin, is_own=False)
            assert status == expected
            assert ("set-cookie" in headers) == (expected == 200)
        evil = {"Origin": "http://evil.example"}
        assert send(access, "POST", "/login", b"password=open+sesame", headers=evil, is_own=False)[0] == 403
        assert send(access, "GET", "/api/session", headers={"Host": "evil.example"})[0] == 403
        assert (
            send(access, "GET", "/api/session", headers={"Host": "192.0.2.1:80", "Origin": "http://192.0.2.1:80"})[0]
            == 200
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "0.0.0.0"],
        ["--before", "model"],
        ["--before", "model", "--after", "model", "--model", "model"],
        ["--template", "chat"],
        ["--judge", "http"],
        ["--judge_model", "name"],
        ["--reviewer", "../ann"],
        ["--reviewer", ""],
        ["--port", "70000"],
        ["--threshold", "0.5"],
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, monkeypatch, responses, arguments):
    monkeypatch.delenv("CUTLM_STUDIO_PASSWORD", raising=False)
    out = tmp_path / "out.jsonl"
    assert main(["studio", "--responses", str(responses), "--out", str(out), *arguments]) == 2
    assert not out.exists()
    assert not out.with_name("out.jsonl.studio").exists()


def test_an_output_of_something_else_is_not_replaced(tmp_path, responses):
    out = tmp_path / "out.jsonl"
    out.write_text("{}\n")
    assert main(["studio", "--responses", str(responses), "--out", str(out)]) == 2
    assert main(["studio", "--responses", str(responses), "--out", str(responses)]) == 2
    assert main(["studio", "--out", str(out)]) == 2
    assert out.read_text() == "{}\n"
