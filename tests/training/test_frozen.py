"""Training on tokens that were blamed beforehand: by a frozen model, by a file, by a person's spans."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, save_tiny_model

from cutlm import CUTConfig, CUTTrainer
from cutlm.blame.token_scores import read_token_scores, write_token_scores
from cutlm.cli import main
from cutlm.data.records import as_records
from cutlm.errors import ConfigError, DataError

RECORDS = [
    {
        "instruction": f"Name a city, number {index}.",
        "output": "The capital is Sydney, a large city." + " So is it." * (index % 3),
        "judgment": None if index in (1, 4, 6) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(8)
]
SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    save_tiny_model(folder / "base")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    assert main(["blame", *_options(model=folder / "base", data=folder / "records.json", out=folder / "s.jsonl")]) == 0
    return folder


def _options(**values: object) -> list[str]:
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def _train(workplace: Path, name: str, data: str = "records.json", **settings: object) -> int:
    values = SETTINGS | {
        "model_name_or_path": workplace / "base",
        "data": workplace / data,
        "output_dir": workplace / name,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "seed": 3,
    }
    return main(["train", *_options(**values | settings)])


def _make_trainer(tmp_path: Path, rows: list, **settings: object) -> CUTTrainer:
    tokenizer = make_tokenizer("bpe")
    args = CUTConfig(output_dir=str(tmp_path), **SETTINGS | settings)
    return CUTTrainer(make_model(len(tokenizer)), args, train_dataset=rows, processing_class=tokenizer)


def _score(model: torch.nn.Module, prompt: list[int], response: list[int]) -> list[float]:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    locations = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return [logits[place].log_softmax(-1)[token].item() for place, token in zip(locations, response, strict=True)]


def test_the_loss_is_one_pool_of_tokens_with_flags_of_the_model_as_it_was(tmp_path):
    current = _make_trainer(tmp_path, RECORDS)
    trainer = _make_trainer(tmp_path, RECORDS, detector="frozen", threshold=1.05, unlikelihood_weight=0.5, gamma=0.5)
    total, num_tokens, num_flagged = 0.0, 0, 0
    model = trainer.model
    rows = list(zip(current.train_dataset, trainer.train_dataset, strict=True))
    for before, row in rows:
        assert row["judged_prompt_ids"] is None
        without = _score(model, before["prompt_ids"], before["response_ids"])
        if before["judged_prompt_ids"] is None:
            total -= sum(without)
        else:
            judged = _score(model, before["judged_prompt_ids"], before["response_ids"])
            flags = [q - p > math.log(1.05) for p, q in zip(without, judged, strict=True)]
            assert row["is_flagged"] == flags
            num_flagged += sum(flags)
            for p, q, is_flagged in zip(without, judged, flags, strict=True):
                total -= 0.5 * math.exp(0.5 * q) * math.log1p(-math.exp(p)) if is_flagged else p
        num_tokens += len(without)
    assert num_flagged > 0, "nothing was flagged, so nothing was tested"
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / num_tokens, rel=1e-5)


def test_flags_stay_those_of_the_model_as_it_was_while_it_is_trained(tmp_path):
    trainer = _make_trainer(tmp_path, RECORDS, detector="frozen", max_steps=4, learning_rate=1e-1)
    before = [row["is_flagged"] for row in trainer.train_dataset]
    trainer.train()
    assert [row["is_flagged"] for row in trainer.train_dataset] == before
    other = CUTTrainer(
        trainer.model,
        CUTConfig(output_dir=str(tmp_path), detector="frozen", **SETTINGS),
        train_dataset=RECORDS,
        processing_class=make_tokenizer("bpe"),
    )
    assert [row["is_flagged"] for row in other.train_dataset] != before, "training has moved the detector"


def test_the_context_with_the_judgment_comes_back_where_l2_is_asked_for(tmp_path):
    trainer = _make_trainer(tmp_path, RECORDS, detector="frozen", use_judged_loss=True)
    rows = list(trainer.train_dataset)
    assert [row["judged_prompt_ids"] is None for row in rows] == [row["judgment"] is None for row in RECORDS]
    loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
    plain = _make_trainer(tmp_path, RECORDS)
    want, expected = plain.compute_loss(plain.model, plain.data_collator(rows), return_outputs=True)
    # Before the first step the frozen detector and the current one are the same model.
    assert outputs.is_flagged.tolist() == expected.is_flagged.tolist()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"use_contrast_loss": False}, [1, 4, 6]), ({"use_satisfactory_loss": False}, [0, 2, 3, 5, 7])],
)
def test_records_of_a_part_that_is_off_are_left_out_and_counted(tmp_path, settings, kept):
    trainer = _make_trainer(tmp_path, RECORDS, detector="frozen", **settings)
    assert [row["location"] for row in trainer.train_dataset] == [f"train_dataset[{index}]" for index in kept]
    assert f"train_dataset: {8 - len(kept)} records of a part that is off are left out" in trainer.notices
    assert trainer.num_left_out == 8 - len(kept)


def test_the_same_step_however_it_is_cut_up(tmp_path):
    losses, gradients = [], []
    for batch_size, num_batches in ((8, 1), (2, 4), (1, 8)):
        trainer = _make_trainer(tmp_path, RECORDS, detector="frozen")
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


def test_blaming_while_training_and_training_on_a_file_of_blame_are_the_same(workplace):
    assert _train(workplace, "by_detector", detector="frozen") == 0
    assert _train(workplace, "by_file", data="s.jsonl") == 0
    one, other = (load_file(workplace / name / "adapter_model.safetensors") for name in ("by_detector", "by_file"))
    assert one.keys() == other.keys()
    assert all(one[key].equal(other[key]) for key in one)
    assert any(value.abs().sum() > 0 for key, value in one.items() if "lora_B" in key)


def test_the_scores_stay_beside_the_run_and_are_used_again(workplace, capsys):
    assert _train(workplace, "kept", detector="frozen") == 0
    scores = read_token_scores(workplace / "kept" / "token_scores.jsonl")
    assert [row.record.judgment for row in scores] == [row["judgment"] for row in RECORDS]
    capsys.readouterr()
    assert _train(workplace, "kept", detector="frozen", overwrite_output_dir=True) == 0
    assert "token_scores.jsonl holds the token scores of these records by this model" in capsys.readouterr().out
    assert _train(workplace, "kept", detector="frozen", threshold=1.5, overwrite_output_dir=True) == 0
    assert "are used again" not in capsys.readouterr().out
    assert read_token_scores(workplace / "kept" / "token_scores.jsonl")[0].threshold == 1.5


def test_settings_that_scores_were_not_made_with_are_refused(workplace, capsys):
    assert _train(workplace, "other", data="s.jsonl", threshold=50, gamma=0.0) == 2
    message = capsys.readouterr().err
    assert "threshold: the token scores were made with 1.1, got 50.0; leave it out, or blame the records" in message
    assert "gamma: the token scores were made with 1.0, got 0.0" in message
    made = _options(
        model=workplace / "base", data=workplace / "records.json", out=workplace / "s2.jsonl", threshold=1.2
    )
    assert main(["blame", *made]) == 0
    assert _train(workplace, "same", data="s2.jsonl", threshold=1.2) == 0
    assert _train(workplace, "unsaid", data="s2.jsonl") == 0


def test_scores_left_by_a_run_that_died_before_its_first_step_are_in_nobodys_way(workplace):
    folder = workplace / "died"
    folder.mkdir()
    (folder / "token_scores.jsonl").write_bytes((workplace / "s.jsonl").read_bytes())
    assert _train(workplace, "died", detector="frozen") == 0


def test_an_edited_flag_is_what_is_trained_on(workplace, tmp_path):
    scores = read_token_scores(workplace / "s.jsonl")
    rows = [row.to_row() for row in scores]
    rows[0]["is_flagged"] = [True] + [False] * (len(rows[0]["token_ids"]) - 1)
    rows[0]["weights"] = [0.75] + [0.0] * (len(rows[0]["token_ids"]) - 1)
    (tmp_path / "edited.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = _make_trainer(tmp_path, read_token_scores(tmp_path / "edited.jsonl"))
    assert trainer.train_dataset[0]["is_flagged"] == rows[0]["is_flagged"]
    assert trainer.train_dataset[0]["weights"] == rows[0]["weights"]
    assert trainer.args.detector == "frozen"


def test_scores_of_another_tokenizer_are_refused_or_taken_by_their_characters(workplace, tmp_path, capsys):
    other = make_tokenizer("llama")
    model = make_model(len(other))
    scores = read_token_scores(workplace / "s.jsonl")
    settings = SETTINGS | {"output_dir": str(tmp_path)}
    with pytest.raises(DataError, match=r"train_dataset\[0\]: field 'tokenizer': .* another tokenizer") as caught:
        CUTTrainer(model, CUTConfig(**settings), train_dataset=scores, processing_class=other)
    assert "set map_spans: true" in str(caught.value)
    trainer = CUTTrainer(model, CUTConfig(map_spans=True, **settings), train_dataset=scores, processing_class=other)
    assert any(any(row["is_flagged"]) for row in trainer.train_dataset)


def test_scores_that_do_not_belong_to_their_text_are_refused(workplace, tmp_path):
    scores = read_token_scores(workplace / "s.jsonl")
    scores[1] = replace(scores[1], record=scores[1].record.model_copy(update={"output": "Canberra is."}))
    with pytest.raises(DataError, match=r"train_dataset\[1\]: field 'token_ids': expected those of output"):
        _make_trainer(tmp_path, scores)


def test_scores_to_evaluate_on_do_not_change_what_is_trained(workplace, tmp_path):
    scores = read_token_scores(workplace / "s.jsonl")
    args = CUTConfig(output_dir=str(tmp_path), **SETTINGS)
    tokenizer = make_tokenizer("bpe")
    model = make_model(len(tokenizer))
    with pytest.raises(ConfigError, match=r"the data are token scores, whose flags are for .* detector frozen"):
        CUTTrainer(model, args, train_dataset=RECORDS, eval_dataset=scores, processing_class=tokenizer)
    trainer = CUTTrainer(model, args, train_dataset=scores, eval_dataset=scores, processing_class=tokenizer)
    assert trainer.args.detector == "frozen"
    assert args.detector is None, "the caller's settings are the caller's"
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "likelihood"}, "encoded rows are for objective cut and dual_cut"),
        ({"objective": "dual_cut"}, "encoded rows for objective dual_cut need the column is_praised"),
        ({"detector": "spans"}, "encoded rows for detector spans need the column is_flagged"),
    ],
)
def test_encoded_rows_are_refused_where_they_hold_something_else_than_is_learned(tmp_path, settings, message):
    rows = [{"prompt_ids": [1, 5], "judged_prompt_ids": [1, 5, 9], "response_ids": [7, 8, 2]}]
    with pytest.raises(ConfigError, match=message):
        _make_trainer(tmp_path, rows, **settings)


ROW = {"prompt_ids": [1, 5], "judged_prompt_ids": [1, 5, 9], "response_ids": [7, 8, 2]}
FLAGGED = ROW | {"is_flagged": [True, False, True], "weights": [1.0, 0.0, 0.5]}
SATISFACTORY = ROW | {"judged_prompt_ids": None}


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("detector", ["current", "spans"])
def test_encoded_rows_whose_flags_fit_their_tokens_are_learned(tmp_path, kind, detector):
    trainer = _make_trainer(tmp_path, kind([FLAGGED, SATISFACTORY]), detector=detector)
    assert trainer.train_dataset[0]["is_flagged"] == FLAGGED["is_flagged"]
    assert trainer.train_dataset[0]["weights"] == FLAGGED["weights"]
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("detector", ["current", "spans"])
def test_flags_and_weights_that_do_not_fit_the_tokens_are_all_named(tmp_path, kind, detector):
    rows = [
        FLAGGED,
        FLAGGED | {"is_flagged": [True]},
        FLAGGED | {"weights": None},
        FLAGGED | {"weights": [1.0, -1.0, 0.5]},
        ROW | {"is_flagged": None, "weights": None},
        SATISFACTORY | {"is_flagged": None, "weights": [1.0]},
    ]
    with pytest.raises(DataError) as caught:
        _make_trainer(tmp_path, kind(rows), detector=detector)
    flags = "field 'is_flagged': expected true or false for each of the 3 tokens of response_ids"
    weights = "field 'weights': expected a number of at least 0 for each of the 3 tokens of response_ids"
    assert caught.value.problems == [
        f"train_dataset[1]: {flags}, got 1 of them",
        f"train_dataset[2]: {weights}, got none",
        f"train_dataset[3]: {weights}, got -1.0",
        f"train_dataset[4]: {flags}, got none",
        f"train_dataset[4]: {weights}, got none",
        f"train_dataset[5]: {flags}, got none",
        f"train_dataset[5]: {weights}, got 1 of them",
    ]


def test_flags_and_praise_of_another_kind_are_named(tmp_path):
    rows = [
        FLAGGED | {"is_flagged": ["yes", "no", "no"]},
        FLAGGED | {"is_flagged": 3},
        FLAGGED | {"is_praised": "yes"},
        "no row",
    ]
    with pytest.raises(DataError) as caught:
        _make_trainer(tmp_path, rows)
    flags = "field 'is_flagged': expected true or false for each of the 3 tokens of response_ids"
    assert caught.value.problems == [
        f"train_dataset[0]: {flags}, got 'yes'",
        f"train_dataset[1]: {flags}, got int",
        "train_dataset[2]: field 'is_praised': expected true or false, got 'yes'",
        "train_dataset[3]: expected a row of token ids, as the first one is, got str",
    ]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_encoded_rows_for_dual_cut_that_do_not_say_whether_they_praise_are_all_named(tmp_path, kind):
    rows = [ROW | {"is_praised": True}, ROW | {"is_praised": None}, SATISFACTORY | {"is_praised": None}, ROW]
    with pytest.raises(DataError) as caught:
        _make_trainer(tmp_path, kind(rows), objective="dual_cut")
    assert caught.value.problems == [
        f"train_dataset[{index}]: field 'is_praised': expected true or false beside judged_prompt_ids, got none"
        for index in (1, 3)
    ]
    assert _make_trainer(tmp_path, kind(rows[::2]), objective="dual_cut").train_dataset[0]["is_praised"]


def test_several_data_sets_at_once_are_refused(tmp_path):
    tokenizer = make_tokenizer("bpe")
    args = CUTConfig(output_dir=str(tmp_path), **SETTINGS)
    data = {"train_dataset": RECORDS, "eval_dataset": {"a": RECORDS, "b": RECORDS}}
    message = r"^eval_dataset: expected one data set, .*, got a mapping of several \(a, b\); give one of them$"
    with pytest.raises(ConfigError, match=message):
        CUTTrainer(make_model(len(tokenizer)), args, processing_class=tokenizer, **data)


def test_evaluation_without_l2_does_not_depend_on_the_batch_size(tmp_path):
    losses = []
    for batch_size in (1, 3, 8):
        trainer = _make_trainer(
            tmp_path,
            RECORDS,
            use_satisfactory_loss=False,
            use_judged_loss=False,
            per_device_eval_batch_size=batch_size,
        )
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_scores_of_another_prompt_are_refused(workplace, tmp_path):
    tokenizer = make_tokenizer("bpe", chat=True)
    args = CUTConfig(output_dir=str(tmp_path), template="chat", **SETTINGS)
    message = r"train_dataset\[0\]: field 'template': made with alpaca.*, the training's is"
    with pytest.raises(DataError, match=message) as caught:
        CUTTrainer(
            make_model(len(tokenizer)),
            args,
            train_dataset=read_token_scores(workplace / "s.jsonl"),
            processing_class=tokenizer,
        )
    hint = "set map_spans: true to take flags and weights over by their characters"
    assert str(caught.value).endswith(f"\ntrain with --template alpaca, as the scores were made, or {hint}")


def test_scores_of_the_same_template_with_other_words_are_not_told_to_name_it(workplace, tmp_path):
    scores = [replace(row, template="alpaca 0123456789abcdef") for row in read_token_scores(workplace / "s.jsonl")]
    with pytest.raises(DataError, match=r"field 'template': made with alpaca 0123456789abcdef") as caught:
        _make_trainer(tmp_path, scores)
    assert str(caught.value).endswith("\nset map_spans: true to take flags and weights over by their characters")


@pytest.mark.parametrize("settings", [{"detector": "current"}, {"objective": "hindsight"}])
def test_token_scores_are_for_known_flags_only(workplace, capsys, settings):
    assert _train(workplace, "refused", data="s.jsonl", **settings) == 2
    assert "the data are token scores, whose flags are for objective cut and detector frozen" in capsys.readouterr().err


def test_a_persons_spans_are_flags(tmp_path):
    rows = [row | {"wrong_spans": None if row["judgment"] is None else [[15, 21]]} for row in RECORDS]
    trainer = _make_trainer(tmp_path, rows, detector="spans")
    tokenizer = make_tokenizer("bpe")
    for row, source in zip(trainer.train_dataset, RECORDS, strict=True):
        if source["judgment"] is None:
            assert not any(row["is_flagged"] or [])
            continue
        flagged = [index for index, is_on in zip(row["response_ids"], row["is_flagged"], strict=True) if is_on]
        assert tokenizer.decode(flagged).strip() == "Sydney"


def test_records_without_a_flag_among_them_train_all_the_same(workplace, tmp_path):
    records = as_records([row | {"judgment": None} for row in RECORDS], "x").records
    trainer = _make_trainer(tmp_path, records, detector="frozen")
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_file_of_scores_written_again_trains_the_same(workplace, tmp_path):
    scores = read_token_scores(workplace / "s.jsonl")
    write_token_scores(tmp_path / "again.jsonl", scores)
    assert read_token_scores(tmp_path / "again.jsonl") == scores
