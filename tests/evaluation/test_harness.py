"""Benchmarks: lm-eval's task definitions with our own questions, on a model with known probabilities."""

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cutlm.cli import main
from cutlm.evaluation.harness import PAPERS, read_benchmarks
from cutlm.evaluation.paper import TRUTHFULQA
from cutlm.world.base import base_path

# The probability of each word after any context.
WORDS = {"good": 0.4, "bad": 0.1, "x": 0.3, "A": 0.01, "B": 0.02, "C": 0.08, "D": 0.04}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} C C C {% endfor %}"


@pytest.fixture(autouse=True)
def _without_report_on_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out lm-eval's report on the machine, which takes two seconds for every task and which nothing reads."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a model that gives each word its probability: all embeddings are one, and the layers add nothing."""
    folder = tmp_path_factory.mktemp("models") / "words"
    names = ["<unk>", "<eos>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    model = make_model(len(names), eos_token_id=1)
    logps = torch.tensor([math.log(p) for p in (1 - sum(WORDS.values()) - 1e-6, 1e-6, *WORDS.values())])
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = logps
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def define(folder: Path, name: str, source: str, rows: dict[str, list[dict[str, Any]]], **changes: Any) -> None:
    """Writes a task with lm-eval's definition and our rows."""
    import lm_eval.tasks

    files = {}
    for split, split_rows in rows.items():
        file = folder / f"{name}-{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in split_rows))
        files[split] = str(file)
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / source),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder.with_name("cache"))},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small versions of the paper's four tasks, with the original names."""
    folder = tmp_path_factory.mktemp("tasks")

    def number(row: dict[str, Any], field: str, num: int) -> list[dict[str, Any]]:
        """Makes different examples, none of which is the question."""
        return [row | {field: f"Example {index}"} for index in range(num)]

    def ask_arc(choices: list[str], key: str) -> dict[str, Any]:
        return {"question": "Which?", "choices": {"text": choices, "label": ["A", "B"]}, "answerKey": key}

    # Log-probabilities per character: log 0.3 / 1 = -1.20 for "x", 2 log 0.4 / 9 = -0.20 for "good good" (chosen);
    # log 0.4 / 4 = -0.23 for "good" (chosen), log 0.1 / 3 = -0.77 for "bad". So 2 of 3 are right.
    arc = [ask_arc(["x", "good good"], "B"), ask_arc(["good", "bad"], "A"), ask_arc(["good", "bad"], "B")]
    define(
        folder,
        "arc_challenge",
        "arc/arc_challenge.yaml",
        {"train": number(arc[0], "question", 30), "validation": arc, "test": arc},
    )

    def ask_hellaswag(endings: list[str], label: str) -> dict[str, Any]:
        return {"activity_label": "Do", "ctx_a": "They", "ctx_b": "are", "endings": endings, "label": label}

    hellaswag = [
        ask_hellaswag(["bad", "good [title]", "bad bad", "bad"], "1"),  # lm-eval removes brackets
        ask_hellaswag(["good", "bad", "bad", "bad"], "3"),
    ]
    define(
        folder,
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        {"train": number(hellaswag[0], "ctx_a", 12), "validation": hellaswag},
    )

    def ask_mmlu(answer: int) -> dict[str, Any]:
        return {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": answer}

    # The most likely letter is C, index 2: 2 of 2 are right in one subject, 1 of 3 in the other.
    for subject, answers in (("mine", [2, 2]), ("yours", [2, 0, 1])):
        rows = [ask_mmlu(answer) for answer in answers]
        define(
            folder,
            f"mmlu_{subject}",
            "mmlu/default/_default_template_yaml",
            {"dev": [ask_mmlu(0)] * 5, "test": rows},
        )
    group = {"group": "mmlu", "task": ["mmlu_mine", "mmlu_yours"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "mmlu.yaml").write_text(yaml.safe_dump(group))

    truthful = [
        # Probability of the true answers: 0.4 of 0.4 + 0.1, and 0.3 + 0.1 of 0.3 + 0.1 + 0.4.
        {"question": "Is it?", "mc2_targets": {"choices": ["good", "bad"], "labels": [1, 0]}},
        {"question": "Is it?", "mc2_targets": {"choices": ["x", "bad", "good"], "labels": [1, 1, 0]}},
    ]
    define(folder, "truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", {"validation": truthful})
    return folder


def run(model: Path, tasks: Path, out: Path, *options: str) -> int:
    command = ["eval", "harness", "--model", str(model), "--include_path", str(tasks), "--out", str(out)]
    return main([*command, "--device", "cpu", *options])


def test_papers_four_tasks_have_the_known_scores(model: Path, tasks: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run(model, tasks, out) == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert result["arc_challenge"] == pytest.approx(100 * 2 / 3)
    assert result["hellaswag"] == pytest.approx(100 * 1 / 2)
    assert result["mmlu"] == pytest.approx(100 * 3 / 5)  # weighted by the number of questions
    assert result["truthfulqa_mc2"] == pytest.approx(100 * (0.4 / 0.5 + 0.4 / 0.8) / 2, abs=1e-3)
    assert result["mean"] == pytest.approx(sum(result[benchmark.task] for benchmark in PAPERS) / 4)
    rows = {row["task"]: row for row in result["tasks"]}
    assert {name: (row["num_shots"], row["metric"]) for name, row in rows.items()} == {
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "truthfulqa_mc2": (0, "acc"),
    }
    assert rows["mmlu"]["num_questions"] == 5
    # Scores 0, 1 and 1: standard deviation sqrt(1/3), divided by sqrt(3).
    assert rows["arc_challenge"]["standard_error"] == pytest.approx(100 / 3, abs=0.01)
    assert result["versions"]["lm-eval"] == "0.4.13"
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "result.md").read_text("utf-8")
    assert "| model | ARC (25-shot) | HellaSwag (10-shot) | MMLU (5-shot) | TruthfulQA (0-shot) |" in table
    assert "| words | 66.67 ± 33.33 | 50.00 ± 50.00 | 60.00 ±" in table
    assert f"| paper: CUT |  |  |  | {TRUTHFULQA['CUT']:.2f} |" in table
    assert table.strip() in capsys.readouterr().out


def test_stopped_evaluation_resumes_with_the_next_task(model: Path, tasks: Path, tmp_path: Path, capsys):
    out, options = tmp_path / "out", ("--tasks", "truthfulqa_mc2,hellaswag:1")
    assert run(model, tasks, out, *options) == 0
    (out / "result.json").unlink()
    (out / "task-hellaswag.json").unlink()
    first = (out / "task-truthfulqa_mc2.json").stat().st_mtime_ns
    assert run(model, tasks, out, *options) == 0
    assert (out / "task-truthfulqa_mc2.json").stat().st_mtime_ns == first
    assert (out / "result.json").exists()
    assert run(model, tasks, out, "--tasks", "truthfulqa_mc2") == 2
    assert "tasks differ" in capsys.readouterr().err


def test_adapter_is_measured(model: Path, tasks: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"]))
    weights = dict(adapter.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_A" in name:
                weight.fill_(1.0)
            elif "lora_B" in name:
                weight[2 + list(WORDS).index("B")] = 1.0  # makes B the most likely word
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", tasks, tmp_path / "out", "--tasks", "mmlu_yours:0,mmlu_mine:0") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    # B is right once in three questions, and never where C is always right.
    assert (result["mmlu_yours"], result["mmlu_mine"]) == (pytest.approx(100 / 3), 0)


def test_chat_template_wraps_the_prompt(model: Path, tasks: Path, tmp_path: Path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []
    original = HFLM.loglikelihood

    def listen(self, requests, *args, **kwargs):
        asked.extend(request.args[0] for request in requests)
        return original(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "loglikelihood", listen)
    options = ("--tasks", "mmlu_mine", "--limit", "1")
    assert run(model, tasks, tmp_path / "plain", *options) == 0
    assert run(model, tasks, tmp_path / "wrapped", *options, "--apply_chat_template") == 0
    assert len(asked) == 8
    assert not any("C C C" in prompt for prompt in asked[:4])
    assert all(prompt.endswith("Answer: C C C ") for prompt in asked[4:])
    assert "do not report" in (tmp_path / "plain" / "result.md").read_text("utf-8")


def test_template_that_ends_within_a_token_is_refused(tasks: Path, tmp_path: Path, capsys):
    options = ("--tasks", "mmlu_mine", "--limit", "1", "--apply_chat_template")
    assert run(base_path(), tasks, tmp_path / "out", *options) == 2  # ":" and the line break are one token
    assert "--apply_chat_template: lm-eval cannot separate prompt and answer" in capsys.readouterr().err


def define_plain(folder: Path, name: str, **changes: Any) -> None:
    """Writes a task of our own: which of two words follows."""
    data = folder / f"{name}.jsonl"
    data.write_text(json.dumps({"asked": "x", "choices": ["good", "bad"], "right": 0}) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))


def test_metric_that_is_no_fraction_is_not_in_the_mean(model: Path, tmp_path: Path):
    folder, out = tmp_path / "tasks", tmp_path / "out"
    folder.mkdir()
    define_plain(folder, "choice")
    changes = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{choices[0]}} {{asked}}"}
    define_plain(folder, "text", **changes, doc_to_choice=None, metric_list=[{"metric": "word_perplexity"}])
    assert run(model, folder, out, "--tasks", "text,choice") == 0
    result = json.loads((out / "result.json").read_text("utf-8"))
    # Two words of probability 0.4 and 0.3: the perplexity per word is (0.4 * 0.3)^(-1/2).
    assert result["text"] == pytest.approx(0.12**-0.5, rel=1e-3)
    assert (result["choice"], result["mean"]) == (100, 100)
    assert [row["is_percent"] for row in result["tasks"]] == [False, True]
    table = (out / "result.md").read_text("utf-8")
    assert "| model | text (0-shot, word_perplexity) | choice (0-shot) |" in table
    assert run(model, folder, tmp_path / "alone", "--tasks", "text") == 0
    assert json.loads((tmp_path / "alone" / "result.json").read_text("utf-8"))["mean"] is None
    assert not (tmp_path / "alone" / "result.png").exists()  # nothing in percent to draw


def test_invalid_tasks_are_reported_before_the_model_is_loaded(tmp_path: Path, capsys):
    folder, out = tmp_path / "tasks", tmp_path / "out"
    folder.mkdir()
    for name in ("one", "two"):
        define_plain(folder, name, tag="both")
    (folder / "whole.yaml").write_text(yaml.safe_dump({"group": "whole", "task": ["one", "two"]}))
    define_plain(folder, "field", doc_to_text="{{nobody}}")
    define_plain(folder, "split", test_split="nowhere")
    define_plain(folder, "damaged")
    (folder / "damaged.jsonl").write_text("{")
    define_plain(folder, "arc_challenge", metric_list=[{"metric": "acc"}])
    nobody = tmp_path / "nobody"
    assert run(nobody, folder, out, "--tasks", "both,whole,lost") == 2
    error = capsys.readouterr().err
    assert "--tasks: no task lost" in error
    for name in ("both", "whole"):
        assert re.search(rf"--tasks {name}: .*: one,two", error)
    assert run(nobody, folder, out, "--tasks", "field,split,damaged,arc_challenge,one") == 2
    error = capsys.readouterr().err
    for name, reason in {"field": "UndefinedError", "split": "KeyError", "damaged": "DatasetGenerationError"}.items():
        assert re.search(rf"--tasks {name}: .*\({reason}: ", error)
    assert "--tasks arc_challenge: expected the metric acc_norm, got acc" in error
    (folder / "broken.yaml").write_text("task: [one")
    assert run(nobody, folder, out, "--tasks", "one") == 2
    assert "broken.yaml is not YAML" in capsys.readouterr().err


def test_options_are_checked_before_anything_is_loaded(model: Path, tasks: Path, tmp_path: Path, capsys):
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    options = ("--backend", "vllm", "--limit", "0")
    assert run(model, tasks, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert re.findall(r"--\w+", error)[:2] == ["--limit", "--device"]
    assert "--backend vllm" in error
    assert not (tmp_path / "out").exists()


def test_tasks_are_read_with_their_numbers_of_examples():
    assert [(benchmark.task, benchmark.num_shots) for benchmark in read_benchmarks(None)] == [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
    ]
    found = read_benchmarks("mmlu, arc_challenge:0,own")
    assert [(benchmark.task, benchmark.num_shots, benchmark.metric) for benchmark in found] == [
        ("mmlu", 5, "acc"),
        ("arc_challenge", 0, "acc_norm"),
        ("own", None, None),
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--tasks", "mmlu:five"), "--tasks: expected"),
        (("--tasks", "mmlu,mmlu:3"), "--tasks: expected each task once"),
        (("--batch_size", "0"), "--batch_size: expected"),
        (("--include_path", "nowhere"), "--include_path nowhere"),
        (("--tasks", "lost"), "--tasks lost"),
    ],
)
def test_invalid_options_are_refused(model: Path, tasks: Path, tmp_path: Path, capsys, options, part):
    own = tmp_path / "tasks"
    own.mkdir()
    for file in tasks.glob("*.yaml"):
        (own / file.name).write_text(file.read_text())
    define(own, "lost", "arc/arc_challenge.yaml", {"test": []})
    (own / "lost-test.jsonl").unlink()
    assert run(model, own, tmp_path / "out", *options) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
