"""`CUTTrainer`: its datasets, loss, log and evaluation, and the stop before a bad optimizer step."""

import copy
import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ON_CPU
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PrefixTuningConfig
from reference import score_response
from safetensors import safe_open
from tiny import CHATML, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ProgressCallback

from cutlm import CUTConfig, CUTTrainer, JudgedRecord
from cutlm.errors import ConfigError, DataError, NonFiniteError
from cutlm.flagging.sensitivity import pair_foreign
from cutlm.model.collator import CutCollator
from cutlm.prompting import rows as rows_module
from cutlm.prompting.encoding import Encoder
from cutlm.training import checkpoints

JUDGED: dict[str, Any] = {
    "prompt_ids": [1, 5, 6],
    "judged_prompt_ids": [1, 5, 6, 9, 8],
    "response_ids": [7, 8, 4, 2],
}
SATISFACTORY: dict[str, Any] = {"prompt_ids": [1, 6], "judged_prompt_ids": None, "response_ids": [4, 2]}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], init_lora_weights=False)
TOKENIZER = make_tokenizer("bpe")
# transformers gives a model the special tokens of its tokenizer.
SPECIAL = {name: getattr(TOKENIZER, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def make_config(folder: Path, **settings: Any) -> CUTConfig:
    return CUTConfig(output_dir=str(folder), **ON_CPU | {"save_strategy": "no", "logging_steps": 1} | settings)


def make_trainer(folder: Path, rows: Any, **settings: Any) -> CUTTrainer:
    return CUTTrainer(make_model(32), make_config(folder, **settings), rows)


def make_record_trainer(folder: Path, rows: Any, tokenizer: Any = TOKENIZER, **settings: Any) -> CUTTrainer:
    model = make_model(len(tokenizer))
    return CUTTrainer(model, make_config(folder, **settings), rows, processing_class=tokenizer)


def make_records(num_unsatisfactory: int, num_satisfactory: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"Name city {index}.",
            "output": f"City {index}.",
            "judgment": "It is wrong." if index < num_unsatisfactory else None,
        }
        for index in range(num_unsatisfactory + num_satisfactory)
    ]


# ---- Datasets ----


def test_records_may_be_dictionaries_objects_or_a_dataset(tmp_path: Path) -> None:
    rows = make_records(2, 1)
    expected = None
    for records in (rows, [JudgedRecord(**row) for row in rows], Dataset.from_list(rows)):
        encoded = [dict(row, location=None) for row in make_record_trainer(tmp_path, records).train_dataset]
        expected = expected or encoded
        assert encoded == expected
        assert [row["judged_prompt_ids"] is None for row in encoded] == [False, False, True]


@pytest.mark.parametrize(
    ("share", "num_unsatisfactory", "num_satisfactory", "num_kept"),
    [(0.25, 8, 10, 2), (0.25, 7, 10, 1), (1, 4, 10, 4), (2.0, 4, 3, 3), (0, 4, 3, 0)],
)
def test_downsampling_keeps_at_most_a_share_of_the_unsatisfactory_records(
    tmp_path: Path, share: float, num_unsatisfactory: int, num_satisfactory: int, num_kept: int
) -> None:
    rows = [JUDGED] * num_unsatisfactory
    rows += [SATISFACTORY | {"response_ids": [4 + index, 2]} for index in range(num_satisfactory)]
    trainers = [make_trainer(tmp_path, rows, downsample=share, seed=seed) for seed in (1, 1, 2)]
    kept = [
        [row["response_ids"][0] for row in trainer.train_dataset if row["judged_prompt_ids"] is None]
        for trainer in trainers
    ]
    assert [len(indices) for indices in kept] == [num_kept] * 3
    assert kept[0] == kept[1], "the seed decides"
    assert trainers[0].num_left_out == num_satisfactory - num_kept
    assert f"{num_kept} of {num_satisfactory} satisfactory records" in trainers[0].notices[-1]


def test_truncated_and_left_out_records_are_counted_and_named(tmp_path: Path) -> None:
    rows = make_records(3, 0)
    rows[1]["output"] = "word " * 200
    rows[2]["instruction"] = "word " * 200
    trainer = make_record_trainer(tmp_path, rows, max_length=160)
    assert len(trainer.train_dataset) == 2
    assert trainer.num_left_out == 1
    assert "2 records encoded (0 satisfactory, 2 unsatisfactory)" in trainer.notices[0]
    assert "1 records left out" in trainer.notices[0]
    assert trainer.notices[1].startswith("train_dataset[1]: ")
    assert max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in trainer.train_dataset) == 160


def test_a_dataset_with_nothing_left_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^train_dataset: ") as error:
        make_record_trainer(tmp_path, make_records(2, 0), max_length=3)
    assert "train_dataset[0]: the response alone fills max_length 3" in str(error.value)
    with pytest.raises(DataError, match=r"^train_dataset: "):
        make_trainer(tmp_path, [SATISFACTORY] * 3, downsample=0.5)


def test_bad_records_are_all_named(tmp_path: Path) -> None:
    rows = [*make_records(1, 0), {"instruction": "x"}, {"instruction": "x", "output": "y", "judgment": ["z"]}]
    with pytest.raises(DataError) as error:
        make_record_trainer(tmp_path, rows)
    assert "train_dataset[1]: field 'output'" in str(error.value)
    assert "train_dataset[2]: field 'judgment'" in str(error.value)
    with pytest.raises(ConfigError, match="processing_class"):
        make_trainer(tmp_path, make_records(1, 0))


def test_the_tokenizer_must_be_the_models_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer: expected token ids below 32, .* got 40"):
        make_trainer(tmp_path, [JUDGED | {"response_ids": [40, 2]}])


def test_records_longer_than_the_models_context_are_refused(tmp_path: Path) -> None:
    row = {"prompt_ids": [1, 2], "judged_prompt_ids": [1, 2, 3], "response_ids": [4, 5]}
    model = make_model(10, max_position_embeddings=4)
    CUTTrainer(model, make_config(tmp_path), [row | {"judged_prompt_ids": [1, 2]}])
    with pytest.raises(ConfigError, match=r"^max_length: .* 4 tokens, got 2048 and a record of 5"):
        CUTTrainer(model, make_config(tmp_path), [row])
    # A scaled RoPE is meant for longer ones.
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 4}
    CUTTrainer(make_model(10, max_position_embeddings=4, rope_parameters=yarn), make_config(tmp_path), [row])


def test_a_record_longer_than_the_context_stops_the_encoding_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(len(TOKENIZER), max_position_embeddings=100)
    rows = make_records(20, 0)

    def build(rows: Any, max_length: int) -> CUTTrainer:
        return CUTTrainer(model, make_config(tmp_path, max_length=max_length), rows, processing_class=TOKENIZER)

    assert len(build(rows, 101).train_dataset) == 20
    rows[0]["instruction"] = "word " * 100
    monkeypatch.setattr(rows_module, "_BATCH_SIZE", 2)
    encode_batch, said = rows_module.encode_batch, list[list[str]]()

    def encode(*args: Any) -> Any:
        said.append([record.getMessage() for record in caplog.records])
        return encode_batch(*args)

    monkeypatch.setattr(rows_module, "encode_batch", encode)
    caplog.clear()
    with pytest.raises(ConfigError, match=r"^max_length: .* context of 100 tokens, got 101 and a record of 101"):
        build(rows, 101)
    assert len(said) <= 4, "of 10 batches, those that were being encoded"
    assert said[0][-1].startswith("max_length: 101 is above the model's context of 100 tokens")
    caplog.clear()
    with pytest.raises(DataError):
        build(rows[:1] * 2, 3)
    assert not caplog.records, "the limit fits"


# ---- Arguments ----


def test_the_callers_arguments_are_not_changed(tmp_path: Path) -> None:
    args = make_config(tmp_path, max_steps=1, per_device_train_batch_size=2, lr_scheduler_kwargs={"num_cycles": 0.5})
    args._n_gpu = 2  # as on a machine with two GPUs, started without torchrun
    model, tokenizer, collator, lora = (
        make_model(len(TOKENIZER), **SPECIAL),
        copy.deepcopy(TOKENIZER),
        CutCollator(),
        LORA,
    )
    rows = make_records(1, 1)
    num_weights = sum(weight.numel() for weight in model.parameters())

    def describe() -> list[Any]:
        fields = {field.name: copy.deepcopy(getattr(args, field.name)) for field in dataclasses.fields(args)}
        return [
            *(fields, args._n_gpu, copy.deepcopy(vars(collator)), copy.deepcopy(rows)),
            *(model.config.to_dict(), model.generation_config.to_dict()),
            *(tokenizer.chat_template, len(tokenizer), lora.to_dict()),
        ]

    before = describe()
    trainer = CUTTrainer(
        model,
        args,
        rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        data_collator=collator,
    )
    trainer.train()
    trainer.evaluate()
    assert describe() == before
    assert trainer.args.n_gpu == 1
    assert any("torchrun --nproc_per_node 2" in notice for notice in trainer.notices)
    assert sum(weight.numel() for name, weight in model.named_parameters() if "lora" not in name) == num_weights


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        CUTTrainer(make_model(32), make_config(tmp_path), [JUDGED], **{name: print})
    CUTTrainer(make_model(32), make_config(tmp_path), [JUDGED], **{name: None})


def test_prompt_learning_is_refused(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match=r"^peft_config: "):
        CUTTrainer(make_model(32), make_config(tmp_path), [JUDGED], peft_config=config)


def test_lora_targets_without_a_match_list_the_modules_that_exist(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_proj", "c_fc"])
    with pytest.raises(ConfigError, match=r"^lora_target_modules: .*c_fc.*down_proj, gate_proj, k_proj, o_proj"):
        CUTTrainer(make_model(32), make_config(tmp_path), [JUDGED], peft_config=config)


def test_a_replaced_chat_template_is_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    assert tokenizer.chat_template == CHATML
    with caplog.at_level(logging.WARNING, "cutlm"):
        trainer = make_record_trainer(tmp_path, make_records(0, 1), tokenizer)
    assert "(template: alpaca)" in caplog.text
    assert trainer.processing_class.chat_template != CHATML
    trainer = make_record_trainer(tmp_path, make_records(0, 1), tokenizer, template="chat")
    assert trainer.processing_class.chat_template == CHATML
    assert not any("(template: " in notice for notice in trainer.notices)


# ---- Loss, log and evaluation ----


def test_satisfactory_records_alone_are_trained_by_likelihood(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [SATISFACTORY] * 3)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([SATISFACTORY, SATISFACTORY]))
    logps = score_response(trainer.model, SATISFACTORY["prompt_ids"], SATISFACTORY["response_ids"])
    assert loss.item() == pytest.approx(-sum(logps) / 2, abs=1e-5)


def test_the_log_reports_the_step(tmp_path: Path) -> None:
    rows = [JUDGED, SATISFACTORY, JUDGED | {"response_ids": [9, 10, 2]}]
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=3, max_steps=1)
    with torch.no_grad():
        batch = trainer.data_collator(rows)
        loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    trainer.train()
    log = trainer.state.log_history[0]
    flags = outputs.is_flagged.tolist()  # 4 tokens of one response, 3 of the other
    assert 0 < sum(flags) < 7
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert log["loss_contrast"] == pytest.approx(outputs.contrast.item() / 7, abs=1e-5)
    assert log["loss_likelihood"] == pytest.approx(outputs.likelihood.item() / 9, abs=1e-5)
    assert log["flagged_share"] == pytest.approx(sum(flags) / 7)
    assert log["mean_log_ratio"] == pytest.approx(outputs.log_ratios.mean().item(), abs=1e-5)
    shares = [sum(flags[:4]) / 4, sum(flags[4:]) / 3]
    assert log["flagged_share_q50"] == pytest.approx(sum(shares) / 2)
    assert log["flagged_share_q10"] == pytest.approx(min(shares) + 0.1 * abs(shares[0] - shares[1]))
    assert log["flagged_share_q90"] == pytest.approx(min(shares) + 0.9 * abs(shares[0] - shares[1]))
    assert log["tokens_per_second"] > 0
    assert log["records_left_out"] == 0


def test_the_mean_log_ratio_leaves_praise_out(tmp_path: Path) -> None:
    rows = [JUDGED | {"is_praised": is_praised} for is_praised in (False, True)]
    rows[1]["judged_prompt_ids"] = [1, 5, 6, 3, 3]
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=2, max_steps=1, objective="dual_cut")
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows), return_outputs=True)
    criticized, praised = outputs.log_ratios.split(4)
    assert praised.abs().sum() > 0.1
    trainer.train()
    assert trainer.state.log_history[0]["mean_log_ratio"] == pytest.approx(criticized.mean().item(), abs=1e-5)


class _Bar:
    """Stands for a progress bar of transformers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.texts: list[str] = []

    def set_postfix_str(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_bars_tell_how_far_a_step_and_an_evaluation_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    clock = itertools.count(step=2)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    rows = [JUDGED, SATISFACTORY, SATISFACTORY, JUDGED]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_batch": max_tokens}
    trainer = make_trainer(tmp_path, rows, max_steps=1, per_device_eval_batch_size=2, **settings)
    callback = ProgressCallback()
    callback.on_step_end = callback.on_log = callback.on_train_end = lambda *args, **kwargs: None
    callback.on_train_begin = callback.on_prediction_step = callback.on_evaluate = callback.on_step_end
    callback.training_bar = bar = _Bar()
    trainer.add_callback(callback)
    trainer.train()
    total = len(trainer.data_collator(rows)["input_ids"])
    shown = [int(text.split()[0].replace(",", "")) for text in bar.texts]
    assert len(shown) == (4 if max_tokens == 1 else 2), "every record, or every micro-batch"
    assert shown == sorted(set(shown))
    assert shown[-1] == total
    assert all(f" of {total} tokens of the step, " in text for text in bar.texts)
    callback.prediction_bar = _Bar()
    trainer.evaluate(trainer.train_dataset)
    shown = [int(text.split()[0]) for text in callback.prediction_bar.texts]
    assert len(shown) == (4 if max_tokens == 1 else 2)
    assert shown[-1] == total


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization": "record"}, {"use_satisfactory_loss": False, "use_judged_loss": False}],
)
def test_evaluation_is_the_loss_of_all_records_as_one_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [JUDGED, SATISFACTORY, JUDGED | {"response_ids": [9, 10, 2]}, SATISFACTORY, JUDGED]
    for batch_size, max_tokens in ((1, None), (2, 1), (5, None), (5, 25)):
        sizes = {"per_device_eval_batch_size": batch_size, "max_tokens_per_batch": max_tokens}
        trainer = make_trainer(tmp_path, rows, **sizes, **settings)
        metrics = trainer.evaluate(trainer.train_dataset)
        with torch.no_grad():
            expected = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows)).item()
        assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
        assert {"eval_loss_contrast", "eval_flagged_share"} <= metrics.keys()
        assert ("eval_loss_likelihood" in metrics) == ("use_judged_loss" not in settings)


@pytest.mark.parametrize("settings", [{}, {"objective": "dual_cut"}])
def test_evaluation_and_start_measure_the_sensitivity(tmp_path: Path, settings: dict[str, Any]) -> None:
    records = [record | {"judgment": f"Fault {i}."} for i, record in enumerate(make_records(5, 0))] + make_records(0, 2)
    args = make_config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=1e-1, **settings)
    trainer = CUTTrainer(make_model(len(TOKENIZER)), args, records, records, processing_class=TOKENIZER)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_flag_signal" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert not any("flag_signal" in line for line in trainer.state.log_history)
    encoder = Encoder(TOKENIZER, "alpaca")
    judged = records[:5]
    foreign = pair_foreign([record["judgment"] for record in judged])
    for model, line in ((before, lines[0]), (trainer.model, lines[2])):
        num_flagged, num_larger = [0, 0], 0
        for record, source in zip(judged, foreign, strict=True):
            response_ids = encoder.encode_response(record["output"])
            judgments = (None, record["judgment"], judged[source]["judgment"])
            prompts = [encoder.encode_prompt(record["instruction"], judgment) for judgment in judgments]
            logps = [torch.tensor(score_response(model, prompt, response_ids)) for prompt in prompts]
            rises = [logps[1] - logps[0], logps[2] - logps[0]]
            num_flagged = [n + int((rise > math.log(1.1)).sum()) for n, rise in zip(num_flagged, rises, strict=True)]
            num_larger += bool(rises[0].max() > rises[1].max())
        assert line["eval_flag_signal"] == pytest.approx(1 - num_flagged[1] / num_flagged[0])
        assert line["eval_pairwise"] == num_larger / 5
    assert lines[0]["eval_flag_signal"] != lines[2]["eval_flag_signal"]


def test_without_evaluation_records_the_start_measures_the_training_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [record | {"judgment": f"Fault {index}."} for index, record in enumerate(make_records(5, 0))]
    for settings, expected in (({"threshold": 1.0}, [0]), ({"sensitivity_records": 0}, []), ({"detector": "off"}, [])):
        trainer = make_record_trainer(tmp_path, records, max_steps=1, **settings)
        trainer.train()
        assert [line["step"] for line in trainer.state.log_history if "flag_signal" in line] == expected
    assert caplog.text.count("hardly reads these judgments") == 1


def test_normalizations_agree_on_responses_of_equal_length(tmp_path: Path) -> None:
    rows = [JUDGED, JUDGED | {"response_ids": [9, 10, 11, 2]}, SATISFACTORY | {"response_ids": [4, 5, 6, 2]}]
    losses = []
    for normalization in ("token", "record"):
        trainer = make_trainer(tmp_path, rows, normalization=normalization)
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_normalization_by_record_is_a_mean_over_records_of_means_over_tokens(tmp_path: Path) -> None:
    rows = [JUDGED, JUDGED | {"response_ids": [9, 2]}, SATISFACTORY]
    trainer = make_trainer(tmp_path, rows, normalization="record", gamma=0.0)
    model = trainer.model.eval()
    likelihoods, contrasts = [], []
    for row in rows:
        without = score_response(model, row["prompt_ids"], row["response_ids"])
        if row["judged_prompt_ids"] is None:
            likelihoods.append(-sum(without) / len(without))
            continue
        judged = score_response(model, row["judged_prompt_ids"], row["response_ids"])
        likelihoods.append(-sum(judged) / len(judged))
        terms = [
            math.log1p(-math.exp(p)) if math.exp(q) > 1.1 * math.exp(p) else p
            for p, q in zip(without, judged, strict=True)
        ]
        contrasts.append(-sum(terms) / len(terms))
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx((sum(likelihoods) / 3 + sum(contrasts) / 2) / 2, abs=1e-5)


# ---- The stop before a bad step ----


def test_a_non_finite_loss_stops_before_the_step_and_names_the_record(tmp_path: Path) -> None:
    rows = [JUDGED | {"location": "good.jsonl:1"}, SATISFACTORY | {"prompt_ids": [31], "location": "bad.jsonl:7"}]
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=2)
    trainer.model.model.embed_tokens.weight.data[31] = float("nan")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"^step 1: ") as error:
        trainer.train()
    assert "bad.jsonl:7" in str(error.value)
    assert "good.jsonl:1" not in str(error.value)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_non_finite_gradient_stops_before_the_step_and_names_the_records_of_the_step(tmp_path: Path) -> None:
    rows = [JUDGED | {"location": "a.jsonl:1"}, SATISFACTORY | {"location": "a.jsonl:2"}]
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = trainer.model.lm_head.weight.clone()
    with pytest.raises(NonFiniteError, match=r"^step 1: ") as error:
        trainer.train()
    assert "a.jsonl:1" in str(error.value)
    assert "a.jsonl:2" in str(error.value)
    assert torch.equal(before, trainer.model.lm_head.weight)


# ---- Models ----


def test_activation_checkpointing_runs_layers_twice_and_keeps_the_gradient(tmp_path: Path) -> None:
    gradients, num_calls = [], []
    for is_checkpointed in (False, True):
        model = make_model(32)
        calls: list[None] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        trainer = CUTTrainer(
            model,
            make_config(tmp_path, activation_checkpointing=is_checkpointed, max_steps=1, optim="sgd", max_grad_norm=0),
            [JUDGED, SATISFACTORY],
            peft_config=LORA,
        )
        before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
        num_before = len(calls)
        trainer.train()
        num_calls.append(len(calls) - num_before)
        moved = [value - before[name] for name, value in trainer.model.named_parameters() if name in before]
        gradients.append(torch.cat([value.flatten() for value in moved]))
    assert num_calls == [3, 6]
    assert gradients[0].norm() > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)


def test_compiled_layers_take_the_same_steps_and_are_saved_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    start = list(range(3, 23))
    sharing = {"prompt_ids": [*start, 1], "judged_prompt_ids": [*start, 2, 4], "response_ids": [7, 2]}
    trajectories, names = [], []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        # This backend traces the same graphs and compiles nothing.
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"} if is_compiled else {}
        trainer = CUTTrainer(
            make_model(32, num_hidden_layers=1),
            make_config(tmp_path, max_steps=3, learning_rate=1e-2, activation_checkpointing=True, **compiled),
            [JUDGED, SATISFACTORY, sharing] * 2,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], lora_dropout=0.0),
        )
        trainer.train()
        assert bool(counters["stats"]["unique_graphs"]) == is_compiled
        trajectories.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        trainer.save_model()
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert trajectories[1] == pytest.approx(trajectories[0], rel=1e-5)
    assert trajectories[0][-1] < trajectories[0][0]
    assert names[0] == names[1]


def test_compiling_needs_a_model_that_names_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(32)
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ConfigError, match=r"^torch_compile: "):
        CUTTrainer(model, make_config(tmp_path, torch_compile=True), [JUDGED])


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3", "opt", "gpt_neox", "mistral", "phi"])
def test_any_causal_language_model_can_be_trained(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    elif kind == "opt":
        sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 16}
    else:
        sizes |= {"intermediate_size": 32}
    if kind in ("gemma2", "qwen3", "mistral"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **tokens))
    args = make_config(tmp_path, max_steps=8, learning_rate=2e-2, lr_scheduler_type="constant")
    trainer = CUTTrainer(model, args, [JUDGED, SATISFACTORY] * 2)
    trainer.train()
    losses = [line["loss_likelihood"] for line in trainer.state.log_history if "loss_likelihood" in line]
    assert losses[-1] < losses[0] - 0.5


def test_bfloat16_autocast_covers_body_and_head(tmp_path: Path) -> None:
    dtypes = []
    trainer = make_trainer(tmp_path, [JUDGED], bf16=True)
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([JUDGED]))
    exact = make_trainer(tmp_path, [JUDGED])
    expected = exact.compute_loss(exact.model, exact.data_collator([JUDGED]))
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


# ---- Saving ----


def test_the_card_of_an_adapter_is_filled_in(tmp_path: Path) -> None:
    CUTTrainer(make_model(32), make_config(tmp_path), [JUDGED], peft_config=LORA).save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.cutlm["lora"]["target_modules"] == ["down_proj"]
    assert "It was trained on token ids" in card.text
    assert "More Information Needed" not in card.text


def test_the_saved_model_has_the_prompt_of_training(tmp_path: Path) -> None:
    trainer = make_record_trainer(tmp_path, make_records(1, 1))
    trainer.save_model()
    assert TOKENIZER.chat_template is None, "the caller's tokenizer is not changed"
    prompt = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "Name city 0."}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == trainer.train_dataset[0]["prompt_ids"]
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names), "nothing is pickled"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["use_cache"], "as before training"
