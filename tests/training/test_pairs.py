"""Pairs for DPO, and TRL's trainer on them."""

import json
import math

import pytest
import torch
from tiny import make_model, make_tokenizer, save_tiny_model

from cutlm import CUTTrainer
from cutlm.blame.token_scores import read_token_scores
from cutlm.cli import main
from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError, DataError
from cutlm.prompting.encoding import Encoder
from cutlm.training.config import CUTConfig
from cutlm.training.pairs import Pair, PairTrainer, encode_pairs, pair_refinements, pair_responses


def record(instruction: str, output: str, is_right: bool, i_ans: str | None = None) -> JudgedRecord:
    return JudgedRecord(
        instruction=instruction, output=output, judgment=None if is_right else "It is wrong.", i_ans=i_ans
    )


RECORDS = [
    record("A city?", "Sydney is.", False),
    record("A city?", "Canberra is.", True),
    record("A city?", "Sydney is.", False),
    record("A city?", "So is.", False),
    record("A city?", "The capital is.", True),
    record("Else?", "No.", False),
    record("More?", "Yes.", True),
]
PLACES = [f"data.jsonl:{number}" for number in range(1, 8)]


def test_each_wrong_response_meets_a_right_one_to_its_own_instruction():
    pairs, left_out = pair_responses(RECORDS, PLACES)
    assert pairs == [
        Pair("A city?", "Canberra is.", "Sydney is.", "data.jsonl:1"),
        Pair("A city?", "The capital is.", "So is.", "data.jsonl:4"),
    ]
    assert left_out == [
        "1 instructions left out: every response is satisfactory",
        "1 instructions left out: every response is unsatisfactory",
    ]


def test_a_refinement_is_preferred_to_what_it_refines():
    records = [
        record("A city?", "Sydney is.", False, "Canberra is."),
        record("A city?", "Sydney is.", False, "Sydney is."),
        record("A city?", "Sydney is.", False),
        record("A city?", "Canberra is.", True),
    ]
    pairs, left_out = pair_refinements(records, PLACES[:4])
    assert pairs == [Pair("A city?", "Canberra is.", "Sydney is.", "data.jsonl:1")]
    assert left_out == [
        "1 records left out: satisfactory, so there is no pair",
        "2 records left out: without another response in i_ans (cutlm refine makes them)",
    ]


def test_pairs_are_the_token_ids_of_every_other_objective():
    encoder = Encoder(make_tokenizer("bpe"), "alpaca")
    rows, left_out = encode_pairs([Pair("A city?", "Canberra is.", "Sydney is.", "a")], encoder, 512)
    assert rows == [
        {
            "prompt_ids": encoder.encode_prompt("A city?"),
            "chosen_ids": encoder.encode_response("Canberra is."),
            "rejected_ids": encoder.encode_response("Sydney is."),
        }
    ]
    assert left_out == []


def test_a_pair_is_cut_to_its_longer_response_or_left_out():
    encoder = Encoder(make_tokenizer("bpe"), "alpaca")
    pair = Pair("A city? " * 50, "Canberra is.", "Sydney is, so is it. " * 5, "data.jsonl:3")
    num_tokens = len(encoder.encode_response(pair.rejected))
    rows, _ = encode_pairs([pair], encoder, num_tokens + 10)
    assert len(rows[0]["prompt_ids"]) == 10
    rows, left_out = encode_pairs([pair], encoder, num_tokens)
    assert (rows, left_out) == ([], [f"data.jsonl:3: a response alone fills max_length {num_tokens}; left out"])


def make_trainer(tmp_path, records: list[JudgedRecord], **settings: object) -> PairTrainer:
    tokenizer = make_tokenizer("bpe")
    options = {
        "objective": "dpo",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    args = CUTConfig(output_dir=str(tmp_path), **options | settings)
    return PairTrainer(
        model=make_model(len(tokenizer)), args=args, train_dataset=records, processing_class=tokenizer, locations=PLACES
    )


def test_the_first_loss_is_that_of_a_policy_that_is_its_own_reference(tmp_path):
    trainer = make_trainer(tmp_path, RECORDS)
    trainer.train()
    # -log sigmoid(beta * 0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.notices[0] == "2 pairs of 7 records; 4 different responses stand in them"


def test_the_loss_of_a_moved_policy_is_that_of_the_equation(tmp_path):
    trainer = make_trainer(tmp_path, RECORDS, dpo_beta=0.3)
    model, reference = trainer.model, trainer.ref_model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    model.eval()
    got = trainer.compute_loss(model, batch).item()

    def score(network: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + response])).logits[0].double()
        locations = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        rows = zip(locations, response, strict=True)
        return sum(logits[place].log_softmax(-1)[token].item() for place, token in rows)

    losses = []
    for row in trainer.train_dataset:
        margins = [
            score(model, row["prompt_ids"], row[key]) - score(reference, row["prompt_ids"], row[key])
            for key in ("chosen_ids", "rejected_ids")
        ]
        losses.append(math.log1p(math.exp(-0.3 * (margins[0] - margins[1]))))
    assert got == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_a_response_that_was_judged_both_ways_is_not_preferred_to_itself():
    pairs, left_out = pair_responses([record("A city?", "So.", True), record("A city?", "So.", False)], PLACES[:2])
    assert pairs == []
    assert left_out == ["1 pairs left out: one and the same response, judged both ways"]


def test_other_tools_prompt_a_model_of_pairs_as_it_was_trained(tmp_path):
    trainer = make_trainer(tmp_path, RECORDS)
    tokenizer = trainer.processing_class
    encoder = Encoder(tokenizer, "alpaca")
    assert tokenizer.chat_template == encoder.build_chat_template() is not None


def test_pairs_run_through_the_command_and_are_saved_whole(tmp_path, capsys):
    save_tiny_model(tmp_path / "base")
    rows = [row.model_dump(exclude_unset=True) for row in RECORDS]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    command = ["train", "--objective", "dpo", "--model_name_or_path", str(tmp_path / "base"), "--use_cpu", "true"]
    command += ["--data", str(tmp_path / "records.json"), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    command += ["--per_device_train_batch_size", "2", "--disable_tqdm", "true", "--save_steps", "1"]
    assert main(command) == 0
    assert "2 pairs of 7 records" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    (tmp_path / "prompts.json").write_text('[{"instruction": "A city?"}]')
    options = ["--model", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.json"), "--max_new_tokens", "4"]
    assert main(["generate", *options, "--out", str(tmp_path / "responses.json")]) == 0


def test_pairs_cannot_be_made_of_token_scores(tmp_path):
    save_tiny_model(tmp_path / "base")
    (tmp_path / "records.json").write_text(json.dumps([RECORDS[0].model_dump(exclude_unset=True)]))
    paths = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "records.json")]
    assert main(["blame", *paths, "--out", str(tmp_path / "s.jsonl")]) == 0
    with pytest.raises(ConfigError, match="objective dpo learns from records; got token scores, which are for cut"):
        make_trainer(tmp_path, read_token_scores(tmp_path / "s.jsonl"))


def test_the_other_trainer_names_the_right_one(tmp_path):
    args = CUTConfig(output_dir=str(tmp_path), objective="dpo", use_cpu=True)
    with pytest.raises(ConfigError, match=r"dpo is trained by cutlm\.preferences\.PairTrainer"):
        CUTTrainer(make_model(64), args, train_dataset=[{}])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("dpo", "dpo: expected responses of both kinds to one instruction, got none"),
        ("ilf_dpo", "ilf_dpo: expected improved responses, got none"),
    ],
)
def test_records_without_a_pair_are_refused_with_the_reason(tmp_path, objective, message):
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, [record("Else?", "No.", False)] * 7, objective=objective)
