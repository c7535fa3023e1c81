"""What a trained model says of itself, from `cutlm train` through `cutlm merge`, and pushing it to the hub."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cutlm.cli import main
from cutlm.errors import UserError
from cutlm.training import checkpoints
from cutlm.training.config import CUTConfig
from cutlm.training.facts import hash_rows
from cutlm.training.trainer import CUTTrainer

ROWS = [
    {
        "instruction": f"Name city {index}.",
        "output": f"City {index}.",
        "judgment": f"There is no city {index}." if index < 3 else None,
    }
    for index in range(5)
]


def run_training(base: Path, folder: Path, *options: str, command: str = "train") -> int:
    data = folder / "records.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    given = {
        "model_name_or_path": base,
        "data": data,
        "output_dir": folder / "out",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 1,
        "learning_rate": 0.002,
    }
    return main([command, *(f"--{name}={value}" for name, value in given.items()), *options])


def test_the_card_of_an_adapter_and_of_its_merge(base: Path, tmp_path: Path) -> None:
    local = ["--eval_data", str(tmp_path / "records.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"]
    assert run_training(base, tmp_path, "--lora_r=4", "--detector=frozen", *local) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    facts = card.data.cutlm
    assert (card.data.library_name, facts["kind"], facts["objective"]) == ("peft", "adapter", "cut")
    assert facts["settings"] == {"detector": "frozen", "max_steps": 1, "learning_rate": 0.002}
    assert facts["lora"]["r"] == 4
    run = json.loads((tmp_path / "out" / "cutlm_run.json").read_text())
    assert facts["data"] == {
        "num_records": 5,
        "num_satisfactory": 2,
        "num_unsatisfactory": 3,
        "num_left_out": 0,
        "sha256": run["data_sha256"],
    }
    assert facts["training"]["num_steps"] == 1
    report = json.loads((tmp_path / "out" / "token_scores.jsonl.report.json").read_text())
    assert facts["sensitivity"] == report["sensitivity"]
    assert facts["evaluation"]["loss"] > 0
    assert card.data.eval_results[0].metric_type == "loss"
    assert str(tmp_path) not in card.content, "no path of this machine"

    assert main(["merge", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers"
    changed = {"kind": "merged", "merge": {"dtype": "float32"}}
    assert merged.data.cutlm == facts | changed
    assert str(tmp_path) not in merged.content


def test_the_card_of_the_best_model_has_its_evaluation(base: Path, tmp_path: Path) -> None:
    options = ["--eval_data", str(tmp_path / "records.jsonl"), "--eval_strategy=steps", "--eval_steps=1"]
    options += ["--max_steps=3", "--save_strategy=steps", "--save_steps=1", "--load_best_model_at_end=true"]
    # The loss falls, so this takes the first checkpoint for the best one.
    options += ["--metric_for_best_model=loss", "--greater_is_better=true"]
    assert run_training(base, tmp_path, *options) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = {line["step"]: line["eval_loss"] for line in state["log_history"] if "eval_loss" in line}
    assert (state["best_global_step"], len(set(losses.values()))) == (1, 3)
    for folder, step in (("out", 1), ("out/checkpoint-3", 3)):
        facts = ModelCard.load(tmp_path / folder / "README.md").data.cutlm
        assert facts["evaluation"]["loss"] == losses[step]
        assert facts["training"]["num_steps"] == step


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_code_in_a_card_runs(kind: str, base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run_training(base, tmp_path, f"--use_peft={kind == 'adapter'}") == 0
    monkeypatch.chdir(tmp_path)
    tokens = MarkdownIt().parse(ModelCard.load("out/README.md").text)
    (code,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    capsys.readouterr()
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=2, do_sample=False"), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_card_has_the_license_of_the_base(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "licensed"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/parent\n---\n")
    assert run_training(copy, tmp_path, "--use_peft=false") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "org/parent"
    assert card.data.base_model_relation == "finetune"


@pytest.mark.parametrize(("command", "role"), [("train-judge", "judge"), ("train-detector", "detector")])
def test_the_card_says_what_other_models_are_for(command: str, role: str, base: Path, tmp_path: Path) -> None:
    assert run_training(base, tmp_path, command=command) == 0
    folder = tmp_path / "out" if role == "judge" else tmp_path / "out" / "detector-1"
    card = ModelCard.load(folder / "README.md")
    assert card.data.cutlm["role"] == role
    assert role in card.data.tags
    assert ("cutlm judge" if role == "judge" else "cutlm blame") in card.text


def test_pairs_have_a_card(base: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name a city.", "output": text, "judgment": judgment}
        for text, judgment in [("Rome.", None), ("Rome!", "No exclamation mark."), ("Red.", "This is a colour.")]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = [f"--data={tmp_path / 'pairs.jsonl'}", "--objective=dpo", "--dpo_beta=0.2"]
    assert run_training(base, tmp_path, *options) == 0
    facts = ModelCard.load(tmp_path / "out" / "README.md").data.cutlm
    assert (facts["objective"], facts["settings"]["dpo_beta"]) == ("dpo", 0.2)
    assert (facts["data"]["num_records"], facts["data"]["num_pairs"]) == (3, 2)


def test_the_hash_of_rows_depends_on_their_ids_and_order() -> None:
    rows = [
        {"prompt_ids": [1, 2], "judged_prompt_ids": [1, 2, 3], "response_ids": [4], "location": "a:1"},
        {"prompt_ids": [1], "judged_prompt_ids": None, "response_ids": [2, 4], "location": "a:2"},
    ]
    known = hash_rows(Dataset.from_list(rows))
    assert known == hash_rows(Dataset.from_list([row | {"location": "b"} for row in rows]))
    assert known == hash_rows(Dataset.from_list(rows[::-1]).select([1, 0]))
    others = [rows[::-1], rows[:1], [rows[0] | {"prompt_ids": [1], "response_ids": [2, 4]}, rows[1]]]
    others.append([rows[0], rows[1] | {"judged_prompt_ids": []}])
    assert len({known, *(hash_rows(Dataset.from_list(other)) for other in others)}) == 5


# ---- Pushing ----


class Hub:
    """A hub in memory: what was uploaded, or the error that it raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uploads: list[dict[str, Any]] = []
        self.create_error: Exception | None = None
        self.upload_error: Exception | None = None
        monkeypatch.setattr(checkpoints, "HfApi", lambda: self)
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: self)

    def create_repo(self, name: str, **_: Any) -> Any:
        if self.create_error:
            raise self.create_error
        return huggingface_hub.RepoUrl(f"https://huggingface.co/org/{name.rpartition('/')[2]}")

    def upload_folder(self, **given: Any) -> Any:
        if self.upload_error:
            raise self.upload_error
        names = [path.relative_to(given["folder_path"]).as_posix() for path in Path(given["folder_path"]).rglob("*")]
        kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=given["ignore_patterns"])
        self.uploads.append(given | {"names": set(kept)})
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/org/out/commit/1", commit_message="m", commit_description="", oid="1"
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


OFFLINE = [ConnectionError("[Errno -2] Name or service not known"), huggingface_hub.errors.OfflineModeIsEnabled("off")]


def test_a_push_has_the_model_and_its_card_and_no_records(base: Path, tmp_path: Path, hub: Hub, capsys) -> None:
    options = [
        "--push_to_hub",
        "--hub_model_id=org/out",
        "--detector=frozen",
        "--save_strategy=steps",
        "--save_steps=1",
    ]
    assert run_training(base, tmp_path, *options) == 0
    (upload,) = hub.uploads
    assert upload["repo_id"] == "org/out"
    assert {"adapter_model.safetensors", "README.md", "cutlm_probe.json", "tokenizer.json"} <= upload["names"]
    assert not [
        name for name in upload["names"] if "token_scores" in name or "checkpoint" in name or "cutlm_train" in name
    ]
    assert capsys.readouterr().out.count("Pushed to https://huggingface.co/org/out\n") == 1
    assert ModelCard.load(tmp_path / "out" / "README.md").text.startswith("\n# org/out\n")


@pytest.mark.parametrize("error", OFFLINE, ids=["no network", "offline"])
def test_a_hub_that_cannot_be_reached_is_reported_before_training(
    error, base, tmp_path: Path, hub: Hub, capsys
) -> None:
    hub.create_error = error
    assert run_training(base, tmp_path, "--push_to_hub") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "push_to_hub" in line]) == 1
    assert str(error) in lines[-1]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error", OFFLINE, ids=["no network", "offline"])
def test_what_was_trained_is_kept_if_the_push_fails(error, base: Path, tmp_path: Path, hub: Hub, capsys) -> None:
    hub.upload_error = error
    assert run_training(base, tmp_path, "--push_to_hub", "--hub_model_id=org/out") == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "push_to_hub" in line]
    assert str(error) in line
    assert f"hf upload org/out {tmp_path / 'out'}" in line
    for name in ("adapter_model.safetensors", "README.md", "trainer_state.json"):
        assert (tmp_path / "out" / name).is_file()
    assert "Traceback" not in captured.err


def test_in_python_a_failed_push_raises_after_saving(tmp_path: Path, hub: Hub) -> None:
    from tiny import make_model, make_tokenizer

    tokenizer = make_tokenizer("bpe")
    config = CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no")
    trainer = CUTTrainer(make_model(len(tokenizer)), config, ROWS, processing_class=tokenizer)
    trainer.push_to_hub()
    assert "model.safetensors" in hub.uploads[0]["names"]
    assert not (Path.cwd() / "None").exists()
    hub.upload_error = ConnectionError("gone")
    (tmp_path / "README.md").unlink()
    with pytest.raises(UserError, match="gone"):
        trainer.push_to_hub()
    data = ModelCard.load(tmp_path / "README.md").data.cutlm["data"]
    assert re.fullmatch("[0-9a-f]{64}", data["sha256"])


def test_pushing_checkpoints_is_refused(base: Path, tmp_path: Path, capsys) -> None:
    assert run_training(base, tmp_path, "--push_to_hub", "--hub_strategy=all_checkpoints") == 2
    assert "hub_strategy: expected end" in capsys.readouterr().err


def test_a_card_never_has_a_key(base: Path, tmp_path: Path, hub: Hub) -> None:
    from tiny import make_model, make_tokenizer

    key = "hf_canary0123456789"
    tokenizer = make_tokenizer("bpe")
    config = CUTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", push_to_hub=True, hub_token=key)
    trainer = CUTTrainer(make_model(len(tokenizer)), config, ROWS, processing_class=tokenizer)
    trainer.save_model()
    assert hub.uploads[0]["token"] == key
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
