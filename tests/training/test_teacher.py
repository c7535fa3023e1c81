"""Training on a teacher's distributions: stored once, one plain pass, and the same loss however a step is split."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ON_CPU, list_options, run_main, run_ranks, write_lines
from safetensors.torch import load_file

from cutlm import CUTConfig, CUTTrainer, load_records
from cutlm.cli import main
from cutlm.errors import ConfigError, DataError
from cutlm.flagging.teacher import TeacherSettings
from cutlm.flagging.token_scores import read_token_scores
from cutlm.losses import Parts, guide
from cutlm.model.collator import CutCollator, split_batch
from cutlm.model.loading import load_model, load_tokenizer
from cutlm.prompting.encoding import Encoder
from cutlm.training.trainer import compute_batch_loss, count_redirected_batch

RECORDS = [
    {
        "instruction": f"Name a city, number {index}. " + "Please. " * (index % 3),
        "output": "The capital is Sydney, a large city." + " And so on." * (index % 4),
        "judgment": None if index in (1, 4) else f"Sydney is not the capital; mistake {index}.",
    }
    for index in range(6)
]
# The tiny model hardly reads judgments: a low threshold flags some tokens.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "self_distillation": {"objective": "self_distillation"},
    "sampled": {"objective": "self_distillation", "distillation": "sampled", "distillation_clip": 2.0},
    "advice": {"objective": "self_distillation", "teacher_context": "advice", "guidance": 0.0, "importance_clip": 2.0},
    "draft": {"objective": "self_distillation", "teacher_context": "advice", "teacher_sees_response": True},
    "reverse_kl": {"objective": "self_distillation", "divergence": "reverse_kl", "use_judged_loss": True},
    "redirect": {"objective": "redirect", "threshold": 1.0},
    "redirect_only": {
        "objective": "redirect",
        "threshold": 1.0,
        "use_unlikelihood_loss": False,
        "redirect_strength": 2,
    },
    "redirect_judged": {"objective": "redirect", "threshold": 1.0, "use_judged_loss": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(RECORDS))
    return path


def make_trainer(base: Path, folder: Path, data: Any, **settings: Any) -> CUTTrainer:
    config = CUTConfig(output_dir=str(folder), **ON_CPU | settings)
    return CUTTrainer(load_model(base), config, data, processing_class=load_tokenizer(base))


def score_naively(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log p(v | prompt, y_<t) [T, V] in float64."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *response[:-1]]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)


def compute_naively(base: Path, settings: dict[str, Any]) -> float:
    """The loss of all records, from the model's own logits: the mean over tokens, or of flagged and other tokens."""
    model, tokenizer = load_model(base).double().eval(), load_tokenizer(base)
    encoder = Encoder(tokenizer, "alpaca")
    guidance = settings.get("redirect_strength", settings.get("guidance", 1.0))
    total, judged_total, num_tokens, num_unsatisfactory = 0.0, 0.0, 0, 0
    flagged_total, num_flagged = 0.0, 0
    for record in RECORDS:
        instruction, response = record["instruction"], encoder.encode_response(record["output"])
        plain = score_naively(model, encoder.encode_prompt(instruction), response)
        num_tokens += len(response)
        if record["judgment"] is None:
            total -= sum(plain[place, token].item() for place, token in enumerate(response))
            continue
        judgment = str(record["judgment"])
        num_unsatisfactory += len(response)
        judged = score_naively(model, encoder.encode_prompt(instruction, judgment), response)
        if settings.get("teacher_context") == "advice":
            draft = record["output"] if settings.get("teacher_sees_response") else None
            prompt = encoder.encode_advised_prompt(instruction, judgment, draft)
        else:
            prompt = encoder.encode_prompt(instruction, "Perfect.")
        teacher = score_naively(model, prompt, response)
        if guidance:
            teacher = guide(teacher, judged, guidance)
        for place, token in enumerate(response):
            p, q = plain[place], teacher[place]
            is_flagged = judged[place, token] > p[token]
            judged_total -= judged[place, token].item()
            if settings["objective"] == "redirect" and not is_flagged:
                total -= p[token].item()
                continue
            top = [index for index in q.topk(20).indices.tolist() if q[index] > -math.inf]
            q_tail = max(0.0, 1 - sum(math.exp(q[index]) for index in top))
            p_tail = 1 - sum(math.exp(p[index]) for index in top)
            if settings.get("distillation") == "sampled":
                advantage = max(-30.0, q[token].item()) - p[token].item()
                term = -max(-2.0, min(2.0, advantage)) * p[token].item()
            elif settings.get("divergence") == "reverse_kl":
                term = sum(math.exp(p[index]) * (p[index] - q[index]).item() for index in top)
                term += p_tail * (math.log(p_tail) - math.log(max(q_tail, 1e-6)))
            else:
                term = sum(math.exp(q[index]) * (q[index] - p[index]).item() for index in top)
                term += q_tail * (math.log(q_tail) - math.log(p_tail)) if q_tail > 1e-9 else 0.0
            if settings["objective"] == "redirect" and settings.get("use_unlikelihood_loss", True):
                weight = math.exp(judged[place, token])
                term -= weight * math.log(1 - math.exp(p[token]))
            if settings["objective"] == "redirect":
                flagged_total, num_flagged = flagged_total + term, num_flagged + 1
            else:
                total += term
    if settings["objective"] == "redirect":
        num_others = num_tokens - num_flagged
        if settings.get("use_judged_loss"):
            total, num_others = total + judged_total, num_others + num_unsatisfactory
        assert num_flagged
        return (flagged_total / num_flagged + total / num_others) / 2
    if settings.get("use_judged_loss"):  # two parts, each a mean: as CUT's L1 and L2
        return total, judged_total, num_tokens, num_unsatisfactory  # type: ignore[return-value]
    return total / num_tokens


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "reverse_kl"])
def test_the_loss_is_that_of_a_naive_implementation(tmp_path: Path, base: Path, data: Path, name: str) -> None:
    settings = OBJECTIVES[name]
    trainer = make_trainer(base, tmp_path, load_records(data), **settings)
    rows = list(trainer.train_dataset)
    if not settings.get("use_judged_loss"):
        assert all(row["judged_prompt_ids"] is None for row in rows)  # one plain pass
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    # The importance ratio of the model before training is 1.
    assert loss == pytest.approx(compute_naively(base, settings), rel=2e-5)


def test_judged_responses_can_be_learned_too(tmp_path: Path, base: Path, data: Path) -> None:
    trainer = make_trainer(base, tmp_path, load_records(data), **OBJECTIVES["reverse_kl"])
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=True)
    total, judged, num_tokens, num_unsatisfactory = compute_naively(base, OBJECTIVES["reverse_kl"])  # type: ignore[misc]
    assert (outputs.contrast + outputs.likelihood).item() == pytest.approx(total + judged, rel=2e-5)
    # CUT's rule: the mean over unsatisfactory tokens, and the mean over all of L2.
    expected = (outputs.contrast / num_unsatisfactory + outputs.likelihood / num_tokens) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["self_distillation", "redirect"])
def test_satisfactory_responses_can_be_left_out(tmp_path: Path, base: Path, data: Path, objective: str) -> None:
    settings = {"objective": objective, "use_satisfactory_loss": False}
    trainer = make_trainer(base, tmp_path, load_records(data), **settings)
    assert trainer.train_dataset["is_satisfactory"] == [False] * 4


# ---- The settings of the losses ----


def compute_taught(logps: torch.Tensor, columns: torch.Tensor | None, further: dict[str, Any], **settings: Any) -> Any:
    """The sums of a response of three tokens, of which the first and the last are taught."""
    batch = {"num_unsatisfactory": 0, "response_lengths": [3], "locations": ["a"], "shared_lengths": []} | further
    batch |= {"is_taught": torch.tensor([True, False, True]), "target_ids": torch.arange(3)}
    return compute_batch_loss(logps, batch, CUTConfig(**ON_CPU | settings), columns)


def log_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_importance_is_clipped_and_has_no_gradient() -> None:
    logps = log_of(0.4, 0.5, 0.1).requires_grad_()
    further = {"teacher_logps": log_of(0.8, 0.05)[:, None], "old_logps": log_of(0.1, 0.2)}
    sampled = {"objective": "self_distillation", "distillation": "sampled"}
    loss = compute_taught(logps, None, further, importance_clip=2.0, **sampled).likelihood
    # The ratios are 4, clipped to 2, and 0.5; the advantages are log 2 and -log 2.
    terms = [-2 * math.log(2) * math.log(0.4), -math.log(0.5), 0.5 * math.log(2) * math.log(0.1)]
    assert loss.item() == pytest.approx(sum(terms), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logps)
    assert grad.tolist() == pytest.approx([-2 * math.log(2), -1, 0.5 * math.log(2)], rel=1e-12)
    loss = compute_taught(logps, None, further, **sampled).likelihood
    assert loss.item() == pytest.approx(terms[0] / 2 + terms[1] + terms[2] * 2, rel=1e-12)


@pytest.mark.parametrize("has_unlikelihood", [True, False])
def test_the_term_of_unlikelihood_can_be_taken_out_of_redirect(has_unlikelihood: bool) -> None:
    further = {"teacher_logps": log_of(0.75, 0.75)[:, None]}
    further |= {"is_flagged": torch.tensor([True, False, True]), "flag_weights": torch.tensor([0.5, 0, 2]).double()}
    columns = torch.stack([log_of(0.5, 0.5), log_of(0.5, 0.5)])
    settings = {"objective": "redirect", "use_unlikelihood_loss": has_unlikelihood}
    loss = compute_taught(log_of(0.4, 0.5, 0.1), columns, further, **settings)
    redirected = 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    unlikelihood = -0.5 * math.log(0.6) - 2 * math.log(0.9)
    assert loss.contrast.item() == pytest.approx(redirected + has_unlikelihood * unlikelihood, rel=1e-12)
    assert loss.likelihood.item() == pytest.approx(math.log(2), rel=1e-12)
    weighed = compute_taught(log_of(0.4, 0.5, 0.1), columns, further | {"record_weights": [0.25]}, **settings)
    assert weighed.contrast.item() == pytest.approx(0.25 * loss.contrast.item(), rel=1e-12)
    assert weighed.likelihood.item() == pytest.approx(0.25 * math.log(2), rel=1e-12)


def test_redirect_counts_flagged_and_other_tokens() -> None:
    # Two responses in one context: of 4 tokens, one flagged, and of 2.
    batch = {"num_unsatisfactory": 0, "response_lengths": [4, 2]}
    flags = {"is_flagged": torch.tensor([False, True, False, False, False, False])}
    one_pool = Parts(unsatisfactory=False)
    assert count_redirected_batch(batch | flags, "token", one_pool) == (1, 5)
    assert count_redirected_batch(batch, "token", one_pool) == (0, 6)
    weighed = batch | flags | {"record_weights": [0.5, 2.0]}
    assert count_redirected_batch(weighed, "token", one_pool) == (0.5, 1.5 + 4)
    assert count_redirected_batch(weighed, "record", one_pool) == (0.125, 0.375 + 2)
    # The first response also in its judged context.
    judged = {"num_unsatisfactory": 1, "response_lengths": [4, 4, 2]} | flags
    assert count_redirected_batch(judged, "token", Parts()) == (1, 3 + 2 + 4)
    assert count_redirected_batch(judged, "token", Parts(satisfactory=False)) == (1, 3 + 4)


# ---- Every way to split a step ----


@pytest.mark.parametrize(
    "settings",
    [
        *OBJECTIVES.values(),
        {"objective": "self_distillation", "teacher": "ema"},
        {"objective": "redirect", "teacher": "ema", "threshold": 1.0},
        {"objective": "cut"},
        {"objective": "cut", "detector": "frozen"},
    ],
    ids=str,
)
def test_a_batch_may_have_satisfactory_records_only(
    tmp_path: Path, base: Path, data: Path, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(base, tmp_path, load_records(data), **settings)
    rows = [trainer.train_dataset[index] for index in (1, 4)]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
    logps = [
        score_naively(trainer.model, row["prompt_ids"], row["response_ids"])[place, token].item()
        for row in rows
        for place, token in enumerate(row["response_ids"])
    ]
    assert loss.item() == pytest.approx(-sum(logps) / len(logps), rel=1e-4)


@pytest.fixture(scope="module")
def whole_steps() -> dict[str, torch.Tensor]:
    """The gradients of all records in one micro-batch, by objective."""
    return {}


def run_step(folder: Path, base: Path, data: Path, name: str, size: int, num: int, **further: Any) -> list[str]:
    settings = ON_CPU | {
        **{"model_name_or_path": base, "data": data, "output_dir": folder / name, "use_peft": False, "optim": "sgd"},
        **{"learning_rate": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1},
        **{"save_strategy": "no", "per_device_train_batch_size": size, "gradient_accumulation_steps": num},
    }
    return ["train", *list_options(**settings | further)]


def compute_gradient(base: Path, folder: Path) -> torch.Tensor:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return torch.cat([(before[key] - after[key]).flatten() for key in sorted(before)])


@pytest.mark.parametrize("normalization", ["token", "record"])
@pytest.mark.parametrize("name", ["advice", "reverse_kl", "redirect_judged"])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(
    tmp_path: Path, base: Path, data: Path, name: str, normalization: str
) -> None:
    settings = OBJECTIVES[name] | {"normalization": normalization}
    assert main(run_step(tmp_path, base, data, "whole", 6, 1, **settings)) == 0
    expected = compute_gradient(base, tmp_path / "whole")
    assert expected.norm() > 0.01
    for run, size, num, further in (("micro", 2, 3, {}), ("parts", 6, 1, {"max_tokens_per_batch": 1})):
        assert main(run_step(tmp_path, base, data, run, size, num, **settings, **further)) == 0
        gradient = compute_gradient(base, tmp_path / run)
        assert (gradient - expected).norm() / expected.norm() < 1e-5, run


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path, base: Path, data: Path) -> None:
    settings = OBJECTIVES["redirect"]
    assert main(run_step(tmp_path, base, data, "whole", 6, 1, **settings)) == 0
    results = run_ranks(run_main, run_step(tmp_path, base, data, "ranks", 3, 1, **settings))
    assert [result.exit_code for result in results] == [0, 0], results
    expected, gradient = (compute_gradient(base, tmp_path / run) for run in ("whole", "ranks"))
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_parts_of_a_batch_keep_their_distributions(tmp_path: Path, base: Path, data: Path) -> None:
    trainer = make_trainer(base, tmp_path, load_records(data), **OBJECTIVES["advice"])
    batch = trainer.data_collator(list(trainer.train_dataset))
    parts = split_batch(batch, 1)
    assert len(parts) == len(RECORDS)
    by_name = {part["locations"][0]: part for part in parts}
    for row in trainer.train_dataset:
        alone = CutCollator()([row])
        part = by_name[row["location"]]
        for key in ("is_taught", "teacher_ids", "teacher_logps", "old_logps"):
            assert part[key].tolist()[:1] == alone[key].tolist()[:1], key
            assert len(part[key]) == len(alone[key])


# ---- Stored distributions ----


@pytest.mark.parametrize("name", ["self_distillation", "redirect", "sampled"])
def test_a_run_stores_the_distributions_and_trains_on_its_file_alike(
    tmp_path: Path, base: Path, data: Path, name: str
) -> None:
    settings = OBJECTIVES[name]
    assert main(run_step(tmp_path, base, data, "first", 6, 1, **settings)) == 0
    stored = tmp_path / "first" / "token_scores.jsonl"
    scores = read_token_scores(stored)
    for one in scores:
        assert (one.teacher_ids is None) == one.record.is_satisfactory
        if one.teacher_ids is not None and one.teacher_logps is not None:
            assert one.teacher == asdict(CUTConfig(output_dir="unused", **ON_CPU | settings).teacher_settings)
            widths = [len(ids) for ids in one.teacher_ids]
            assert all(math.fsum(map(math.exp, logps)) <= 1 + 1e-4 for logps in one.teacher_logps)
            if name == "redirect":
                assert [width > 0 for width in widths] == one.is_flagged
            else:
                assert set(widths) == {1} if name == "sampled" else all(0 < width <= 20 for width in widths)
    assert main(run_step(tmp_path, base, stored, "second", 6, 1, **settings)) == 0
    first, second = (compute_gradient(base, tmp_path / run) for run in ("first", "second"))
    assert (first - second).norm() / first.norm() < 1e-6
    # CUT reads the file too, and an older one has no teacher.
    assert main(run_step(tmp_path, base, stored, "cut", 6, 1)) == 0


@pytest.mark.parametrize("name", ["advice", "sampled", "redirect_only"])
def test_blame_stores_what_training_would(tmp_path: Path, base: Path, data: Path, name: str) -> None:
    settings = OBJECTIVES[name] | {"use_unlikelihood_loss": True, "distillation_clip": None, "importance_clip": None}
    settings = {key: value for key, value in settings.items() if value is not None and key != "use_unlikelihood_loss"}
    out = tmp_path / "scores.jsonl"
    blamed = {"threshold": 1.0} if settings["objective"] == "redirect" else {}
    options = list_options(model=base, data=data, out=out, device="cpu", **settings | blamed)
    assert main(["blame", *options]) == 0
    for run, source in (("records", data), ("scores", out)):
        assert main(run_step(tmp_path, base, source, run, 6, 1, **settings)) == 0
    first, second = (compute_gradient(base, tmp_path / run) for run in ("records", "scores"))
    assert (first - second).norm() / first.norm() < 1e-5


@pytest.mark.parametrize("objective", ["self_distillation", "redirect"])
def test_training_needs_no_unsatisfactory_record(tmp_path: Path, base: Path, objective: str) -> None:
    """An iteration of the loop may have none, and its stored distributions are all None."""
    records = write_lines(tmp_path / "records.jsonl", [row for row in RECORDS if row["judgment"] is None])
    scores = tmp_path / "scores.jsonl"
    options = ["--template", "alpaca", "--objective", objective]
    assert main(["blame", "--model", str(base), "--data", str(records), "--out", str(scores), *options]) == 0
    for name, data in {"own": records, "stored": scores}.items():
        assert main(run_step(tmp_path, base, data, name, 2, 1, objective=objective)) == 0
    own, stored = (compute_gradient(base, tmp_path / name) for name in ("own", "stored"))
    assert own.norm() > 0.01
    assert torch.equal(own, stored)


def test_blame_refuses_options_of_another_objective(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"model": base, "data": data, "out": data.with_name("unused.jsonl")}
    for options, named in (
        ({"guidance": 2}, "--guidance"),
        ({"objective": "redirect", "distillation": "sampled"}, "--distillation"),
        ({"objective": "redirect", "base_url": "http://localhost:1/v1"}, "local model"),
    ):
        assert main(["blame", *list_options(**common | options)]) == 2
        assert named in capsys.readouterr().err


def test_a_resumed_run_reuses_the_distributions(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run_step(tmp_path, base, data, "run", 6, 1, objective="redirect", save_strategy="steps", save_steps=1)
    assert main(options) == 0
    capsys.readouterr()
    monkeypatch.setattr("cutlm.training.dataset.score_rows", lambda *_, **__: pytest.fail("scored"))
    assert main([*options, "--resume_from_checkpoint", "last", "--max_steps", "2"]) == 0
    assert "reusing the token scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "settings", "named"),
    [
        (None, {"objective": "self_distillation"}, "without a teacher"),
        ({}, {"objective": "self_distillation", "guidance": 2.0}, "guidance"),
        ({}, {"objective": "self_distillation", "teacher_context": "advice"}, "context"),
        ({"objective": "redirect"}, {"objective": "self_distillation"}, "flagged_only"),
    ],
)
def test_scores_of_another_teacher_are_refused(
    tmp_path: Path, base: Path, data: Path, stored: dict[str, Any] | None, settings: dict[str, Any], named: str
) -> None:
    made = {"detector": "frozen"} if stored is None else {"objective": "self_distillation"} | stored
    assert main(run_step(tmp_path, base, data, "first", 6, 1, **made)) == 0
    with pytest.raises(ConfigError, match=named):
        make_trainer(base, tmp_path, read_token_scores(tmp_path / "first" / "token_scores.jsonl"), **settings)


def test_a_file_of_all_distributions_serves_redirect(tmp_path: Path, base: Path, data: Path) -> None:
    assert main(run_step(tmp_path, base, data, "all", 6, 1, objective="self_distillation")) == 0
    stored = tmp_path / "all" / "token_scores.jsonl"
    redirect = {"objective": "redirect"}
    for name, source in (("own", data), ("stored", stored)):
        assert main(run_step(tmp_path, base, source, name, 6, 1, **redirect)) == 0
    own, other = (compute_gradient(base, tmp_path / name) for name in ("own", "stored"))
    assert (own - other).norm() / own.norm() < 1e-6


def test_a_flag_that_was_added_by_hand_needs_the_teachers_tokens(tmp_path: Path, base: Path, data: Path) -> None:
    assert main(run_step(tmp_path, base, data, "run", 6, 1, objective="redirect", threshold=3.0)) == 0
    scores = read_token_scores(tmp_path / "run" / "token_scores.jsonl")
    place = scores[0].is_flagged.index(False)
    scores[0].is_flagged[place], scores[0].weights[place] = True, 1.0
    with pytest.raises(DataError, match=rf"teacher_ids\[{place}\]"):
        make_trainer(base, tmp_path, scores, objective="redirect", threshold=3.0)


def test_a_teachers_token_beyond_the_vocabulary_is_refused(
    tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_step(tmp_path, base, data, "first", 6, 1, objective="self_distillation")) == 0
    rows = [json.loads(line) for line in (tmp_path / "first" / "token_scores.jsonl").read_text("utf-8").splitlines()]
    taught = next(row for row in rows if row["teacher_ids"])
    next(ids for ids in taught["teacher_ids"] if ids)[0] = 10**6
    edited = write_lines(tmp_path / "edited.jsonl", rows)
    assert main(run_step(tmp_path, base, edited, "second", 6, 1, objective="self_distillation")) == 2
    assert "got 1000000" in capsys.readouterr().err


def test_spans_of_a_judge_can_be_redirected(tmp_path: Path, base: Path) -> None:
    rows = [row | {"wrong_spans": [[15, 21]]} if row["judgment"] else row for row in RECORDS]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    records = load_records(tmp_path / "records.json")
    trainer = make_trainer(base, tmp_path, records, objective="redirect", detector="spans")
    for row in trainer.train_dataset:
        if not row["is_satisfactory"]:
            assert any(row["is_flagged"])
            assert [bool(ids) for ids in row["teacher_ids"]] == row["is_flagged"]


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"guidance": 2.0}, "guidance: not used by objective cut"),
        ({"objective": "redirect", "guidance": 2.0}, "guidance: not used by objective redirect"),
        ({"objective": "self_distillation", "redirect_strength": 0.0}, "redirect_strength: not used"),
        ({"objective": "self_distillation", "threshold": 1.5}, "threshold: not used"),
        ({"objective": "self_distillation", "detector": "frozen"}, "detector: not used"),
        ({"objective": "redirect", "detector": "current"}, "detector: expected frozen or spans"),
        ({"objective": "redirect", "use_unlikelihood_loss": False, "gamma": 0.0}, "gamma: not used"),
        ({"objective": "redirect", "teacher_sees_response": True}, "expected teacher_context advice"),
        ({"objective": "self_distillation", "teacher_context": "scorn"}, "teacher_context: expected praise or advice"),
        ({"objective": "self_distillation", "divergence": "l2"}, "divergence: expected"),
        ({"objective": "self_distillation", "guidance": -1.0}, "guidance: expected a number of at least 0"),
        ({"objective": "self_distillation", "importance_clip": 0.0}, "importance_clip: expected a number above 0"),
        (
            {"objective": "self_distillation", "distillation": "sampled", "divergence": "jsd"},
            "divergence: not used",
        ),
    ],
)
def test_settings_of_another_objective_are_refused_in_one_sentence(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        CUTConfig(output_dir="unused", **ON_CPU | settings)
    assert len(caught.value.problems) == 1


def test_sharded_weights_need_stored_distributions(tmp_path: Path, base: Path, data: Path) -> None:
    config = CUTConfig(output_dir=str(tmp_path), **ON_CPU, objective="redirect")
    config.fsdp = True
    with pytest.raises(ConfigError, match="cutlm blame"):
        CUTTrainer(load_model(base), config, load_records(data), processing_class=load_tokenizer(base))


def test_a_teacher_that_is_not_possible_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher_context"):
        TeacherSettings(context="none")
