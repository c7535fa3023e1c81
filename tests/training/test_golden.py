"""The trainer reproduces the released code's loss, flags, probabilities and LoRA gradients."""

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
    """A trainer with the settings of the released code, and that code's results."""

    trainer: CUTTrainer
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    expected: dict[str, Any]

    def make_batch(self, *indices: int) -> dict[str, Any]:
        return self.trainer.data_collator([self.expected["examples"][index] for index in indices])

    def check_gradients(self) -> None:
        assert self.gradients
        for name, want in self.gradients.items():
            assert (self.parameters[name].grad - want).norm() <= 1e-4 * want.norm(), name


@pytest.fixture(scope="module")
def golden_dir() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("needs the released code's numbers in ../shared/golden")
    return folder


def load_golden(folder: Path, name: str, output_dir: Path) -> Golden:
    expected = json.loads((folder / f"{name}.json").read_text("utf-8"))
    tensors = load_file(folder / f"{name}.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**expected["model"]))
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    trainer = CUTTrainer(
        model=model,
        args=CUTConfig(
            output_dir=str(output_dir),
            threshold=expected["threshold"],
            unlikelihood_weight=expected["unlikelihood_weight"],
            gamma=0.0,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=expected["examples"],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **expected["lora"]),
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
    return Golden(trainer, parameters, gradients, expected)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, golden_dir: Path, tmp_path: Path) -> Golden:
    return load_golden(golden_dir, request.param, tmp_path)


def list_flags(golden: Golden) -> list[bool]:
    return [flag for tokens in golden.expected["tokens"] if tokens["flagged"] is not None for flag in tokens["flagged"]]


def test_loss_flags_and_gradients_match_the_released_code(golden):
    batch = golden.make_batch(*range(len(golden.expected["examples"])))
    loss, outputs = golden.trainer.compute_loss(golden.trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(golden.expected["loss"], abs=1e-5)
    assert outputs.is_flagged.tolist() == list_flags(golden)
    loss.backward()
    golden.check_gradients()


def test_token_probabilities_match_the_released_code(golden):
    batch = golden.make_batch(*range(len(golden.expected["examples"])))
    with torch.no_grad():
        probabilities = score_batch(golden.trainer.model, batch).exp()
    num_judged, num_satisfactory = split_lengths(batch)
    without, with_judgment, satisfactory = probabilities.split([num_judged, num_judged, num_satisfactory])

    tokens = golden.expected["tokens"]
    judged = [row for row in tokens if row["p_judged"] is not None]
    plain = [row for row in tokens if row["p_judged"] is None]
    assert without.tolist() == pytest.approx([p for row in judged for p in row["p_plain"]], rel=1e-5)
    assert with_judgment.tolist() == pytest.approx([p for row in judged for p in row["p_judged"]], rel=1e-5)
    assert satisfactory.tolist() == pytest.approx([p for row in plain for p in row["p_plain"]], rel=1e-5)


def split_records(num_records: int) -> list[list[list[int]]]:
    """Ways to split records into micro-batches: one by one, all in reverse, in halves, unevenly."""
    indices = list(range(num_records))
    ways = [[[index] for index in indices], [indices[::-1]], [indices[::2], indices[1::2]]]
    return [*ways, [indices[:1], indices[1:]]]


@pytest.mark.parametrize("way", range(4))
def test_micro_batches_of_a_step_add_up_to_the_released_loss(golden, way):
    batches = [golden.make_batch(*indices) for indices in split_records(len(golden.expected["examples"]))[way]]
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
    assert total == pytest.approx(golden.expected["loss"], abs=1e-5)
    golden.check_gradients()
    for row, tokens in zip(golden.expected["examples"], golden.expected["tokens"], strict=True):
        if tokens["flagged"] is not None:
            assert flags[tuple(row["response_ids"])] == tokens["flagged"]


def test_wrong_threshold_is_detected(golden_dir, tmp_path):
    golden = load_golden(golden_dir, "mixed", tmp_path)
    golden.trainer.args.threshold = 1.5
    batch = golden.make_batch(*range(len(golden.expected["examples"])))
    loss, outputs = golden.trainer.compute_loss(golden.trainer.model, batch, return_outputs=True)
    assert outputs.is_flagged.tolist() != list_flags(golden)
    assert abs(loss.item() - golden.expected["loss"]) > 1e-3
