"""`critique_weight`: also learn to write the judgment, given instruction and response."""

from typing import Any

import pytest
import torch
from commands import ON_CPU
from reference import score_response
from tiny import make_model, make_tokenizer

from cutlm import CUTConfig, CUTTrainer
from cutlm.errors import ConfigError
from cutlm.model.collator import find_non_finite, split_batch

TOKENIZERS = {"alpaca": make_tokenizer("bpe"), "chat": make_tokenizer("bpe_bos", chat=True)}
RECORDS: list[dict[str, Any]] = [
    {
        "instruction": f"Name a city, number {index}. " + "Please. " * (index % 3),
        "output": "The capital is Sydney, a large city." + " And so on." * (index % 4),
        "i_ans": "Canberra.",
        "judgment": None if index in (1, 4) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(6)
]
WEIGHT = 0.3
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"detector": "frozen"},
    {"detector": "frozen", "use_judged_loss": True},
    {"objective": "self_distillation"},
    {"objective": "redirect", "threshold": 1.01},
    {"objective": "dual_cut"},
    {"objective": "likelihood"},
    {"objective": "hindsight"},
    {"objective": "ilf_mle"},
    {"objective": "unlikelihood"},
]


def make_trainer(template: str = "alpaca", records: list[dict[str, Any]] = RECORDS, **settings: Any) -> Any:
    tokenizer = TOKENIZERS[template]
    args = CUTConfig(template=template, **ON_CPU | settings)
    model = make_model(len(tokenizer)).double()
    return CUTTrainer(model=model, args=args, train_dataset=records, processing_class=tokenizer)


def compute_loss(trainer: Any, batch: dict[str, Any] | None = None, counts: Any = None) -> float:
    trainer.model.eval()
    with torch.no_grad():
        batch = batch or trainer.data_collator(list(trainer.train_dataset))
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item()


def score_judgments(template: str, records: list[dict[str, Any]]) -> list[list[float]]:
    """log p of the tokens of each judgment, by a plain forward pass over what forward prediction learns."""
    tokenizer = TOKENIZERS[template]
    trainer = make_trainer(template, records, objective="forward_prediction")
    plain = make_trainer(template, records, objective="likelihood")
    found = []
    for row, shorter, record in zip(trainer.train_dataset, plain.train_dataset, records, strict=True):
        ids = row["response_ids"][len(shorter["response_ids"]) :]
        text = record["judgment"] or "Perfect."
        # The tokens from the end on that spell the judgment.
        num = next(n for n in range(1, len(ids)) if text in tokenizer.decode(ids[-n:]))
        prompt = [*row["prompt_ids"], *row["response_ids"][:-num]]
        assert "Judgment" not in tokenizer.decode(ids[-num:])
        assert tokenizer.decode(prompt).endswith("### Judgment:\n")
        found.append(score_response(trainer.model, prompt, ids[-num:]))
    return found


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda settings: "-".join(map(str, settings.values())) or "cut")
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_term_is_the_mean_likelihood_of_the_judgments(template: str, settings: dict[str, Any]) -> None:
    with_term = make_trainer(template, critique_weight=WEIGHT, **settings)
    added = compute_loss(with_term) - compute_loss(make_trainer(template, **settings))
    logps = [logp for part in score_judgments(template, RECORDS) for logp in part]
    assert added == pytest.approx(-WEIGHT * sum(logps) / len(logps), rel=1e-6)


def test_term_under_record_normalization_is_a_mean_over_records() -> None:
    settings = {"normalization": "record", "detector": "frozen"}
    added = compute_loss(make_trainer(critique_weight=WEIGHT, **settings)) - compute_loss(make_trainer(**settings))
    means = [sum(part) / len(part) for part in score_judgments("alpaca", RECORDS)]
    assert added == pytest.approx(-WEIGHT * sum(means) / len(means), rel=1e-6)


@pytest.mark.parametrize("settings", OBJECTIVES[:5], ids=lambda settings: "-".join(map(str, settings.values())))
def test_parts_of_a_batch_add_up(settings: dict[str, Any]) -> None:
    trainer = make_trainer(critique_weight=WEIGHT, **settings)
    batch = trainer.data_collator(list(trainer.train_dataset))
    parts = split_batch(batch, 250)
    assert len(parts) > 2
    assert sum(len(part["critique_owners"]) for part in parts) == len(RECORDS)
    counts = trainer._count(batch)
    total = sum(compute_loss(trainer, part, counts) for part in parts)
    assert total == pytest.approx(compute_loss(trainer, batch, counts), rel=1e-6)


def test_training_logs_the_term() -> None:
    trainer = make_trainer(critique_weight=WEIGHT, detector="frozen", max_steps=2, logging_steps=1, save_strategy="no")
    expected = [logp for part in score_judgments("alpaca", RECORDS) for logp in part]
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "loss_critique" in line)
    assert first["loss_critique"] == pytest.approx(-sum(expected) / len(expected), rel=1e-3)
    assert second["loss_critique"] < first["loss_critique"]


def test_logged_losses_contain_the_term() -> None:
    settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "objective": "likelihood"}
    trainer = make_trainer(critique_weight=WEIGHT, **settings)
    trainer.train()
    logged = trainer.state.log_history[0] | trainer.evaluate(trainer.train_dataset)
    for prefix in ("", "eval_"):
        parts = logged[f"{prefix}loss_likelihood"], logged[f"{prefix}loss_critique"]
        assert logged[f"{prefix}loss"] == pytest.approx(parts[0] + WEIGHT * parts[1], rel=1e-6)


def test_judgment_that_does_not_fit_is_counted() -> None:
    long = RECORDS[0] | {"judgment": "It is wrong. " * 60}
    trainer = make_trainer(records=[long, *RECORDS[1:]], critique_weight=WEIGHT, max_length=200, detector="off")
    assert [row["critique_ids"] is None for row in trainer.train_dataset] == [True, *[False] * 5]
    rows = [row for row in trainer.train_dataset if row["critique_ids"]]
    assert max(len(row["critique_prompt_ids"]) + len(row["critique_ids"]) for row in rows) <= 200
    assert any("5 judgments to learn" in notice and "1 left out" in notice for notice in trainer.notices)
    compute_loss(trainer)


def test_processes_are_balanced_by_the_tokens_of_critiques_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(critique_weight=WEIGHT)
    batch = trainer.data_collator(list(trainer.train_dataset))
    monkeypatch.setattr(CUTConfig, "world_size", 2)
    # The last token of a sequence is no input.
    assert sum(trainer._get_train_sampler()._sizes) == len(batch["input_ids"]) + len(batch["sequence_lengths"])


def test_record_of_a_judgment_without_finite_log_probability_is_named() -> None:
    trainer = make_trainer(critique_weight=WEIGHT)
    batch = trainer.data_collator(list(trainer.train_dataset))
    logps = torch.zeros(len(batch["target_ids"]))
    logps[-1] = float("nan")
    assert find_non_finite(logps, batch) == [batch["locations"][-1]]


def test_nothing_is_added_by_default() -> None:
    trainer = make_trainer()
    assert "critique_ids" not in trainer.train_dataset.column_names
    assert "critique_owners" not in trainer.data_collator(list(trainer.train_dataset))


@pytest.mark.parametrize("settings", [{"objective": "forward_prediction"}, {"objective": "dpo"}])
def test_objective_that_has_no_such_term_refuses_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="critique_weight"):
        CUTConfig(critique_weight=0.1, **settings)


def test_encoded_rows_have_no_judgments() -> None:
    rows = [{"prompt_ids": [5], "judged_prompt_ids": [5, 6], "response_ids": [7]}]
    with pytest.raises(ConfigError, match="critique_weight"):
        make_trainer(records=rows, critique_weight=0.1)
