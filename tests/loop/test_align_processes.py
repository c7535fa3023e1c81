"""What the loop starts beside its own commands: it ends with the loop, is told from strangers, and its log says all."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from loop_plans import make_plan
from serving import find_port

from cutlm.errors import DataError, UserError
from cutlm.loop.loop import Mark, run_loop
from cutlm.loop.manifest import Manifest
from cutlm.loop.processes import Interrupted, lock_folder, run_shell, serve
from cutlm.loop.runner import StageFailed

# The shell stays, and the server is its child.
SERVER = "cd . && {python} -m http.server {port} --bind 127.0.0.1 >/dev/null 2>&1 # {{model}}"
BEFORE = Mark(0, "evaluate")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@cache
def read_once() -> Any:
    """A plan whose first stage is a command of the user's on the first model; to read one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        further = {"eval_instructions": "", "eval_command": "{model} {out}", "judge": "human", "use_peft": False}
        return make_plan(Path(folder), "run", **further)


def make_evaluated(folder: Path, command: str) -> Any:
    """The plan in another folder, with another command."""
    instructions = folder / "instructions.json"
    instructions.write_text(json.dumps([{"instruction": str(number)} for number in range(12)]))
    plan = read_once()
    arguments = replace(plan.arguments, instructions=str(instructions), eval_command=command)
    return replace(plan, arguments=arguments, folder=folder / "run", resolved={"eval_command": command})


def find_processes(text: str) -> list[int]:
    """Those whose command line holds a text."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal() or int(path.name) == os.getpid():
            continue
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in line:
            found.append(int(path.name))
    return found


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def run_in_a_fork(function: Callable[[], object]) -> int:
    """Runs a function in a copy of this process; returns its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except Interrupted as stopped:
            status = 128 + stopped.number
        finally:
            os._exit(status)
    return pid


# Commands of the user's.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_command_of_the_users_has_started_stops_with_the_loop(tmp_path: Path, number: int) -> None:
    mark = f"299.{find_port()}"
    plan = make_evaluated(tmp_path, f"cd . && sleep {mark}; echo never > {{out}} # {{model}}")
    loop = run_in_a_fork(lambda: run_loop(plan, until=BEFORE))
    wait_for(lambda: bool(find_processes(f"sleep {mark}")))
    time.sleep(0.2)  # the guard, whose command line has it too, may be there first
    os.kill(loop, number)
    assert os.waitstatus_to_exitcode(os.waitpid(loop, 0)[1]) == 128 + number
    assert find_processes(f"sleep {mark}") == []
    assert "evaluate" not in Manifest(tmp_path / "run" / "iteration-0").stages


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed loop's stage ends by itself")
def test_what_a_killed_loop_had_started_ends_and_the_next_loop_waits_for_it(tmp_path: Path) -> None:
    mark = f"298.{find_port()}"
    plan = make_evaluated(tmp_path, f"cd . && sleep {mark}; echo never > {{out}} # {{model}}")
    loop = run_in_a_fork(lambda: run_loop(plan, until=BEFORE))
    wait_for(lambda: len(find_processes(f"sleep {mark}")) >= 2)
    os.kill(loop, signal.SIGKILL)
    os.waitpid(loop, 0)
    with lock_folder(tmp_path / "run"):
        assert find_processes(f"sleep {mark}") == []


def test_what_does_not_go_when_asked_is_killed() -> None:
    mark = f"297.{find_port()}"
    code = (
        "import sys; from cutlm.loop import guard; guard.SECONDS_TO_STOP = 0.3;"
        f""" sys.exit(guard.main("trap '' TERM; sleep {mark}; sleep {mark}"))"""
    )
    with subprocess.Popen([sys.executable, "-c", code]) as guard:
        wait_for(lambda: len(find_processes(f"sleep {mark}")) >= 2)
        guard.terminate()
        # Of the two, one is asked and one ignores it: both are gone.
        assert guard.wait(timeout=10) == 128 + signal.SIGKILL
    assert find_processes(f"sleep {mark}") == []


def test_a_command_that_failed_has_measured_nothing(tmp_path: Path) -> None:
    plan = make_evaluated(tmp_path, """echo '{"win_rate": 1}' > {out}; exit 7 # {model}""")
    for _ in range(2):
        with pytest.raises(StageFailed, match=r"^iteration 0, evaluate: eval_command ended with 7; what it") as caught:
            run_loop(plan, until=BEFORE)
        assert caught.value.status == 1


def test_half_a_file_of_figures_is_made_again(tmp_path: Path) -> None:
    once = tmp_path / "once"
    command = f"""test -e {once} || {{ touch {once}; printf '{{"win_ra' > {{out}}; kill -9 $$; }}; """
    plan = make_evaluated(tmp_path, command + """echo '{"win_rate": 2, "num_judged_by_me": 5}' > {out} # {model}""")
    with pytest.raises(StageFailed, match="eval_command ended with 137"):
        run_loop(plan, until=BEFORE)
    assert run_loop(plan, until=BEFORE) is False
    folder = tmp_path / "run" / "iteration-0"
    assert Manifest(folder).stages["evaluate"]["figures"] == {"win_rate": 2, "num_judged_by_me": 5}
    assert [path.name for path in (folder / "evaluation").iterdir()] == ["figures.json"]
    (row,) = json.loads((tmp_path / "run" / "report.json").read_text())
    assert row["evaluation"] == {"win_rate": 2, "num_judged_by_me": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object of figures in .*, found none; have the command write it"),
        ('{"loss": NaN, "win": 1}', "expected numbers in .*, got loss that are none; leave them out"),
    ],
)
def test_figures_that_are_none_are_refused(tmp_path: Path, content: str, message: str) -> None:
    plan = make_evaluated(tmp_path, f"echo {shlex.quote(content)} > {{out}} # {{model}}")
    with pytest.raises(StageFailed, match=message):
        run_loop(plan, until=BEFORE)


def test_what_a_command_kept_of_another_model_goes_with_its_stage(tmp_path: Path) -> None:
    command = """test ! -e {out}.d && mkdir {out}.d && echo '{"a": 1}' > {out} # {model}"""
    plan = make_evaluated(tmp_path, command)
    assert run_loop(plan, until=BEFORE) is False
    assert run_loop(plan, start=BEFORE, until=BEFORE) is False


def test_what_a_command_says_of_errors_is_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "evaluate.log"
    with lock_folder(tmp_path) as lock:
        assert run_shell("echo out; printf '1%%\\r2%%\\r3%%\\n' >&2; echo no such model >&2; exit 3", log, lock) == 3
    shown = capfd.readouterr()
    assert "  out\n" in shown.out
    assert "1%\r2%\r3%\nno such model\n" in shown.err
    # A progress bar is in the log as it was in the end.
    assert log.read_text().splitlines()[1:] == ["out", "3%", "no such model"]
    assert not log.with_suffix(".err").exists()


# Servers.


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    with lock_folder(tmp_path) as lock:
        yield lock


@contextmanager
def answering(status: Callable[[], int]) -> Iterator[str]:
    """A server that has nothing to say but a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status())
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_is_there_within_the_block_and_gone_after_it(tmp_path: Path, lock: int) -> None:
    port = find_port()
    command = SERVER.format(python=sys.executable, port=port)
    with serve(command, "m", f"http://127.0.0.1:{port}/v1", 60, tmp_path / "log", lock):
        assert find_processes(f"http.server {port}")
    assert find_processes(f"http.server {port}") == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed loop's server ends by itself")
def test_the_server_of_a_killed_loop_does_not_answer_the_next_one(tmp_path: Path) -> None:
    port = find_port()
    command = SERVER.format(python=sys.executable, port=port)
    folder = tmp_path / "run"

    def serve_for_long() -> None:
        with (
            lock_folder(folder) as lock,
            serve(command, "m", f"http://127.0.0.1:{port}/v1", 60, tmp_path / "log", lock),
        ):
            time.sleep(300)

    loop = run_in_a_fork(serve_for_long)
    wait_for(lambda: bool(find_processes(f"http.server {port} --bind")))
    os.kill(loop, signal.SIGKILL)
    os.waitpid(loop, 0)
    with lock_folder(folder):
        assert find_processes(f"http.server {port}") == []


def test_a_stranger_at_the_servers_address_is_refused(tmp_path: Path, lock: int) -> None:
    with (
        answering(lambda: 200) as url,
        pytest.raises(UserError, match=rf"^server_command: something answers at {url} before it is started; stop"),
        serve("sleep 60 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        pass


def test_a_server_that_is_still_loading_is_waited_for(tmp_path: Path, lock: int) -> None:
    # Nothing is there before it starts; then it says for a while that it is not ready.
    statuses = iter([503, 503, 503, 200])
    with (
        answering(lambda: next(statuses)) as url,
        serve("sleep 60 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        assert list(statuses) == []


def test_a_server_that_ends_before_it_answers_is_named_with_its_log(tmp_path: Path, lock: int) -> None:
    url = f"http://127.0.0.1:{find_port()}/v1"
    message = "^server_command: ended with 3 before it answered; see .*log$"
    with (
        pytest.raises(UserError, match=message),
        serve("exit 3 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        pass


def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path: Path, lock: int) -> None:
    mark = f"296.{find_port()}"
    url = f"http://127.0.0.1:{find_port()}/v1"
    with (
        pytest.raises(UserError, match=rf"no answer from {url} in 1 seconds \(server_wait\)"),
        serve(f"sleep {mark} # {{model}}", "m", url, 1, tmp_path / "log", lock),
    ):
        pass
    assert find_processes(f"sleep {mark}") == []


# Files of a run that are not what they should be.


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"stages": {"sample": {"outputs": {}}}}',
        '{"stages": {"sample": {"outputs": {"a": {}}, "versions": {}, "figures": {}}}}',
        '{"stages": {"sample": {"outputs": {"a": 1}, "versions": {}, "figures": {}}}}',
    ],
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest; restore it, or name another output_dir"):
        Manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "\0"])
def test_damaged_settings_are_one_sentence(tmp_path: Path, content: str) -> None:
    plan = make_evaluated(tmp_path, "true {model} {out}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "align.yaml").write_text(content)
    with pytest.raises(DataError, match=r"align\.yaml: not the settings of a run; restore it, or name another"):
        run_loop(plan, until=BEFORE)


def test_a_folder_that_cannot_be_locked_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(UserError, match=r"\.lock: cannot be locked \(No locks available\), so"), lock_folder(tmp_path):
        pass
