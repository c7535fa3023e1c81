"""Training on flags that are known before training: by a frozen model, from token scores, or from marked spans."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options, run_main, run_ranks, write_lines
from reference import score_response
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, save_tiny_model
from transformers import AutoTokenizer, BitsAndBytesConfig

import cutlm.training.dataset as dataset
from cutlm import CUTConfig, CUTTrainer
from cutlm.chat.local import LocalEngine
from cutlm.cli import main
from cutlm.data.records import JudgedRecord, as_records
from cutlm.errors import ConfigError, DataError, UserError
from cutlm.flagging.detector import FlagSettings
from cutlm.flagging.report import read_sensitivity
from cutlm.flagging.token_scores import TokenScores, read_token_scores, write_token_scores
from cutlm.generation.local import Sampling
from cutlm.model.loading import load_model, load_tokenizer
from cutlm.training.dataset import ScoresFile, prepare_data

SATISFACTORY = (1, 4, 6)
RECORDS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {index}.",
        "output": "The capital is Sydney, a large city." + " So is it." * (index % 3),
        "judgment": None if index in SATISFACTORY else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(8)
]
SETTINGS = ON_CPU | {"save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 8}
TOKENIZER = make_tokenizer("bpe")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with `records.jsonl` and its token scores, `scores.jsonl`."""
    folder = tmp_path_factory.mktemp("frozen")
    data = write_lines(folder / "records.jsonl", RECORDS)
    assert main(["blame", *list_options(model=base, data=data, out=folder / "scores.jsonl")]) == 0
    return folder


@pytest.fixture
def scores(files: Path) -> list[TokenScores]:
    return read_token_scores(files / "scores.jsonl")


@pytest.fixture
def num_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call of `score_rows` by training, but not with foreign judgments, the number of rows that it scores."""
    calls: list[int] = []
    original = dataset.score_rows

    def count(model: Any, rows: Any, **options: Any) -> Any:
        if " with the judgment of " not in rows[0]["location"]:
            calls.append(len(rows) - len(options.get("done", ())))
        return original(model, rows, **options)

    monkeypatch.setattr(dataset, "score_rows", count)
    return calls


def make_trainer(folder: Path, rows: Any, model: Any = None, tokenizer: Any = TOKENIZER, **settings: Any) -> CUTTrainer:
    args = CUTConfig(output_dir=str(folder), **SETTINGS | settings)
    return CUTTrainer(model or make_model(len(tokenizer)), args, rows, processing_class=tokenizer)


def list_train_options(base: Path, data: Path, out: Path, **settings: Any) -> list[str]:
    values = SETTINGS | {"model_name_or_path": base, "data": data, "output_dir": out} | settings
    return ["train", *list_options(**values)]


# ---- Flags of the model before training ----


def test_the_loss_is_a_mean_over_all_tokens_with_flags_of_the_frozen_model(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, RECORDS)
    trainer = make_trainer(tmp_path, RECORDS, detector="frozen", threshold=1.05, unlikelihood_weight=0.5, gamma=0.5)
    total, num_tokens, num_flagged = 0.0, 0, 0
    model = trainer.model
    for before, row in zip(plain.train_dataset, trainer.train_dataset, strict=True):
        assert row["judged_prompt_ids"] is None
        without = score_response(model, before["prompt_ids"], before["response_ids"])
        if before["judged_prompt_ids"] is None:
            total -= sum(without)
        else:
            judged = score_response(model, before["judged_prompt_ids"], before["response_ids"])
            flags = [q - p > math.log(1.05) for p, q in zip(without, judged, strict=True)]
            assert row["is_flagged"] == flags
            num_flagged += sum(flags)
            for p, q, is_flagged in zip(without, judged, flags, strict=True):
                total -= 0.5 * math.exp(0.5 * q) * math.log1p(-math.exp(p)) if is_flagged else p
        num_tokens += len(without)
    assert num_flagged > 0
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / num_tokens, rel=1e-5)


def test_training_does_not_change_the_flags(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORDS, detector="frozen", max_steps=4, learning_rate=1e-1)
    before = [row["is_flagged"] for row in trainer.train_dataset]
    trainer.train()
    assert [row["is_flagged"] for row in trainer.train_dataset] == before
    trained = make_trainer(tmp_path, RECORDS, trainer.model, detector="frozen")
    assert [row["is_flagged"] for row in trained.train_dataset] != before, "the trained model would flag otherwise"


def test_the_judged_context_is_kept_if_its_likelihood_is_learned(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORDS, detector="frozen", use_judged_loss=True)
    rows = list(trainer.train_dataset)
    assert [row["judged_prompt_ids"] is None for row in rows] == [row["judgment"] is None for row in RECORDS]
    loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
    plain = make_trainer(tmp_path, RECORDS)
    expected_loss, expected = plain.compute_loss(plain.model, plain.data_collator(rows), return_outputs=True)
    # Before the first step the frozen detector and the current one are the same model.
    assert outputs.is_flagged.tolist() == expected.is_flagged.tolist()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"use_contrast_loss": False}, SATISFACTORY),
        ({"use_satisfactory_loss": False}, set(range(8)) - set(SATISFACTORY)),
    ],
)
def test_records_of_an_excluded_part_of_the_loss_are_left_out_and_counted(
    tmp_path: Path, settings: dict[str, Any], kept: Any
) -> None:
    trainer = make_trainer(tmp_path, RECORDS, detector="frozen", **settings)
    assert [row["location"] for row in trainer.train_dataset] == [f"train_dataset[{index}]" for index in sorted(kept)]
    assert trainer.num_left_out == 8 - len(kept)
    assert any(notice.startswith(f"train_dataset: {8 - len(kept)} records ") for notice in trainer.notices)


def test_splitting_a_step_into_micro_batches_does_not_change_it(tmp_path: Path) -> None:
    losses, gradients = [], []
    for batch_size, num_batches in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(tmp_path, RECORDS, detector="frozen")
        rows = list(trainer.train_dataset)
        batches = [trainer.data_collator(rows[start : start + batch_size]) for start in range(0, 8, batch_size)]
        fetched, counts = trainer.get_batch_samples(iter(batches), num_batches, trainer.args.device)
        parts = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts) for batch in fetched]
        torch.stack(parts).sum().backward()
        losses.append(sum(part.item() for part in parts))
        gradients.append(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_data_without_unsatisfactory_records_can_be_trained(tmp_path: Path) -> None:
    records = as_records([row | {"judgment": None} for row in RECORDS], "x").records
    trainer = make_trainer(tmp_path, records, detector="frozen")
    trainer.train()
    assert trainer.state.global_step == 1


def test_sharded_weights_cannot_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    args = CUTConfig(detector="frozen", **ON_CPU)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    row = {"prompt_ids": [1, 2], "judged_prompt_ids": [1, 2, 3], "response_ids": [4, 5]}
    with pytest.raises(ConfigError, match=r"^detector: .* run cutlm blame first"):
        CUTTrainer(make_model(10), args, [row])


def test_marked_spans_become_flags(tmp_path: Path) -> None:
    rows = [row | {"wrong_spans": None if row["judgment"] is None else [[15, 21]]} for row in RECORDS]
    trainer = make_trainer(tmp_path, rows, detector="spans")
    for row, source in zip(trainer.train_dataset, RECORDS, strict=True):
        if source["judgment"] is None:
            assert not any(row["is_flagged"] or [])
            continue
        flagged = [
            token for token, is_flagged in zip(row["response_ids"], row["is_flagged"], strict=True) if is_flagged
        ]
        assert TOKENIZER.decode(flagged).strip() == "Sydney"


# ---- One function makes all flags ----


def flag_everywhere(folder: Path, base: Path, settings: FlagSettings) -> dict[str, list[tuple[Any, Any]]]:
    """Flags and weights of the unsatisfactory records: by the command, by training twice and by the chat."""
    values = {name: getattr(settings, name) for name in ("threshold", "unlikelihood_weight", "gamma")}
    data, out = write_lines(folder / "data.jsonl", RECORDS), folder / "blame.jsonl"
    assert main(["blame", *list_options(model=base, data=data, out=out, **values)]) == 0
    model, tokenizer = load_model(base), load_tokenizer(base)
    args = CUTConfig(output_dir=str(folder), detector="frozen", **SETTINGS | values)
    records = as_records(RECORDS, "data").records
    files = {"training, in memory": None, "training, stored": ScoresFile(folder / "scores.jsonl")}
    flags = {
        name: prepare_data(records, "train_dataset", args, model, tokenizer, scores_file=file).rows
        for name, file in files.items()
    }
    engine = LocalEngine(model, tokenizer, "alpaca", Sampling(max_new_tokens=1), settings)
    found = {
        name: [
            (row["is_flagged"], row["weights"]) for row, record in zip(rows, records, strict=True) if record.judgment
        ]
        for name, rows in flags.items()
    }
    found["blame"] = [
        (scores.is_flagged, scores.weights) for scores in read_token_scores(out) if scores.record.judgment
    ]
    chat = (engine.blame(record)[0] for record in records if record.judgment)
    return found | {"chat": [(scores.is_flagged, scores.weights) for scores in chat]}


def test_blame_training_and_chat_flag_alike(tmp_path: Path, base: Path) -> None:
    found = flag_everywhere(tmp_path, base, FlagSettings(threshold=1.2, unlikelihood_weight=0.5, gamma=0.5))
    assert len(found["blame"]) == 5
    assert any(any(flags) for flags, _ in found["blame"])
    assert found["training, in memory"] == found["blame"]
    assert found["training, stored"] == found["blame"]
    # The chat scores one record at a time, which may change the last digit of a log-probability.
    for (flags, weights), (expected_flags, expected_weights) in zip(found["chat"], found["blame"], strict=True):
        assert flags == expected_flags
        assert weights == pytest.approx(expected_weights, rel=1e-5)


def test_blame_training_and_chat_share_one_function(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flag_last(logps_without: Any, logps_with: Any, settings: FlagSettings, num_template_tokens: int = 0) -> Any:
        rest = len(logps_without) - 1
        return [False] * rest + [True], [0.0] * rest + [0.125]

    monkeypatch.setattr("cutlm.flagging.detector.flag_response", flag_last)
    monkeypatch.setattr(dataset, "flag_response", flag_last)
    for path, found in flag_everywhere(tmp_path, base, FlagSettings()).items():
        assert [(sum(flags), flags[-1], sum(weights)) for flags, weights in found] == [(1, True, 0.125)] * 5, path


# ---- Token scores as training data ----


def test_training_with_a_frozen_detector_equals_training_on_blame_output(
    tmp_path: Path, base: Path, files: Path
) -> None:
    for name, data, settings in (("one", "records.jsonl", {"detector": "frozen"}), ("two", "scores.jsonl", {})):
        steps = {"max_steps": 2, "per_device_train_batch_size": 4, "seed": 3}
        assert main(list_train_options(base, files / data, tmp_path / name, **steps, **settings)) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    assert any(value.abs().sum() > 0 for key, value in one.items() if "lora_B" in key)


def test_settings_must_be_those_of_the_scores(tmp_path: Path, scores: list[TokenScores]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trainer(tmp_path, scores, threshold=50, gamma=0.0)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["threshold", "gamma"]
    others = [replace(row, threshold=1.2) for row in scores]
    make_trainer(tmp_path, others, threshold=1.2)
    make_trainer(tmp_path, others)  # a default is no request


@pytest.mark.parametrize("settings", [{"detector": "current"}, {"objective": "hindsight"}])
def test_scores_are_refused_by_settings_that_ignore_their_flags(
    tmp_path: Path, base: Path, files: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    assert main(list_train_options(base, files / "scores.jsonl", tmp_path / "out", **settings)) == 2
    assert "token scores" in capsys.readouterr().err


def test_edited_flags_are_trained_on(tmp_path: Path, scores: list[TokenScores]) -> None:
    rows = [row.to_row() for row in scores]
    rest = len(rows[0]["token_ids"]) - 1
    rows[0] |= {"is_flagged": [True] + [False] * rest, "weights": [0.75] + [0.0] * rest}
    trainer = make_trainer(tmp_path, read_token_scores(write_lines(tmp_path / "edited.jsonl", rows)))
    assert trainer.train_dataset[0]["is_flagged"] == rows[0]["is_flagged"]
    assert trainer.train_dataset[0]["weights"] == rows[0]["weights"]
    assert trainer.args.detector == "frozen"


def test_scores_of_another_tokenizer_are_refused_or_mapped_by_characters(
    tmp_path: Path, scores: list[TokenScores]
) -> None:
    other = make_tokenizer("llama")
    with pytest.raises(DataError) as caught:
        make_trainer(tmp_path, scores, tokenizer=other)
    assert [problem.partition(": made")[0] for problem in caught.value.problems] == [
        f"train_dataset[{index}]: field 'tokenizer'" for index in range(8)
    ]
    assert "map_spans" in str(caught.value)
    trainer = make_trainer(tmp_path, scores, tokenizer=other, map_spans=True)
    assert any(any(row["is_flagged"]) for row in trainer.train_dataset)


def test_scores_that_do_not_fit_their_text_are_refused(tmp_path: Path, scores: list[TokenScores]) -> None:
    scores[1] = replace(scores[1], record=scores[1].record.model_copy(update={"output": "Canberra is."}))
    with pytest.raises(DataError) as caught:
        make_trainer(tmp_path, scores)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("train_dataset[1]: field 'token_ids'")


def test_scores_of_another_template_are_refused(tmp_path: Path, scores: list[TokenScores]) -> None:
    with pytest.raises(DataError, match=r"^train_dataset\[0\]: field 'template'") as caught:
        make_trainer(tmp_path, scores, tokenizer=make_tokenizer("bpe", chat=True), template="chat")
    assert "--template alpaca" in str(caught.value)
    # If the template has the same name but other prompts, its name is no advice.
    changed = [replace(row, template="alpaca 0123456789abcdef") for row in scores]
    with pytest.raises(DataError, match=r"^train_dataset\[0\]: field 'template'") as caught:
        make_trainer(tmp_path, changed)
    assert "--template" not in str(caught.value)
    assert "map_spans" in str(caught.value)


def test_scores_to_evaluate_on_do_not_choose_the_detector(tmp_path: Path, scores: list[TokenScores]) -> None:
    args = CUTConfig(output_dir=str(tmp_path), **SETTINGS)
    model = make_model(len(TOKENIZER))
    with pytest.raises(ConfigError, match="token scores"):
        CUTTrainer(model, args, train_dataset=RECORDS, eval_dataset=scores, processing_class=TOKENIZER)
    trainer = CUTTrainer(model, args, train_dataset=scores, eval_dataset=scores, processing_class=TOKENIZER)
    assert trainer.args.detector == "frozen"
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("threshold", [1.1, "auto"])
def test_records_to_evaluate_on_are_flagged_as_the_scores_were(
    tmp_path: Path, base: Path, files: Path, threshold: Any
) -> None:
    out = tmp_path / "scores.jsonl"
    options = {"threshold": 3, "gamma": 0, "unlikelihood_weight": 0.5}
    assert main(["blame", *list_options(model=base, data=files / "records.jsonl", out=out, **options)]) == 0
    scores = read_token_scores(out)
    args = CUTConfig(output_dir=str(tmp_path), detector="frozen", threshold=threshold, **SETTINGS)
    trainer = CUTTrainer(load_model(base), args, scores, RECORDS, processing_class=load_tokenizer(base))
    assert any(any(row.is_flagged) for row in scores)
    for found, row in zip(trainer.eval_dataset, scores, strict=True):
        assert (found["is_flagged"] or [False] * len(row.is_flagged)) == row.is_flagged
        assert (found["weights"] or [0.0] * len(row.weights)) == row.weights


def test_scores_are_the_same_after_writing_and_reading(tmp_path: Path, scores: list[TokenScores]) -> None:
    write_token_scores(tmp_path / "again.jsonl", scores)
    assert read_token_scores(tmp_path / "again.jsonl") == scores


# ---- The scores file of a run ----

Prepare = Callable[..., dataset.PreparedData]


@pytest.fixture
def prepare(tmp_path: Path, base: Path) -> Prepare:
    """Prepare the records with a scores file; `change` edits the model first."""

    def run(
        rows: list[dict[str, Any]] = RECORDS, change: Callable[[Any], Any] = lambda model: None, **settings: Any
    ) -> dataset.PreparedData:
        overwrite = settings.pop("overwrite", False)
        model = load_model(base)
        change(model)
        args = CUTConfig(output_dir=str(tmp_path), detector="frozen", **SETTINGS | settings)
        locations = [f"data.jsonl:{number}" for number in range(1, len(rows) + 1)]
        records = as_records(rows, "data").records
        file = ScoresFile(tmp_path / "token_scores.jsonl", overwrite)
        return prepare_data(records, "train_dataset", args, model, load_tokenizer(base), locations, file)

    return run


def quantize_on_paper(model: Any) -> None:
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_length": 512}, "max_length"),
        ({"bf16": True}, "bf16"),
        ({"threshold": 1.5}, "threshold"),
        ({"change": lambda model: model.bfloat16()}, "dtype"),
        ({"change": quantize_on_paper}, "quantization"),
        ({"rows": RECORDS[:-1]}, "data"),
    ],
)
def test_scores_made_otherwise_are_refused_and_replaced_on_request(
    prepare: Prepare, tmp_path: Path, num_scored: list[int], settings: dict[str, Any], name: str
) -> None:
    prepare()
    before = (tmp_path / "token_scores.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        prepare(**settings)
    assert f"({name} differ)" in str(caught.value)
    assert "--overwrite_output_dir" in str(caught.value)
    assert (tmp_path / "token_scores.jsonl").read_bytes() == before
    assert len(num_scored) == 1
    first = prepare(**settings, overwrite=True)
    again = prepare(**settings)
    assert num_scored == [8, len(settings.get("rows", RECORDS))], "scored again on request, and then reused"
    assert again.rows.to_list() == first.rows.to_list()


def test_the_sensitivity_of_the_frozen_detector_is_stored_and_logged(prepare: Prepare, tmp_path: Path) -> None:
    data = prepare()
    report = json.loads((tmp_path / "token_scores.jsonl.report.json").read_text())
    assert data.sensitivity is not None
    assert report["sensitivity"] == asdict(data.sensitivity)
    assert data.sensitivity.num_records == len(RECORDS) - len(SATISFACTORY)
    assert data.sensitivity.flagged_share_own == pytest.approx(report["flagged_share"])
    assert prepare().sensitivity == data.sensitivity, "read from the file"
    noise = data.sensitivity.describe_noise()
    assert noise is not None, "a random model"
    assert sum(noise in notice for notice in data.notices) == 1


@pytest.mark.parametrize("settings", [{}, {"sensitivity_records": 0}])
def test_the_sensitivity_is_logged_before_training(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, RECORDS, detector="frozen", **settings)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "flag_signal" in line]
    assert [line["step"] for line in logged] == ([] if settings else [0])
    assert all("pairwise" in line for line in logged)


def test_training_on_token_scores_of_a_model_that_does_not_read_judgments_says_so_once(
    tmp_path: Path, base: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sensitivity = read_sensitivity(files / "scores.jsonl")
    assert sensitivity is not None
    noise = sensitivity.describe_noise()
    assert noise is not None
    assert main(list_train_options(base, files / "scores.jsonl", tmp_path / "out")) == 0
    assert capsys.readouterr().out.count(noise) == 1


def test_scores_are_reused_if_a_record_was_left_out(prepare: Prepare, num_scored: list[int]) -> None:
    rows = [*RECORDS, RECORDS[0] | {"output": "Sydney. " * 99}]
    for _ in range(2):
        data = prepare(rows, max_length=160)
        assert data.num_left_out == 1
        assert any(notice.startswith("data.jsonl:9: ") for notice in data.notices)
    assert num_scored == [8]


def test_edited_scores_are_not_replaced_unasked(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    path, header = tmp_path / "token_scores.jsonl", tmp_path / "token_scores.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["is_flagged"][0] = not rows[0]["is_flagged"][0]
    rows[0]["weights"][0] = 0.5
    edited = write_lines(path, rows).read_bytes()
    with pytest.raises(UserError, match=f"--data {path}"):
        prepare()
    assert path.read_bytes() == edited
    header.unlink()
    with pytest.raises(UserError, match=header.name):
        prepare()
    assert path.read_bytes() == edited
    prepare(overwrite=True)
    assert path.read_bytes() != edited


def test_scores_without_a_readable_header_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    header = tmp_path / "token_scores.json"
    header.write_text("[")
    with pytest.raises(UserError, match=header.name):
        prepare()
    prepare(overwrite=True)
    assert json.loads(header.read_text())["dtype"] == "torch.float32"


def test_a_run_that_died_before_it_wrote_the_header_is_resumed(
    prepare: Prepare, tmp_path: Path, num_scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "open_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    names = {"token_scores.jsonl", "token_scores.jsonl.report.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"token_scores.jsonl.partial"}
    prepare(threshold=1.5)  # flags are made of the stored log-probabilities
    assert num_scored == [8, 0]
    assert {path.name for path in tmp_path.iterdir()} == names | {"token_scores.json"}
    assert read_token_scores(tmp_path / "token_scores.jsonl")[0].threshold == 1.5


def test_a_partial_file_of_other_settings_is_replaced_on_request(prepare: Prepare, tmp_path: Path) -> None:
    partial = tmp_path / "token_scores.jsonl.partial"
    partial.write_text('{"max_length": 7}\n{"index": 0, "logps_without": [-1.0], "logps_with": null}\n')
    with pytest.raises(UserError, match=partial.name):
        prepare()
    prepare(overwrite=True)
    assert not partial.exists()


def test_fields_that_token_scores_would_overwrite_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    rows = [RECORDS[0], RECORDS[1] | {"tokenizer": "mine"}]
    with pytest.raises(DataError, match=r"^data\.jsonl:2: field 'tokenizer'"):
        prepare(rows)
    assert not list(tmp_path.iterdir())


def test_the_command_stores_scores_and_reuses_them(
    tmp_path: Path, base: Path, files: Path, num_scored: list[int]
) -> None:
    out = tmp_path / "out"
    options = list_train_options(base, files / "records.jsonl", out, detector="frozen")
    assert main(options) == 0
    assert main([*options, "--overwrite_output_dir", "true"]) == 0
    assert num_scored == [8]
    assert [scores.record.judgment for scores in read_token_scores(out / "token_scores.jsonl")] == [
        row["judgment"] for row in RECORDS
    ]
    for path in out.iterdir():
        if not path.name.startswith("token_scores"):
            path.unlink()
    assert main(options) == 0, "an output folder with scores alone counts as empty"
    assert num_scored == [8]


@pytest.mark.parametrize("problem", ["targets", "vocabulary", "context", "head"])
def test_problems_of_the_model_are_found_before_a_record_is_scored(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    size = len(TOKENIZER) - 200 * (problem == "vocabulary")
    make_model(size, max_position_embeddings=64 if problem == "context" else 2048).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    settings = {"lora_target_modules": "query"} if problem == "targets" else {}
    if problem == "head":
        monkeypatch.setattr(
            "cutlm.training.trainer.check_head", lambda model: (_ for _ in ()).throw(UserError("head: other"))
        )
    monkeypatch.setattr(dataset, "score_rows", lambda *_, **__: pytest.fail("scored"))
    out = tmp_path / "out"
    options = list_train_options(tmp_path / "base", files / "records.jsonl", out, detector="frozen", **settings)
    assert main(options) == 2
    expected = {
        "targets": "lora_target_modules: no module is named query",
        "vocabulary": f"tokenizer: expected token ids below {size}",
        "context": "max_length: expected at most the model's context of 64 tokens",
        "head": "head: other",
    }
    assert expected[problem] in capsys.readouterr().err
    assert not out.exists()
    if problem == "context":  # the advice can be followed
        monkeypatch.undo()
        assert main([*options, "--max_length", "64"]) == 0


def test_one_process_of_all_machines_scores_and_the_others_wait_for_it(tmp_path: Path, base: Path, files: Path) -> None:
    settings = {"detector": "frozen", "per_device_train_batch_size": 1}
    options = list_train_options(base, files / "records.jsonl", tmp_path / "out", **settings)
    # Each process is the first one of its machine; the machines share the folder.
    machines = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    results = run_ranks(run_main, options, **machines)
    assert [result.exit_code for result in results] == [0, 0], results
    assert ["records scored" in result.stdout for result in results] == [True, False]


def test_the_other_processes_report_that_the_first_one_failed(tmp_path: Path, base: Path, files: Path) -> None:
    (tmp_path / "token_scores.jsonl.partial").write_text("[]\n")
    options = list_train_options(base, files / "records.jsonl", tmp_path, detector="frozen")
    first, second = run_ranks(run_main, options, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert (first.exit_code, second.exit_code) == (2, 2), (first, second)
    assert "token_scores.jsonl.partial: " in first.stderr
    assert "token_scores.jsonl: expected the token scores of the first process" in second.stderr


# ---- Chat templates that write something before an answer ----


def make_channel_model(folder: Path) -> Path:
    """Save a tiny model whose chat template writes a channel before an answer and ends its turn in its own token."""
    save_tiny_model(folder, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<eos>"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}one two{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("detector", ["current", "frozen"])
def test_what_the_template_writes_is_never_flagged(tmp_path: Path, detector: str) -> None:
    folder = make_channel_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = [
        JudgedRecord(instruction=f"Name {number}.", output="Sydney is.", judgment="It is wrong.") for number in range(4)
    ]
    args = CUTConfig(output_dir=str(tmp_path / "out"), template="chat", detector=detector, threshold=1.0, use_cpu=True)
    trainer = CUTTrainer(str(folder), args, records, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    num = row["num_template_tokens"]
    assert tokenizer.decode(row["response_ids"][:num]) == "one two"
    assert row["response_ids"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    _, loss = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    flags = batch.get("is_flagged", loss.is_flagged).view(4, -1)
    assert not flags[:, :num].any()
    if detector == "current":
        ratios = loss.log_ratios.view(4, -1)
        assert (ratios[:, :num] > 0).any(), "the threshold alone would flag some"
        assert (flags[:, num:] == (ratios[:, num:] > 0)).all()
    assert flags[:, num:].any()
    assert trainer.processing_class.chat_template == tokenizer.chat_template
