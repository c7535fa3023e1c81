"""Stages: paid judges, missing judgments, a person as the judge, API keys, and a launcher of training."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import CANARY, ChatServer, Handler, make_completion, running
from judged_rows import write_verdict
from loop_plans import make_plan, make_settings, make_workplace, run_in_process

from cutlm.cli import main
from cutlm.data.records import load_records
from cutlm.errors import ConfigError
from cutlm.flagging.token_scores import read_token_scores
from cutlm.generation.local import Answer, AnswerReader
from cutlm.loop.loop import Manifest, StageRef, collect_metrics, run_loop
from cutlm.loop.settings import Plan
from cutlm.loop.stages import StageFailed, WaitingForPerson, list_stages

NUM_RESPONSES = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from make_workplace(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running(ChatServer()) as server:
        server.reply = lambda prompt: write_verdict("It is wrong.")
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judged_by(server: ChatServer, **further: Any) -> dict[str, Any]:
    judge = f"http --base_url {server.url} --judge_model m --concurrency 1 --max_retries 0"
    return {"judge": judge, "num_iterations": 1, "eval_instructions": "", "detector": "off"} | further


def test_key_is_in_no_file_and_launcher_starts_training(
    workplace: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs the stages' real commands, with a key that the server rejects at first."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    launcher = f"{sys.executable} -W ignore"  # torchrun takes the same arguments but more time
    further = judged_by(server, launcher=launcher, max_steps=2, use_peft=False)
    folder, config = workplace / "finished", workplace / "finished.yaml"
    config.write_text(yaml.safe_dump(make_settings(workplace, "finished", **further)))
    plan = make_plan(workplace, "finished", **further)
    assert run_loop(plan, until=StageRef(1, "generate"), run=run_in_process) is False

    def reject(handler: Handler, number: int) -> bool:
        handler.answer(401, {"error": f"invalid key {CANARY}"})
        return True

    server.reply = lambda prompt: write_verdict(f"It is wrong, says {CANARY}.")
    server.fault = reject
    assert main(["align", "--config", str(config)]) == 2
    server.fault = None
    assert main(["align", "--config", str(config)]) == 0
    printed = "".join(capfd.readouterr())
    assert set(server.keys) == {f"Bearer {CANARY}"}
    assert "invalid key [key]" in printed
    assert CANARY not in printed
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"judge.log", "manifest.json", "align.yaml", "records.jsonl"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    # The log tells why the stage failed.
    assert "401" in (folder / "iteration-1" / "judge.log").read_text()
    assert f"{launcher} -m cutlm train" in (folder / "iteration-1" / "train.log").read_text()
    state = json.loads((folder / "iteration-1" / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_no_judgment_is_paid_twice_after_a_kill(workplace: Path, server: ChatServer) -> None:
    plan = make_plan(workplace, "killed", **judged_by(server))
    assert run_loop(plan, until=StageRef(1, "generate"), run=run_in_process) is False

    def kill(handler: Handler, number: int) -> bool:
        if number == 3:
            os.kill(pid, signal.SIGKILL)
        return number == 3

    server.fault = kill
    pid = os.fork()
    if pid == 0:
        try:
            run_loop(plan, until=StageRef(1, "judge"), run=run_in_process)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    server.fault = None
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False
    assert len(server.requests) == NUM_RESPONSES + 1  # one was not answered
    (row,) = collect_metrics(plan)
    assert row["stages"]["judge"]["metrics"]["num_judged"] == NUM_RESPONSES


def test_spending_limit_holds_for_all_iterations(workplace: Path, server: ChatServer) -> None:
    def plan(cap: int) -> Plan:
        settings = judged_by(server, num_iterations=2, max_steps=1)
        return make_plan(workplace, "capped", **settings | {"judge": f"{settings['judge']} --max_requests {cap}"})

    with pytest.raises(StageFailed, match=f"^iteration 2, judge: 4 of {NUM_RESPONSES} responses have no judgment"):
        run_loop(plan(8), run=run_in_process)
    assert len(server.requests) == 8
    # Judgments that were paid for are not requested again when the stage is.
    assert run_loop(plan(8), start=StageRef(1, "judge"), until=StageRef(1, "judge"), run=run_in_process) is False
    assert len(server.requests) == 8
    assert run_loop(plan(12), run=run_in_process) is True
    assert len(server.requests) <= 12


def test_records_and_failures_of_different_attempts_are_not_combined(workplace: Path, server: ChatServer) -> None:
    plan = make_plan(workplace, "two", **judged_by(server, max_failure_rate=0.1))

    def fail_three(handler: Handler, number: int) -> bool:
        if number in (1, 2, 3):
            handler.answer(200, make_completion("", "stop"))
        return number in (1, 2, 3)

    server.fault = fail_three
    with pytest.raises(
        StageFailed, match=f"3 of {NUM_RESPONSES} responses have no judgment, more than max_failure_rate"
    ):
        run_loop(plan, until=StageRef(1, "judge"), run=run_in_process)
    # A kill between writing the two files leaves the records of one attempt and the failures of another.
    failures = workplace / "two" / "iteration-1" / "records.jsonl.failures.jsonl"
    failures.write_text("")
    server.fault = None
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False
    (row,) = collect_metrics(plan)
    assert row["stages"]["judge"]["metrics"]["num_judged"] == NUM_RESPONSES
    assert len(server.requests) == NUM_RESPONSES + 3


def test_judge_that_writes_nothing_is_a_failure(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(workplace, "ended", judge="rules --rules any:judge", num_iterations=1, eval_instructions="")

    def run(arguments: list[str], **kwargs: Any) -> int:
        return 0 if arguments[0] == "judge" else run_in_process(arguments, **kwargs)

    with pytest.raises(StageFailed, match="cutlm judge exited with 1"):
        run_loop(plan, until=StageRef(1, "judge"), run=run)


def test_iteration_without_unsatisfactory_responses_fails_if_downsampled(workplace: Path, server: ChatServer) -> None:
    server.reply = lambda prompt: "Perfect."
    plan = make_plan(workplace, "perfect", **judged_by(server, downsample=0.25))
    with pytest.raises(StageFailed, match=f"^iteration 1, train: all {NUM_RESPONSES} .*downsample") as caught:
        run_loop(plan, run=run_in_process)
    assert caught.value.status == 2


def test_address_of_a_server_may_change_but_not_the_prompt(workplace: Path) -> None:
    prompt = workplace / "prompt.txt"
    prompt.write_text("{instruction} {response}")

    def plan(url: str, port: int) -> Plan:
        judge = f"http --base_url {url} --judge_model m --prompt_file {prompt}"
        generate = f"--base_url http://127.0.0.1:{port}/v1 --max_new_tokens 4"
        return make_plan(workplace, "moved", judge=judge, generate=generate, num_iterations=1, eval_instructions="")

    assert run_loop(plan("http://a/v1", 1), until=StageRef(1, "sample"), run=run_in_process) is False
    assert run_loop(plan("http://b/v1", 2), until=StageRef(1, "sample"), run=run_in_process) is False
    prompt.write_text("{response} {instruction}")
    with pytest.raises(ConfigError, match=r"^prompt_file of judge:"):
        run_loop(plan("http://b/v1", 2), until=StageRef(1, "sample"), run=run_in_process)


@pytest.mark.parametrize("model", ["base", "base/", None])
def test_a_server_gets_token_ids_for_the_initial_model_however_it_is_named(
    workplace: Path, model: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chat template, if it has one, is not that of training."""
    monkeypatch.chdir(workplace)
    further = {"generate": "--base_url http://x/v1", "template": "alpaca", "num_iterations": 1, "eval_instructions": ""}
    name = {"base": "relative", "base/": "slash", None: "absolute"}[model]
    plan = make_plan(workplace, name, model_name_or_path=model or str(workplace / "base"), **further)
    commands: list[list[str]] = []
    with pytest.raises(StageFailed):
        run_loop(plan, run=lambda arguments, **kwargs: commands.append(arguments) or 1)
    assert commands[0][:3] == ["generate", "--model", str(workplace / "base")]
    assert "--template=alpaca" in commands[0]


@pytest.mark.parametrize(
    ("judge", "advice"),
    [
        ("http --base_url http://x --judge_model m", "run the same command again"),
        ("local --judge_model m", r"\.jsonl lists the reasons; raise max_failure_rate$"),  # no use in a retry
    ],
    ids=["http", "local"],
)
def test_too_many_missing_judgments_fail_and_are_retried(
    workplace: Path, judge: str, advice: str, request: pytest.FixtureRequest
) -> None:
    name = f"missing-{request.node.callspec.id}"
    plan = make_plan(workplace, name, judge=judge, num_iterations=1, eval_instructions="", max_failure_rate=0.4)
    num_missing = 3

    def run(arguments: list[str], **kwargs: Any) -> int:
        """Runs a judge that fails for some responses."""
        if arguments[0] != "judge":
            return run_in_process(arguments, **kwargs)
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
    assert run_loop(plan, until=StageRef(1, "judge"), run=run) is False
    (row,) = collect_metrics(plan)
    assert row["stages"]["judge"]["metrics"] == {
        "num_judged": 4,
        "num_satisfactory": 4,
        "num_missing": 1,
        "num_empty": 1,
    }


def test_failed_command_is_reported_with_its_status(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(workplace, "raising", judge="rules --rules characters:raising", eval_instructions="")
    with pytest.raises(StageFailed, match=r"^iteration 1, judge: cutlm judge exited with 2"):
        run_loop(plan, run=run_in_process)
    assert "ValueError: broken rule" in capfd.readouterr().err
    assert "judge" not in Manifest(workplace / "raising" / "iteration-1").stages


def test_person_judges(workplace: Path) -> None:
    plan = make_plan(workplace, "human", num_iterations=1, eval_instructions="", judge="human")
    with pytest.raises(WaitingForPerson) as waiting:
        run_loop(plan, run=run_in_process)
    assert waiting.value.labels.is_file()
    with pytest.raises(StageFailed, match="cutlm judge exited with 2"):
        run_loop(plan, run=run_in_process)
    lines = Path(f"{workplace}/human/iteration-1/records.jsonl.todo.jsonl")
    rows = [json.loads(line) | {"judgment": "It is gibberish."} for line in lines.read_text().splitlines()]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False
    assert all(
        json.loads(line)["judgment"] == "It is gibberish."
        for line in (workplace / "human" / "iteration-1" / "records.jsonl").read_text().splitlines()
    )


def test_responses_are_refined_if_the_objective_needs_it(workplace: Path) -> None:
    further = {"num_iterations": 1, "eval_instructions": "", "objective": "ilf_mle", "detector": None}
    plan = make_plan(workplace, "refined", **further)
    assert list_stages(plan, 1) == ["sample", "generate", "judge", "refine", "train", "merge"]
    assert run_loop(plan, run=run_in_process) is True
    rows = (workplace / "refined" / "iteration-1" / "refined.jsonl").read_text().splitlines()
    num_refined = sum("i_ans" in json.loads(row) for row in rows)
    assert num_refined > 0
    (row,) = collect_metrics(plan)
    assert row["stages"]["refine"]["metrics"] == {"num_refined": num_refined}


def test_satisfactory_responses_are_not_refined_and_trained_on(workplace: Path, server: ChatServer) -> None:
    server.reply = lambda prompt: "Perfect."
    plan = make_plan(workplace, "unrefined", **judged_by(server, objective="ilf_mle", detector=None))
    assert run_loop(plan, run=run_in_process) is True
    folder = workplace / "unrefined" / "iteration-1"
    assert load_records(folder / "refined.jsonl") == load_records(folder / "records.jsonl")
    (row,) = collect_metrics(plan)
    assert row["stages"]["refine"]["metrics"] == {"num_refined": 0}


def test_the_loop_continues_if_no_response_could_be_improved(
    workplace: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter(["Perfect.", *[write_verdict("It is wrong.")] * NUM_RESPONSES])
    server.reply = lambda prompt: next(verdicts)

    def run(arguments: list[str], **further: Any) -> int:
        with monkeypatch.context() as patch:
            if arguments[0] == "refine":
                patch.setattr(AnswerReader, "read", lambda *_: Answer(" "))
            return run_in_process(arguments, **further)

    plan = make_plan(workplace, "unimproved", **judged_by(server, objective="ilf_mle", detector=None, max_steps=1))
    assert run_loop(plan, run=run) is True
    folder = workplace / "unimproved" / "iteration-1"
    assert load_records(folder / "refined.jsonl") == load_records(folder / "records.jsonl")
    assert len((folder / "refined.jsonl.failures.jsonl").read_text().splitlines()) == NUM_RESPONSES - 1
    (row,) = collect_metrics(plan)
    assert row["stages"]["refine"]["metrics"] == {"num_refined": 0}


def test_eval_command_evaluates(workplace: Path) -> None:
    further = {"num_iterations": 1, "eval_instructions": "", "use_peft": False, "detector": "off"}
    command = """test -d {model} && echo '{"win_rate": 12.5, "note": "text"}' > {out}"""
    plan = make_plan(workplace, "evaluated", eval_command=command, **further)
    assert list_stages(plan, 1) == ["sample", "generate", "judge", "train", "evaluate"]
    assert run_loop(plan, run=run_in_process) is True
    report = (workplace / "evaluated" / "report.md").read_text()
    assert "held-out win rate" in report
    assert [row["evaluation"] for row in json.loads((workplace / "evaluated" / "report.json").read_text())] == [
        {"win_rate": 12.5},
        {"win_rate": 12.5},
    ]


# ---- A teacher's prompt ----


def with_teacher(**further: Any) -> dict[str, Any]:
    own = {"objective": "self_distillation", "detector": None, "num_iterations": 1, "eval_instructions": ""}
    return own | further


def test_teachers_prompt_is_compared_by_the_judge_and_reported(workplace: Path) -> None:
    plan = make_plan(workplace, "gain", **with_teacher(teacher_gain_records=3, teacher_context="advice"))
    assert list_stages(plan, 1)[:4] == ["sample", "generate", "judge", "compare"]
    assert run_loop(plan, run=run_in_process) is True
    found = json.loads((workplace / "gain" / "iteration-1" / "teacher_gain.json").read_text())
    assert (found["num_records"], found["teacher_context"]) == (3, "advice")
    (row,) = json.loads((workplace / "gain" / "report.json").read_text())
    assert (row["teacher_gain"], row["gain_low"]) == (found["teacher_gain"], found["interval"][0])
    report = (workplace / "gain" / "report.md").read_text()
    assert "teacher's gain" in report
    assert all(warning in report for warning in found["warnings"])
    assert found["warnings"]


@pytest.mark.parametrize(
    "further",
    [
        {"objective": "self_distillation", "distillation": "sampled", "guidance": 0.5},
        {"objective": "redirect", "teacher_context": "advice", "teacher_sees_response": True, "threshold": 1.01},
    ],
    ids=["self_distillation", "redirect"],
)
def test_distributions_of_a_teacher_come_from_the_blame_stage(workplace: Path, further: dict[str, Any]) -> None:
    """Under FSDP and DeepSpeed, training cannot make them itself."""
    name = f"taught-{further['objective']}"
    plan = make_plan(workplace, name, **with_teacher(teacher_gain_records=0, drop_ineffective=True, **further))
    assert list_stages(plan, 1) == ["sample", "generate", "judge", "blame", "train", "merge"]
    assert run_loop(plan, run=run_in_process) is True
    folder = workplace / name / "iteration-1"
    scores = [one for one in read_token_scores(folder / "scores.jsonl") if not one.record.is_satisfactory]
    assert all(one.teacher is not None and one.judgment_rank is not None for one in scores)
    assert not (folder / "adapter" / "token_scores.jsonl").exists()  # training makes none
    metrics = collect_metrics(plan)[0]["stages"]["blame"]["metrics"]
    assert metrics["num_ineffective"] + len(scores) == NUM_RESPONSES - _count_satisfactory(folder)


def _count_satisfactory(folder: Path) -> int:
    return sum(record.is_satisfactory for record in load_records(folder / "records.jsonl"))


def test_marked_spans_need_no_blame_stage(workplace: Path) -> None:
    plan = make_plan(workplace, "spans", **with_teacher(objective="redirect", detector="spans"))
    assert "blame" not in list_stages(plan, 1)


@pytest.mark.parametrize("further", [{"teacher_gain_records": 0}, {"judge": "human"}])
def test_comparison_of_prompts_is_left_out_if_it_is_off_or_a_person_judges(
    workplace: Path, further: dict[str, Any]
) -> None:
    assert "compare" in list_stages(make_plan(workplace, "off", **with_teacher()), 1)
    assert "compare" not in list_stages(make_plan(workplace, "off", **with_teacher(**further)), 1)


def test_comparison_that_fails_before_any_verdict_stops_the_loop(workplace: Path) -> None:
    plan = make_plan(workplace, "broken", **with_teacher())

    def run(arguments: list[str], **options: Any) -> int:
        return 1 if "--compare_prompts" in arguments else run_in_process(arguments, **options)

    with pytest.raises(StageFailed):
        run_loop(plan, until=StageRef(1, "compare"), run=run)


def test_comparison_without_verdicts_or_unsatisfactory_records_does_not_stop_the_loop(
    workplace: Path, server: ChatServer
) -> None:
    settings = with_teacher(teacher_gain_records=2) | {"judge": judged_by(server)["judge"]}
    plan = make_plan(workplace, "silent", **settings)
    assert run_loop(plan, until=StageRef(1, "judge"), run=run_in_process) is False

    def fail(handler: Handler, number: int) -> bool:
        handler.answer(200, make_completion("", "stop"))
        return True

    server.fault = fail
    assert run_loop(plan, until=StageRef(1, "compare"), run=run_in_process) is False
    metrics = collect_metrics(plan)[0]["stages"]["compare"]["metrics"]
    assert (metrics["teacher_gain"], metrics["num_records"]) == (None, 0)
    server.fault, server.reply = None, lambda prompt: "Perfect."
    (workplace / "silent" / "judge.cache.sqlite").unlink()
    assert run_loop(plan, start=StageRef(1, "judge"), until=StageRef(1, "judge"), run=run_in_process) is False
    num_requests = len(server.requests)
    assert run_loop(plan, until=StageRef(1, "compare"), run=run_in_process) is False
    assert collect_metrics(plan)[0]["stages"]["judge"]["metrics"]["num_satisfactory"] == NUM_RESPONSES
    assert collect_metrics(plan)[0]["stages"]["compare"]["metrics"]["teacher_gain"] is None
    assert len(server.requests) == num_requests
