"""What `CUTTrainer` adds to the loss: data, logs, evaluation, and the stop before a bad optimizer step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from safetensors import safe_open
from tiny import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from cutlm import CUTConfig, CUTTrainer, JudgedRecord
from cutlm.errors import ConfigError, DataError, NonFiniteError

JUDGED = {"prompt_ids": [1, 5, 6], "judged_prompt_ids": [1, 5, 6, 9, 8], "response_ids": [7, 8, 4, 2]}
SATISFACTORY = {"prompt_ids": [1, 6], "judged_prompt_ids": None, "response_ids": [4, 2]}


def _config(folder: Path, **settings: Any) -> CUTConfig:
    values = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1} | settings
    return CUTConfig(output_dir=str(folder), **values)


def _trainer(folder: Path, rows: Any, **settings: Any) -> CUTTrainer:
    return CUTTrainer(make_model(32), _config(folder, **settings), rows)


def _records(num_unsatisfactory: int, num_satisfactory: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"Name city {index}.",
            "output": f"City {index}.",
            "judgment": "It is wrong." if index < num_unsatisfactory else None,
        }
        for index in range(num_unsatisfactory + num_satisfactory)
    ]


def test_records_come_as_dictionaries_objects_or_a_dataset(tmp_path: Path) -> None:
    rows = _records(2, 1)
    tokenizer = make_tokenizer("bpe")
    model = make_model(len(tokenizer))
    expected = None
    for records in (rows, [JudgedRecord(**row) for row in rows], Dataset.from_list(rows)):
        trainer = CUTTrainer(model, _config(tmp_path), records, processing_class=tokenizer)
        encoded = [dict(row, location=None) for row in trainer.train_dataset]
        expected = expected or encoded
        assert encoded == expected
        assert [row["judged_prompt_ids"] is None for row in encoded] == [False, False, True]


def test_a_dataset_without_judgments_is_learned_as_it_stands(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, [SATISFACTORY] * 3)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([SATISFACTORY, SATISFACTORY]))
    ids = torch.tensor([[1, 6, 4]])
    logps = trainer.model(ids).logits[0, 1:].log_softmax(-1)
    assert loss.item() == pytest.approx(-(logps[0, 4] + logps[1, 2]).item() / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("share", "num_unsatisfactory", "num_satisfactory", "num_kept"),
    [(0.25, 8, 10, 2), (0.25, 7, 10, 1), (1, 4, 10, 4), (2.0, 4, 3, 3), (0, 4, 3, 0)],
)
def test_downsampling_keeps_at_most_a_share_of_the_unsatisfactory_records(
    tmp_path: Path, share: float, num_unsatisfactory: int, num_satisfactory: int, num_kept: int
) -> None:
    rows = [JUDGED] * num_unsatisfactory + [
        SATISFACTORY | {"response_ids": [4 + index, 2]} for index in range(num_satisfactory)
    ]
    picks = [
        [
            row["response_ids"][0]
            for row in _trainer(tmp_path, rows, downsample=share, seed=seed).train_dataset
            if row["judged_prompt_ids"] is None
        ]
        for seed in (1, 1, 2)
    ]
    assert len(picks[0]) == num_kept
    assert picks[0] == picks[1], "the seed decides"
    trainer = _trainer(tmp_path, rows, downsample=share)
    assert trainer.num_left_out == num_satisfactory - num_kept
    assert f"keeps {num_kept} of {num_satisfactory} satisfactory records" in trainer.notices[-1]


def test_what_is_left_out_and_cut_is_counted_and_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    rows = _records(3, 0)
    rows[1]["output"] = "word " * 200
    rows[2]["instruction"] = "word " * 200
    trainer = CUTTrainer(
        make_model(len(tokenizer)), _config(tmp_path, max_length=160), rows, processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == 2
    assert trainer.num_left_out == 1
    assert "2 records encoded (0 satisfactory, 2 unsatisfactory)" in trainer.notices[0]
    assert "1 records left out" in trainer.notices[0]
    assert trainer.notices[1] == "train_dataset[1]: the response alone fills max_length 160; left out"
    assert max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in trainer.train_dataset) == 160


def test_a_data_set_where_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    with pytest.raises(DataError, match="nothing remains to train on") as error:
        CUTTrainer(
            make_model(len(tokenizer)), _config(tmp_path, max_length=3), _records(2, 0), processing_class=tokenizer
        )
    assert "train_dataset[0]: the response alone fills max_length 3" in str(error.value), "it says why"
    with pytest.raises(DataError, match="nothing remains to train on"):
        _trainer(tmp_path, [SATISFACTORY] * 3, downsample=0.5)


def test_bad_rows_are_all_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    rows = [*_records(1, 0), {"instruction": "x"}, {"instruction": "x", "output": "y", "judgment": ["z"]}]
    with pytest.raises(DataError) as error:
        CUTTrainer(make_model(len(tokenizer)), _config(tmp_path), rows, processing_class=tokenizer)
    assert "train_dataset[1]: field 'output' is missing" in str(error.value)
    assert "train_dataset[2]: field 'judgment': expected a string or null, got a list" in str(error.value)
    with pytest.raises(DataError, match=r"train_dataset\[0\]: field 'response_ids': expected a filled list of token"):
        _trainer(tmp_path, [JUDGED | {"response_ids": []}])
    with pytest.raises(ConfigError, match="records need a tokenizer"):
        CUTTrainer(make_model(32), _config(tmp_path), _records(1, 0))


def test_encoded_rows_without_a_judged_prompt_are_satisfactory(tmp_path: Path) -> None:
    bare = {key: value for key, value in SATISFACTORY.items() if key != "judged_prompt_ids"}
    for rows in ([bare], Dataset.from_list([bare])):
        assert _trainer(tmp_path, rows, max_steps=1).train_dataset[0]["judged_prompt_ids"] is None


def test_a_tokenizer_that_is_not_the_models_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train_dataset: expected token ids below 32, .* got 40; give the model's own"
    ):
        _trainer(tmp_path, [JUDGED | {"response_ids": [40, 2]}])


def test_several_gpus_in_one_process_are_not_dealt_a_batch_by_rows(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config._n_gpu = 2  # as on a machine with two, started without torchrun
    trainer = CUTTrainer(make_model(32), config, [JUDGED])
    assert config.n_gpu == 1
    assert trainer.notices == [
        "2 GPUs are here and one is used; for all of them start with: torchrun --nproc_per_node 2 -m cutlm ..."
    ]


def test_prompt_learning_is_refused(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="expected an adapter inside the model such as LoRA"):
        CUTTrainer(make_model(32), _config(tmp_path), [JUDGED], peft_config=config)


def test_lora_targets_that_match_nothing_name_those_that_exist(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_proj", "c_fc"])
    with pytest.raises(ConfigError, match=r"no module is named c_fc; .*down_proj, gate_proj, k_proj, o_proj"):
        CUTTrainer(make_model(32), _config(tmp_path), [JUDGED], peft_config=config)


def test_the_log_holds_what_the_step_did(tmp_path: Path) -> None:
    rows = [JUDGED, SATISFACTORY, JUDGED | {"response_ids": [9, 10, 2]}]
    trainer = _trainer(tmp_path, rows, per_device_train_batch_size=3, max_steps=1)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
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


@pytest.mark.parametrize("normalization", ["token", "record"])
def test_evaluation_is_the_loss_of_all_records_as_one_step(tmp_path: Path, normalization: str) -> None:
    rows = [JUDGED, SATISFACTORY, JUDGED | {"response_ids": [9, 10, 2]}, SATISFACTORY, JUDGED]
    trainer = CUTTrainer(
        make_model(32),
        _config(tmp_path, per_device_eval_batch_size=2, normalization=normalization),
        rows,
        eval_dataset=rows,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows)).item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert {"eval_loss_contrast", "eval_loss_likelihood", "eval_flagged_share"} <= metrics.keys()


def test_records_of_equal_length_do_not_care_for_the_normalization(tmp_path: Path) -> None:
    rows = [JUDGED, JUDGED | {"response_ids": [9, 10, 11, 2]}, SATISFACTORY | {"response_ids": [4, 5, 6, 2]}]
    losses = []
    for normalization in ("token", "record"):
        trainer = _trainer(tmp_path, rows, normalization=normalization)
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_paper_normalization_is_a_mean_over_records_of_means_over_tokens(tmp_path: Path) -> None:
    rows = [JUDGED, JUDGED | {"response_ids": [9, 2]}, SATISFACTORY]
    trainer = _trainer(tmp_path, rows, normalization="record", gamma=0.0)
    model = trainer.model.eval()
    likelihoods, contrasts = [], []
    for row in rows:
        response = torch.tensor(row["response_ids"])

        def logps(prompt: list[int], response: torch.Tensor = response) -> torch.Tensor:
            ids = torch.tensor([[*prompt, *response[:-1].tolist()]])
            return model(ids).logits[0, -len(response) :].log_softmax(-1).gather(1, response[:, None])[:, 0]

        without = logps(row["prompt_ids"])
        if row["judged_prompt_ids"] is None:
            likelihoods.append(-without.mean())
            continue
        judged = logps(row["judged_prompt_ids"])
        likelihoods.append(-judged.mean())
        terms = [torch.log(1 - p.exp()) if q.exp() > 1.1 * p.exp() else p for p, q in zip(without, judged, strict=True)]
        contrasts.append(-sum(terms) / len(terms))
    expected = (sum(likelihoods) / 3 + sum(contrasts) / 2) / 2
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_record(tmp_path: Path) -> None:
    rows = [JUDGED | {"location": "good.jsonl:1"}, SATISFACTORY | {"prompt_ids": [31], "location": "bad.jsonl:7"}]
    trainer = _trainer(tmp_path, rows, per_device_train_batch_size=2)
    trainer.model.model.embed_tokens.weight.data[31] = float("nan")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1: .*log-probs of bad\.jsonl:7 are no numbers.*before the"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_gradient_that_is_no_number_stops_before_the_step_and_names_the_records(tmp_path: Path) -> None:
    rows = [JUDGED | {"location": "a.jsonl:1"}, SATISFACTORY | {"location": "a.jsonl:2"}]
    trainer = _trainer(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = trainer.model.lm_head.weight.clone()
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient norm is (nan|inf)") as error:
        trainer.train()
    assert "a.jsonl:1" in str(error.value)
    assert "a.jsonl:2" in str(error.value)
    assert torch.equal(before, trainer.model.lm_head.weight)


def test_recomputing_activations_changes_no_gradient_but_runs_the_layers_again(tmp_path: Path) -> None:
    gradients, num_calls = [], []
    for is_recomputed in (False, True):
        model = make_model(32)
        calls: list[None] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        trainer = CUTTrainer(
            model,
            _config(tmp_path, activation_checkpointing=is_recomputed, max_steps=1, optim="sgd", max_grad_norm=0),
            [JUDGED, SATISFACTORY],
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], init_lora_weights=False),
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
        # This back end needs no compiler of C++; what is traced is the same.
        compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if is_compiled else {}
        trainer = CUTTrainer(
            make_model(32),
            _config(tmp_path, max_steps=3, learning_rate=1e-2, activation_checkpointing=True, **compiled),
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


def test_an_adapters_card_is_no_form_to_be_filled(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])
    CUTTrainer(make_model(32), _config(tmp_path), [JUDGED], peft_config=config).save_model()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft\n" in card.split("---\n")[1]
    assert card.split("---\n")[2].startswith("\n# An adapter trained by cutlm\n")
    assert "More Information Needed" not in card


def test_a_model_that_does_not_name_its_layers_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(32)
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ConfigError, match=r"^torch_compile: LlamaForCausalLM does not declare its layers"):
        CUTTrainer(model, _config(tmp_path, torch_compile=True), [JUDGED])


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
    rows = [JUDGED, SATISFACTORY] * 2
    trainer = CUTTrainer(model, _config(tmp_path, max_steps=8, learning_rate=2e-2, lr_scheduler_type="constant"), rows)
    trainer.train()
    losses = [line["loss_likelihood"] for line in trainer.state.log_history if "loss_likelihood" in line]
    assert losses[-1] < losses[0] - 0.5


def test_bfloat16_autocast_reaches_the_body_and_the_head(tmp_path: Path) -> None:
    dtypes = []
    trainer = _trainer(tmp_path, [JUDGED], bf16=True)
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([JUDGED]))
    exact = _trainer(tmp_path, [JUDGED])
    expected = exact.compute_loss(exact.model, exact.data_collator([JUDGED]))
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_the_saved_model_carries_the_prompt_of_its_training(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bpe")
    trainer = CUTTrainer(make_model(len(tokenizer)), _config(tmp_path), _records(1, 1), processing_class=tokenizer)
    trainer.save_model()
    assert tokenizer.chat_template is None, "the caller's tokenizer is left as it was"
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path)
    prompt = saved.apply_chat_template(
        [{"role": "user", "content": "Name city 0."}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == trainer.train_dataset[0]["prompt_ids"]
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names), "nothing pickled"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
