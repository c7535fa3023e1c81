"""The released code's own numbers (loss, flags, probabilities, LoRA gradients), through the public API."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cutlm import CUTConfig, CUTTrainer
from cutlm.model.collator import split_lengths
from cutlm.model.forward import score_batch

NAMES = ("negatives", "mixed", "positives")


class Golden(NamedTuple):
    """A trainer set up as the released code was, and what that code found."""

    trainer: CUTTrainer
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    told: dict[str, Any]

    def make_batch(self, *indices: int) -> dict[str, Any]:
        return self.trainer.data_collator([self.told["examples"][index] for index in indices])

    def check_gradients(self) -> None:
        assert self.gradients
        for name, want in self.gradients.items():
            assert (self.parameters[name].grad - want).norm() <= 1e-4 * want.norm(), name


@pytest.fixture(scope="module")
def golden_dir() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the released code's numbers are not here (a folder `shared` beside the checkout)")
    return folder


def load_golden(folder: Path, name: str, output_dir: Path) -> Golden:
    told = json.loads((folder / f"{name}.json").read_text("utf-8"))
    tensors = load_file(folder / f"{name}.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**told["model"]))
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    trainer = CUTTrainer(
        model=model,
        args=CUTConfig(
            output_dir=str(output_dir),
            threshold=told["threshold"],
            unlikelihood_weight=told["unlikelihood_weight"],
            gamma=0.0,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=told["examples"],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **told["lora"]),
    )
    parameters = {
        key.replace(".default", "").removeprefix("base_model.model."): value
        for key, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    adapter = {key[5:]: value for key, value in tensors.items() if key.startswith("lora.")}
    assert parameters.keys() == adapter.keys()
    for key, value in adapter.items():
        parameters[key].data.copy_(value)
    gradients = {key[5:]: value for key, value in tensors.items() if key.startswith("grad.")}
    return Golden(trainer, parameters, gradients, told)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, golden_dir: Path, tmp_path: Path) -> Golden:
    return load_golden(golden_dir, request.param, tmp_path)


def list_flags(golden: Golden) -> list[bool]:
    return [flag for tokens in golden.told["tokens"] if tokens["flagged"] is not None for flag in tokens["flagged"]]


def test_loss_flags_and_gradients_are_those_of_the_released_code(golden):
    batch = golden.make_batch(*range(len(golden.told["examples"])))
    loss, outputs = golden.trainer.compute_loss(golden.trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(golden.told["loss"], abs=1e-5)
    assert outputs.is_flagged.tolist() == list_flags(golden)
    loss.backward()
    golden.check_gradients()


def test_each_tokens_probability_in_both_contexts_is_that_of_the_released_code(golden):
    batch = golden.make_batch(*range(len(golden.told["examples"])))
    with torch.no_grad():
        probabilities = score_batch(golden.trainer.model, batch).exp()
    num_judged, num_satisfactory = split_lengths(batch)
    without, with_judgment, satisfactory = probabilities.split([num_judged, num_judged, num_satisfactory])

    tokens = golden.told["tokens"]
    judged = [row for row in tokens if row["p_judged"] is not None]
    plain = [row for row in tokens if row["p_judged"] is None]
    assert without.tolist() == pytest.approx([p for row in judged for p in row["p_plain"]], rel=1e-5)
    assert with_judgment.tolist() == pytest.approx([p for row in judged for p in row["p_judged"]], rel=1e-5)
    assert satisfactory.tolist() == pytest.approx([p for row in plain for p in row["p_plain"]], rel=1e-5)


def cut_up(num_records: int) -> list[list[list[int]]]:
    """Ways to cut records into micro-batches: one by one, in reverse, in halves, unevenly."""
    everything = list(range(num_records))
    ways = [[[index] for index in everything], [everything[::-1]], [everything[::2], everything[1::2]]]
    return [*ways, [everything[:1], everything[1:]]]


@pytest.mark.parametrize("way", range(4))
def test_micro_batches_of_a_step_add_up_to_the_released_codes_whole(golden, way):
    batches = [golden.make_batch(*indices) for indices in cut_up(len(golden.told["examples"]))[way]]
    trainer = golden.trainer
    fetched, counts = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    assert len(fetched) == len(batches)

    total, flags = 0.0, {}
    for batch in fetched:
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=counts)
        loss.backward()
        total += loss.item()
        lengths = batch["response_lengths"][: batch["num_unsatisfactory"]]
        targets = batch["target_ids"][: sum(lengths)].split(lengths)
        flags |= {
            tuple(ids.tolist()): part.tolist()
            for ids, part in zip(targets, outputs.is_flagged.split(lengths), strict=True)
        }
    assert total == pytest.approx(golden.told["loss"], abs=1e-5)
    golden.check_gradients()
    for row, tokens in zip(golden.told["examples"], golden.told["tokens"], strict=True):
        if tokens["flagged"] is not None:
            assert flags[tuple(row["response_ids"])] == tokens["flagged"]


def test_a_wrong_threshold_is_seen(golden_dir, tmp_path):
    golden = load_golden(golden_dir, "mixed", tmp_path)
    golden.trainer.args.threshold = 1.5
    batch = golden.make_batch(*range(len(golden.told["examples"])))
    loss, outputs = golden.trainer.compute_loss(golden.trainer.model, batch, return_outputs=True)
    assert outputs.is_flagged.tolist() != list_flags(golden)
    assert abs(loss.item() - golden.told["loss"]) > 1e-3
