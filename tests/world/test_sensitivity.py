"""The tiny world's base model reads the oracle's judgments."""

from pathlib import Path

from cutlm.api import blame
from cutlm.data.records import JudgedRecord
from cutlm.flagging.report import read_sensitivity
from cutlm.world.base import answer_tasks, base_path, load_base
from cutlm.world.judge import judge_task
from cutlm.world.tasks import list_tasks


def test_the_base_model_reads_the_judgments_of_the_oracle(tmp_path: Path) -> None:
    tasks = list_tasks("dev")[:100]
    answers = zip(tasks, answer_tasks(*load_base(), tasks), strict=True)
    records = [
        JudgedRecord(instruction=task.instruction, output=answer, judgment=judge_task(task, answer).judgment)
        for task, answer in answers
        if answer.strip()
    ]
    blame(base_path(), records, device="cpu", out=tmp_path / "scores.jsonl")
    sensitivity = read_sensitivity(tmp_path / "scores.jsonl")
    assert sensitivity is not None
    assert sensitivity.num_records > 20
    assert sensitivity.flag_signal is not None
    assert sensitivity.flag_signal > 0.6
    assert sensitivity.pairwise > 0.8
    assert sensitivity.describe_noise() is None
