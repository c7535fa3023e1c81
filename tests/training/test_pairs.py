"""Pairs of responses for DPO, and TRL's trainer on them."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options
from peft import LoraConfig
from reference import score_response
from tiny import make_model, make_tokenizer

from cutlm import CUTTrainer
from cutlm.cli import main
from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.token_scores import TokenScores
from cutlm.prompting.encoding import Encoder
from cutlm.training import pairs as pairs_module
from cutlm.training.config import CUTConfig
from cutlm.training.pairs import Pair, PairTrainer, encode_pairs, pair_refinements, pair_responses


def make_record(instruction: str, output: str, is_right: bool, i_ans: str | None = None) -> JudgedRecord:
    return JudgedRecord(
        instruction=instruction, output=output, judgment=None if is_right else "It is wrong.", i_ans=i_ans
    )


RECORDS = [
    make_record("A city?", "Sydney is.", False),
    make_record("A city?", "Canberra is.", True),
    make_record("A city?", "Sydney is.", False),
    make_record("A city?", "So is.", False),
    make_record("A city?", "The capital is.", True),
    make_record("Else?", "No.", False),
    make_record("More?", "Yes.", True),
]
LOCATIONS = [f"data.jsonl:{number}" for number in range(1, 8)]
TOKENIZER = make_tokenizer("bpe")
# transformers gives a model the special tokens of its tokenizer.
SPECIAL = {name: getattr(TOKENIZER, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
ENCODER = Encoder(TOKENIZER, "alpaca")


# ---- Pairs ----


def test_each_unsatisfactory_response_is_paired_with_a_satisfactory_one_to_its_instruction() -> None:
    pairs, left_out = pair_responses(RECORDS, LOCATIONS)
    assert pairs == [
        Pair(Conversation.start("A city?"), "Canberra is.", "Sydney is.", "data.jsonl:1"),
        Pair(Conversation.start("A city?"), "The capital is.", "So is.", "data.jsonl:4"),
    ]
    # One instruction has satisfactory responses only, and one has unsatisfactory ones only.
    assert [sentence.partition(" ")[0] for sentence in left_out] == ["1", "1"]


def test_a_response_judged_both_ways_is_not_paired_with_itself() -> None:
    records = [make_record("A city?", "So.", True), make_record("A city?", "So.", False)]
    pairs, left_out = pair_responses(records, LOCATIONS[:2])
    assert pairs == []
    assert [sentence.partition(" ")[0] for sentence in left_out] == ["1"]


def test_a_refinement_is_preferred_to_the_response_it_refines() -> None:
    records = [
        make_record("A city?", "Sydney is.", False, "Canberra is."),
        make_record("A city?", "Sydney is.", False, "Sydney is."),
        make_record("A city?", "Sydney is.", False),
        make_record("A city?", "Canberra is.", True),
    ]
    pairs, left_out = pair_refinements(records, LOCATIONS[:4])
    assert pairs == [Pair(Conversation.start("A city?"), "Canberra is.", "Sydney is.", "data.jsonl:1")]
    # One record is satisfactory, and two have no other response.
    assert [sentence.partition(" ")[0] for sentence in left_out] == ["1", "2"]


def test_pairs_have_the_token_ids_of_every_other_objective() -> None:
    rows, left_out = encode_pairs(
        [Pair(Conversation.start("A city?"), "Canberra is.", "Sydney is.", "a")], ENCODER, 512
    )
    assert rows == [
        {
            "prompt_ids": ENCODER.encode_prompt("A city?"),
            "chosen_ids": ENCODER.encode_response("Canberra is."),
            "rejected_ids": ENCODER.encode_response("Sydney is."),
        }
    ]
    assert left_out == []


def test_a_prompt_is_truncated_to_fit_the_longer_response() -> None:
    pair = Pair("A city? " * 50, "Canberra is.", "Sydney is, so is it. " * 5, "data.jsonl:3")
    num_tokens = len(ENCODER.encode_response(pair.rejected))
    rows, _ = encode_pairs([pair], ENCODER, num_tokens + 10)
    assert len(rows[0]["prompt_ids"]) == 10
    rows, (sentence,) = encode_pairs([pair], ENCODER, num_tokens)
    assert rows == []
    assert sentence.startswith("data.jsonl:3: ")


# ---- The trainer ----


def make_config(folder: Path, **settings: Any) -> CUTConfig:
    values = ON_CPU | {
        "objective": "dpo",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return CUTConfig(output_dir=str(folder), **values | settings)


def make_trainer(folder: Path, records: Any, peft_config: Any = None, **settings: Any) -> PairTrainer:
    return PairTrainer(
        model=make_model(len(TOKENIZER)),
        args=make_config(folder, **settings),
        train_dataset=records,
        processing_class=TOKENIZER,
        peft_config=peft_config,
        locations=LOCATIONS,
    )


def test_a_pair_longer_than_the_context_stops_the_encoding_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = [make_record(f"City {number}?", "No.", False, "Yes.") for number in range(8)]
    records[0] = make_record("A city? " * 100, "No.", False, "Yes.")
    monkeypatch.setattr(pairs_module, "_BATCH_SIZE", 2)
    num_encoded = []

    def encode(pairs: Any, *args: Any) -> Any:
        num_encoded.append(len(pairs))
        return encode_pairs(pairs, *args)

    monkeypatch.setattr(pairs_module, "encode_pairs", encode)
    model = make_model(len(TOKENIZER), max_position_embeddings=100)
    config = make_config(tmp_path, objective="ilf_dpo", max_length=101)
    with pytest.raises(ConfigError, match=r"^max_length: .* context of 100 tokens, got 101 and a record of 101"):
        PairTrainer(model, config, records, TOKENIZER)
    assert num_encoded == [2]
    assert caplog.records[0].getMessage().startswith("max_length: 101 is above the model's context of 100 tokens")
    assert len(PairTrainer(model, config, records[1:], TOKENIZER).train_dataset) == 7


def test_the_first_loss_is_that_of_a_policy_equal_to_its_reference(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORDS)
    trainer.train()
    # -log sigmoid(beta * 0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.notices[0].startswith("2 pairs of 7 records, with 4 different responses")


def test_the_loss_of_a_changed_policy_follows_the_equation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORDS, dpo_beta=0.3)
    model, reference = trainer.model, trainer.ref_model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    model.eval()
    loss = trainer.compute_loss(model, batch).item()
    losses = []
    for row in trainer.train_dataset:
        chosen, rejected = (
            sum(score_response(model, row["prompt_ids"], row[key]))
            - sum(score_response(reference, row["prompt_ids"], row[key]))
            for key in ("chosen_ids", "rejected_ids")
        )
        losses.append(math.log1p(math.exp(-0.3 * (chosen - rejected))))
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_callers_arguments_are_not_changed(tmp_path: Path) -> None:
    args, model, tokenizer = make_config(tmp_path), make_model(len(TOKENIZER), **SPECIAL), copy.deepcopy(TOKENIZER)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])

    def describe() -> list[Any]:
        fields = {field.name: copy.deepcopy(getattr(args, field.name)) for field in dataclasses.fields(args)}
        return [fields, args._n_gpu, model.config.to_dict(), tokenizer.chat_template, lora.to_dict()]

    before = describe()
    PairTrainer(model, args, RECORDS, tokenizer, lora).train()
    assert describe() == before


def test_the_saved_tokenizer_has_the_prompt_of_training(tmp_path: Path) -> None:
    template = make_trainer(tmp_path, RECORDS).processing_class.chat_template
    assert template is not None
    assert template == ENCODER.build_chat_template()


def test_the_command_trains_saves_and_resumes(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record.model_dump(exclude_unset=True) for record in RECORDS]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    settings = ON_CPU | {"objective": "dpo", "model_name_or_path": base, "data": tmp_path / "records.json"}
    settings |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "output_dir": tmp_path / "out"}
    command = ["train", *list_options(**settings)]
    assert main(command) == 0
    assert "2 pairs of 7 records" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    (tmp_path / "prompts.json").write_text('[{"instruction": "A city?"}]')
    files = {"model": tmp_path / "out", "prompts": tmp_path / "prompts.json", "out": tmp_path / "responses.json"}
    assert main(["generate", *list_options(**files, max_new_tokens=4)]) == 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lora_target_modules": "query"}, "lora_target_modules"),
        ({"lora_target_modules": "lm_head"}, "lora_target_modules"),
        ({"eval_strategy": "steps"}, "eval_strategy, eval_on_start"),
        ({"eval_split": 0.5, "eval_strategy": "steps"}, "eval_data, eval_split"),
    ],
)
def test_bad_settings_of_the_command_are_named(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], name: str
) -> None:
    rows = [record.model_dump(exclude_unset=True) for record in RECORDS]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    values = ON_CPU | {"objective": "dpo", "model_name_or_path": base, "data": tmp_path / "records.json"}
    assert main(["train", *list_options(**values, output_dir=tmp_path / "out", **settings)]) == 2
    assert f"{name}: " in capsys.readouterr().err


# ---- Other data ----


def test_token_scores_cannot_be_paired(tmp_path: Path) -> None:
    per_token: Any = [[]] * 7
    scores = TokenScores(RECORDS[0], *per_token, 1.1, 1.0, 1.0, "", "", "")
    with pytest.raises(ConfigError, match=r"^objective dpo .* token scores"):
        make_trainer(tmp_path, [scores])


def test_the_other_trainer_names_this_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^objective: dpo .* cutlm\.training\.pairs\.PairTrainer"):
        CUTTrainer(make_model(64), make_config(tmp_path), train_dataset=[{}])


@pytest.mark.parametrize("objective", ["dpo", "ilf_dpo"])
def test_records_without_a_pair_are_refused_with_the_reason(tmp_path: Path, objective: str) -> None:
    with pytest.raises(DataError, match=rf"^{objective}: expected .*\n\d+ \w+ left out"):
        make_trainer(tmp_path, [make_record("Else?", "No.", False)] * 7, objective=objective)
