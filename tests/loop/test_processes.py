"""Shell commands and servers end with the loop, and their output is logged."""

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

from cutlm.errors import UserError
from cutlm.loop.loop import Manifest, StageRef, run_loop
from cutlm.loop.processes import Interrupted, lock_folder, run_shell, serve
from cutlm.loop.settings import Plan
from cutlm.loop.stages import StageFailed

# "cd ." makes the shell stay, with the server as its child.
SERVER = "cd . && {python} -m http.server {port} --bind 127.0.0.1 >/dev/null 2>&1 # {{model}}"
FIRST = StageRef(0, "evaluate")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@cache
def read_plan_once() -> Plan:
    """Reads a plan whose first stage is the eval_command; reading one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        further = {"eval_instructions": "", "eval_command": "{model} {out}", "judge": "human", "use_peft": False}
        return make_plan(Path(folder), "run", **further)


def make_plan_with(folder: Path, command: str) -> Plan:
    """Makes a plan whose first stage is an eval_command."""
    instructions = folder / "instructions.json"
    instructions.write_text(json.dumps([{"instruction": str(number)} for number in range(12)]))
    plan = read_plan_once()
    arguments = replace(plan.arguments, instructions=str(instructions), eval_command=command)
    return replace(plan, arguments=arguments, folder=folder / "run", resolved={"eval_command": command})


def find_processes(text: str) -> list[int]:
    """Returns the ids of the processes whose command line contains a text."""
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


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)


def run_in_a_fork(function: Callable[[], object]) -> int:
    """Runs a function in a copy of this process; returns the copy's id."""
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


# ---- Shell commands ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_everything_a_command_has_started_stops_with_the_loop(tmp_path: Path, number: int) -> None:
    mark = f"299.{find_port()}"
    plan = make_plan_with(tmp_path, f"cd . && sleep {mark}; echo never > {{out}} # {{model}}")
    loop = run_in_a_fork(lambda: run_loop(plan, until=FIRST))
    wait_for(lambda: len(find_processes(f"sleep {mark}")) >= 3)  # guard, shell and sleep
    os.kill(loop, number)
    assert os.waitstatus_to_exitcode(os.waitpid(loop, 0)[1]) == 128 + number
    assert find_processes(f"sleep {mark}") == []
    assert "evaluate" not in Manifest(tmp_path / "run" / "iteration-0").stages


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_next_loop_waits_for_the_commands_of_a_killed_one(tmp_path: Path) -> None:
    mark = f"298.{find_port()}"
    plan = make_plan_with(tmp_path, f"cd . && sleep {mark}; echo never > {{out}} # {{model}}")
    loop = run_in_a_fork(lambda: run_loop(plan, until=FIRST))
    wait_for(lambda: len(find_processes(f"sleep {mark}")) >= 3)
    os.kill(loop, signal.SIGKILL)
    os.waitpid(loop, 0)
    with lock_folder(tmp_path / "run"):
        assert find_processes(f"sleep {mark}") == []


def test_guard_kills_what_ignores_the_signal() -> None:
    mark = f"297.{find_port()}"
    code = (
        "import sys; from cutlm.loop.processes import guard;"
        f""" sys.exit(guard("trap '' TERM; sleep {mark}; sleep {mark}", timeout=0.3))"""
    )
    with subprocess.Popen([sys.executable, "-c", code]) as guard:
        wait_for(lambda: len(find_processes(f"sleep {mark}")) >= 2)
        guard.terminate()
        # The signal ends the first sleep; the shell ignores it and starts the second one.
        assert guard.wait(timeout=10) == 128 + signal.SIGKILL
    assert find_processes(f"sleep {mark}") == []


def test_metrics_of_a_failed_command_are_ignored(tmp_path: Path) -> None:
    plan = make_plan_with(tmp_path, """echo '{"win_rate": 1}' > {out}; exit 7 # {model}""")
    for _ in range(2):
        with pytest.raises(StageFailed, match=r"^iteration 0, evaluate: eval_command exited with 7") as caught:
            run_loop(plan, until=FIRST)
        assert caught.value.status == 1


def test_partial_metrics_file_is_written_again(tmp_path: Path) -> None:
    once = tmp_path / "once"
    command = f"""test -e {once} || {{ touch {once}; printf '{{"win_ra' > {{out}}; kill -9 $$; }}; """
    plan = make_plan_with(tmp_path, command + """echo '{"win_rate": 2, "num_judged_by_me": 5}' > {out} # {model}""")
    with pytest.raises(StageFailed, match="eval_command exited with 137"):
        run_loop(plan, until=FIRST)
    assert run_loop(plan, until=FIRST) is False
    folder = tmp_path / "run" / "iteration-0"
    assert Manifest(folder).stages["evaluate"]["metrics"] == {"win_rate": 2, "num_judged_by_me": 5}
    assert [path.name for path in (folder / "evaluation").iterdir()] == ["metrics.json"]
    (row,) = json.loads((tmp_path / "run" / "report.json").read_text())
    assert row["evaluation"] == {"win_rate": 2, "num_judged_by_me": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "expected a JSON object of metrics"), ('{"loss": NaN, "win": 1}', "non-finite loss")],
)
def test_invalid_metrics_are_refused(tmp_path: Path, content: str, message: str) -> None:
    plan = make_plan_with(tmp_path, f"echo {shlex.quote(content)} > {{out}} # {{model}}")
    with pytest.raises(StageFailed, match=message):
        run_loop(plan, until=FIRST)


def test_all_files_of_a_command_are_removed_with_its_stage(tmp_path: Path) -> None:
    command = """test ! -e {out}.d && mkdir {out}.d && echo '{"a": 1}' > {out} # {model}"""
    plan = make_plan_with(tmp_path, command)
    assert run_loop(plan, until=FIRST) is False
    assert run_loop(plan, start=FIRST, until=FIRST) is False


def test_log_has_both_streams_and_the_final_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "evaluate.log"
    with lock_folder(tmp_path) as lock:
        assert run_shell("echo out; printf '1%%\\r2%%\\r3%%\\n' >&2; echo no such model >&2; exit 3", log, lock) == 3
    shown = capfd.readouterr()
    assert "  out\n" in shown.out
    assert "1%\r2%\r3%\nno such model\n" in shown.err
    assert log.read_text().splitlines()[1:] == ["out", "3%", "no such model"]
    assert not log.with_suffix(".err").exists()


# ---- Servers ----


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    with lock_folder(tmp_path) as lock:
        yield lock


@contextmanager
def answering(status: Callable[[], int]) -> Iterator[str]:
    """Runs a server that answers with a status only."""

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


def test_server_runs_only_while_the_context_is_open(tmp_path: Path, lock: int) -> None:
    port = find_port()
    command = SERVER.format(python=sys.executable, port=port)
    with serve(command, "m", f"http://127.0.0.1:{port}/v1", 60, tmp_path / "log", lock):
        assert find_processes(f"http.server {port}")
    assert find_processes(f"http.server {port}") == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_next_loop_waits_for_the_server_of_a_killed_one(tmp_path: Path) -> None:
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


def test_other_server_at_the_address_is_refused(tmp_path: Path, lock: int) -> None:
    with (
        answering(lambda: 200) as url,
        pytest.raises(UserError, match=rf"^server_command: a server already answers at {url}"),
        serve("sleep 60 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        pass


def test_loop_waits_while_the_server_is_loading(tmp_path: Path, lock: int) -> None:
    # Not ready before it is started, nor for a while after.
    statuses = iter([503, 503, 502, 500])
    with (
        answering(lambda: next(statuses)) as url,
        serve("sleep 60 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        assert list(statuses) == []


def test_server_that_exits_before_it_answers_is_reported(tmp_path: Path, lock: int) -> None:
    url = f"http://127.0.0.1:{find_port()}/v1"
    with (
        pytest.raises(UserError, match=r"^server_command: exited with 3 before it answered; see .*log$"),
        serve("exit 3 # {model}", "m", url, 60, tmp_path / "log", lock),
    ):
        pass


def test_server_that_does_not_answer_in_time_is_stopped(tmp_path: Path, lock: int) -> None:
    mark = f"296.{find_port()}"
    url = f"http://127.0.0.1:{find_port()}/v1"
    with (
        pytest.raises(UserError, match=rf"no answer from {url} in 0.3 seconds \(server_timeout\)"),
        serve(f"sleep {mark} # {{model}}", "m", url, 0.3, tmp_path / "log", lock),
    ):
        pass
    assert find_processes(f"sleep {mark}") == []
