"""The loop and its judges: a server that is paid, judgments that were had, a key that nobody sees; and two processes
that train."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import CANARY, ChatServer, Handler, make_completion, running
from loop_plans import make_plan, make_settings, make_workplace, run_here

from cutlm.loop.judging import WaitingForPerson
from cutlm.loop.loop import Mark, collect_figures, run_loop
from cutlm.loop.manifest import Manifest
from cutlm.loop.runner import StageFailed
from cutlm.loop.stages import list_stages

NUM_RESPONSES = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running(ChatServer()) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _judged_by(server: ChatServer, **further: Any) -> dict[str, Any]:
    judge = f"http --base_url {server.url} --judge_model m --concurrency 1 --max_retries 0"
    return {"judge": judge, "num_iterations": 1, "eval_instructions": "", "detector": "off"} | further


@pytest.fixture(scope="module")
def finished(workplace: Path) -> tuple[Path, list[str | None], str]:
    """A run by the real command, with a key, that was refused at first, and trained by two processes.

    Returns:
        Its folder, the keys that the server got, and all that was printed.
    """
    config, printed = workplace / "finished.yaml", ""
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"

    def refuse(handler: Handler, number: int) -> bool:
        handler.answer(401, {"error": f"the key {CANARY} is not liked here"})
        return True

    with running(ChatServer()) as server:
        settings = make_settings(workplace, "finished", **_judged_by(server, launcher=launcher, max_steps=2))
        config.write_text(yaml.safe_dump(settings))
        server.reply = lambda prompt: f"It is wrong, says {CANARY}."
        for fault, status in ((refuse, 2), (None, 0)):
            server.fault = fault
            run = subprocess.run(
                [sys.executable, "-m", "cutlm", "align", "--config", str(config)],
                env=os.environ | {"OPENAI_API_KEY": CANARY, "NO_PROXY": "127.0.0.1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == status, run.stderr + run.stdout
            printed += run.stdout + run.stderr
        return workplace / "finished", server.keys, printed


def test_a_key_is_in_no_file_and_no_output_of_a_loop(finished: tuple[Path, list[str | None], str]) -> None:
    folder, keys, printed = finished
    assert set(keys) == {f"Bearer {CANARY}"}
    assert "the key [key] is not liked here" in printed
    assert CANARY not in printed
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"judge.log", "manifest.json", "align.yaml", "records.jsonl"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_why_a_stage_failed_is_in_its_log(finished: tuple[Path, list[str | None], str]) -> None:
    log = (finished[0] / "iteration-1" / "judge.log").read_text()
    assert "the server wants another key (401: the key [key] is not liked here)" in log


def test_two_processes_train_an_iteration(finished: tuple[Path, list[str | None], str]) -> None:
    folder = finished[0] / "iteration-1"
    assert (
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m cutlm train" in (folder / "train.log").read_text()
    )
    state = json.loads((folder / "adapter" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (folder / "model" / "config.json").exists()


def test_killed_while_it_judges_it_pays_for_no_judgment_twice(workplace: Path, server: ChatServer) -> None:
    plan = make_plan(workplace, "killed", **_judged_by(server))
    assert run_loop(plan, until=Mark(1, "generate"), run=run_here) is False

    def kill(handler: Handler, number: int) -> bool:
        if number == 3:  # three judgments are had by then
            os.kill(pid, signal.SIGKILL)
        return number == 3

    server.fault = kill
    pid = os.fork()
    if pid == 0:
        try:
            run_loop(plan, until=Mark(1, "judge"), run=run_here)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    server.fault = None
    assert run_loop(plan, until=Mark(1, "judge"), run=run_here) is False
    assert len(server.requests) == NUM_RESPONSES + 1  # the one that was not answered
    (row,) = collect_figures(plan)
    assert row["stages"]["judge"]["figures"]["num_judged"] == NUM_RESPONSES


def test_a_cap_is_one_for_all_iterations_and_nothing_is_paid_for_twice(workplace: Path, server: ChatServer) -> None:
    def plan(cap: int) -> Any:
        settings = _judged_by(server, num_iterations=2, max_steps=1)
        return make_plan(workplace, "capped", **settings | {"judge": f"{settings['judge']} --max_requests {cap}"})

    with pytest.raises(StageFailed, match=f"^iteration 2, judge: 4 of {NUM_RESPONSES} responses have no judgment"):
        run_loop(plan(8), run=run_here)
    assert len(server.requests) == 8
    # What an earlier iteration paid for is had for nothing, though its records are made anew.
    assert run_loop(plan(8), start=Mark(1, "judge"), until=Mark(1, "judge"), run=run_here) is False
    assert len(server.requests) == 8
    assert run_loop(plan(12), run=run_here) is True
    assert len(server.requests) <= 12


def test_records_and_failures_of_two_runs_are_not_taken_for_one(workplace: Path, server: ChatServer) -> None:
    plan = make_plan(workplace, "two", **_judged_by(server, max_failure_rate=0.1))

    def fail_three(handler: Handler, number: int) -> bool:
        if number in (1, 2, 3):
            handler.answer(200, make_completion("", "stop"))
        return number in (1, 2, 3)

    server.fault = fail_three
    with pytest.raises(
        StageFailed, match=f"3 of {NUM_RESPONSES} responses have no judgment, more than max_failure_rate"
    ):
        run_loop(plan, until=Mark(1, "judge"), run=run_here)
    # What a kill between the two files would leave: the records of the first try, one failure of a second.
    failures = workplace / "two" / "iteration-1" / "records.jsonl.failures.jsonl"
    failures.write_text("")
    server.fault = None
    assert run_loop(plan, until=Mark(1, "judge"), run=run_here) is False
    (row,) = collect_figures(plan)
    assert row["stages"]["judge"]["figures"]["num_judged"] == NUM_RESPONSES
    assert len(server.requests) == NUM_RESPONSES + 3


def test_rules_that_end_the_program_wait_for_no_person(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(workplace, "ended", judge="rules --rules any:judge", num_iterations=1, eval_instructions="")

    def run(arguments: list[str], **kwargs: Any) -> int:
        return 0 if arguments[0] == "judge" else run_here(arguments, **kwargs)

    with pytest.raises(StageFailed, match="cutlm judge ended with 1"):
        run_loop(plan, until=Mark(1, "judge"), run=run)


def test_a_loop_that_has_nothing_left_to_learn_says_so(workplace: Path, server: ChatServer) -> None:
    server.reply = lambda prompt: "Perfect."
    plan = make_plan(workplace, "perfect", **_judged_by(server, downsample=0.25))
    message = f"iteration 1, train: all {NUM_RESPONSES} responses are satisfactory, and downsample keeps none of them"
    with pytest.raises(StageFailed, match=message) as caught:
        run_loop(plan, run=run_here)
    assert caught.value.status == 2


def test_where_a_judge_or_a_server_stands_may_change_and_what_it_is_asked_may_not(workplace: Path) -> None:
    prompt = workplace / "prompt.txt"
    prompt.write_text("{instruction} {response}")

    def plan(url: str, port: int) -> Any:
        judge = f"http --base_url {url} --judge_model m --prompt_file {prompt}"
        generate = f"--base_url http://127.0.0.1:{port} --max_new_tokens 4"
        return make_plan(workplace, "moved", judge=judge, generate=generate, num_iterations=1, eval_instructions="")

    assert run_loop(plan("http://a/v1", 1), until=Mark(1, "sample"), run=run_here) is False
    assert run_loop(plan("http://b/v1", 2), until=Mark(1, "sample"), run=run_here) is False
    prompt.write_text("{response} {instruction}")
    with pytest.raises(ValueError, match=r"^prompt_file of judge: this folder was begun with a file that held somethi"):
        run_loop(plan("http://b/v1", 2), until=Mark(1, "sample"), run=run_here)


@pytest.mark.parametrize(
    ("judge", "advice"),
    [
        ("http --base_url http://x --judge_model m", "start again to ask for these alone, or raise max_failure_rate$"),
        ("local --judge_model m", r"\.jsonl says why; raise max_failure_rate$"),  # it would say the same again
    ],
    ids=["http", "local"],
)
def test_too_many_missing_judgments_stop_it_and_are_asked_for_again(
    workplace: Path, judge: str, advice: str, request: pytest.FixtureRequest
) -> None:
    name = f"missing-{request.node.callspec.id}"
    plan = make_plan(workplace, name, judge=judge, num_iterations=1, eval_instructions="", max_failure_rate=0.4)
    num_missing = 3

    def run(arguments: list[str], **kwargs: Any) -> int:
        """A judge that has no answer for some."""
        if arguments[0] != "judge":
            return run_here(arguments, **kwargs)
        responses, out = (Path(arguments[arguments.index(name) + 1]) for name in ("--responses", "--out"))
        rows = [json.loads(line) | {"judgment": None} for line in responses.read_text().splitlines()]
        out.write_text("".join(f"{json.dumps(row)}\n" for row in rows[num_missing + 1 :]))
        failed = [json.dumps({"kind": "no answer"})] * num_missing + [json.dumps({"kind": "empty response"})]
        Path(f"{out}.failures.jsonl").write_text("\n".join(failed) + "\n")
        return 1

    missing = (
        r"iteration 1, judge: 4 of 6 responses have no judgment \(1 of them are empty\), more than max_failure_rate"
    )
    with pytest.raises(StageFailed, match=f"{missing}.*{advice}"):
        run_loop(plan, run=run)
    num_missing = 1
    assert run_loop(plan, until=Mark(1, "judge"), run=run) is False
    (row,) = collect_figures(plan)
    assert row["stages"]["judge"]["figures"] == {
        "num_judged": 4,
        "num_satisfactory": 4,
        "num_missing": 1,
        "num_empty": 1,
    }


def test_a_command_that_fails_is_named_with_its_status(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(workplace, "raising", judge="rules --rules characters:raising", eval_instructions="")
    with pytest.raises(StageFailed, match=r"^iteration 1, judge: cutlm judge ended with 2; what it said stands above"):
        run_loop(plan, run=run_here)
    assert "the rules raised ValueError: no way" in capfd.readouterr().err
    assert "judge" not in Manifest(workplace / "raising" / "iteration-1").stages


def test_a_person_may_judge(workplace: Path) -> None:
    plan = make_plan(workplace, "human", num_iterations=1, eval_instructions="", judge="human")
    with pytest.raises(WaitingForPerson) as waiting:
        run_loop(plan, run=run_here)
    assert waiting.value.todo.is_file()
    with pytest.raises(StageFailed, match="cutlm judge ended with 2"):
        run_loop(plan, run=run_here)
    lines = Path(f"{workplace}/human/iteration-1/records.jsonl.todo.jsonl")
    rows = [json.loads(line) | {"judgment": "It is gibberish."} for line in lines.read_text().splitlines()]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert run_loop(plan, until=Mark(1, "judge"), run=run_here) is False
    assert all(
        json.loads(line)["judgment"] == "It is gibberish."
        for line in (workplace / "human" / "iteration-1" / "records.jsonl").read_text().splitlines()
    )


def test_responses_are_refined_where_the_objective_learns_from_that(workplace: Path) -> None:
    further = {"num_iterations": 1, "eval_instructions": "", "objective": "ilf_mle", "detector": None}
    plan = make_plan(workplace, "refined", **further)
    assert list_stages(plan, 1) == ["sample", "generate", "judge", "refine", "train", "merge"]
    assert run_loop(plan, run=run_here) is True
    rows = (workplace / "refined" / "iteration-1" / "refined.jsonl").read_text().splitlines()
    num_refined = sum("i_ans" in json.loads(row) for row in rows)
    assert num_refined > 0
    (row,) = collect_figures(plan)
    assert row["stages"]["refine"]["figures"] == {"num_refined": num_refined}


def test_a_command_of_the_users_evaluates(workplace: Path) -> None:
    command = """test -d {model} && echo '{{"win_rate": 12.5, "note": "text"}}' > {out}""".replace("{{", "{").replace(
        "}}", "}"
    )
    plan = make_plan(
        workplace,
        "evaluated",
        num_iterations=1,
        eval_instructions="",
        eval_command=command,
        use_peft=False,
        detector="off",
    )
    assert list_stages(plan, 1) == ["sample", "generate", "judge", "train", "evaluate"]
    assert run_loop(plan, run=run_here) is True
    report = (workplace / "evaluated" / "report.md").read_text()
    assert "held-out win rate" in report
    assert [row["evaluation"] for row in json.loads((workplace / "evaluated" / "report.json").read_text())] == [
        {"win_rate": 12.5},
        {"win_rate": 12.5},
    ]
