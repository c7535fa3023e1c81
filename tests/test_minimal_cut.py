"""`examples/minimal_cut.py` computes the released code's loss, and the same loss as cutlm."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cutlm.losses import combine_parts, cut_loss
from cutlm.model.collator import CutCollator, split_lengths
from cutlm.model.forward import score_batch
from cutlm.prompting.encoding import Encoder

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("minimal_cut", ROOT / "examples" / "minimal_cut.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minimal_cut = load_example()


def list_flags(flags: list[Any]) -> list[list[bool] | None]:
    return [None if one is None else one.tolist() for one in flags]


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the released code's numbers in ../shared/golden")
@pytest.mark.parametrize("name", ["negatives", "mixed", "positives"])
def test_example_matches_the_released_code(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**golden["model"]))
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **golden["lora"]))
    parameters = {
        key.replace(".default", "").removeprefix("base_model.model."): value
        for key, value in adapted.named_parameters()
        if value.requires_grad
    }
    for key, value in parameters.items():
        value.data.copy_(tensors[f"lora.{key}"])

    loss, flags = minimal_cut.cut_loss(
        adapted, golden["examples"], threshold=golden["threshold"], alpha=golden["unlikelihood_weight"]
    )
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    assert list_flags(flags) == [tokens["flagged"] for tokens in golden["tokens"]]
    loss.backward()
    gradients = {key[5:]: value for key, value in tensors.items() if key.startswith("grad.")}
    assert gradients
    for key, want in gradients.items():
        assert (parameters[key].grad - want).norm() <= 1e-4 * want.norm(), key


@pytest.mark.parametrize("kinds", ["judged", "satisfactory", "both"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_example_matches_cutlm(kinds: str, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(60, (length,), generator=generator).tolist()

    def make_record(is_judged: bool) -> dict[str, Any]:
        return {"prompt_ids": draw(7), "judged_prompt_ids": draw(11) if is_judged else None, "response_ids": draw(9)}

    records = [make_record(kinds == "judged" or (kinds == "both" and index < 3)) for index in range(5)]
    model = make_model(60)
    parameters = list(model.parameters())
    loss, flags = minimal_cut.cut_loss(model, records, threshold=1.2, alpha=0.5, gamma=gamma)

    batch = CutCollator()(records)
    num_judged, num_satisfactory = split_lengths(batch)
    logps = score_batch(model, batch).split([num_judged, num_judged, num_satisfactory])
    parts = cut_loss(*logps, threshold=1.2, unlikelihood_weight=0.5, gamma=gamma)
    want = combine_parts(parts.contrast, parts.likelihood, num_judged, num_judged + num_satisfactory)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    got = [flag for one in flags if one is not None for flag in one.tolist()]
    assert got == parts.is_flagged.tolist()
    assert kinds == "satisfactory" or 0 < sum(got) < len(got)
    for ours, theirs in zip(torch.autograd.grad(want, parameters), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_example_encodes_records_as_cutlm_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(minimal_cut.TINY_MODEL)
    encoder = Encoder(tokenizer, "alpaca")
    for instruction, response, judgment in minimal_cut.RECORDS:
        record = minimal_cut.encode_record(tokenizer, instruction, response, judgment)
        assert record["prompt_ids"] == encoder.encode_prompt(instruction)
        if judgment is not None:
            assert record["judged_prompt_ids"] == encoder.encode_prompt(instruction, judgment)


def test_example_shows_flags_and_a_falling_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["minimal_cut.py", "--steps=4"])
    minimal_cut.main()
    out = capsys.readouterr().out
    assert "The capital of Greece is[ Patras]." in out
    losses = [float(line.split()[3]) for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_example_fits_in_200_lines() -> None:
    source = (ROOT / "examples" / "minimal_cut.py").read_text("utf-8")
    assert len(source.splitlines()) <= 200
    assert "import cutlm" not in source
    assert "from cutlm" not in source
