"""`cutlm refine`: improved responses to unsatisfactory records; everything else is unchanged."""

import json
from pathlib import Path

import pytest
from tiny import save_tiny_model

from cutlm.cli import main
from cutlm.data.records import load_records
from cutlm.generation.files import encode_refinement_prompts
from cutlm.generation.local import Sampling, generate_responses
from cutlm.model.loading import load_trained
from cutlm.prompting.encoding import Encoder

RECORDS = [
    {"instruction": "Name a city.", "output": "Sydney is.", "judgment": "It is wrong.", "source": "test"},
    {"instruction": "Name a city.", "output": "Canberra is.", "judgment": None},
    {"instruction": "Name one.", "output": "So is.", "judgment": "Not a city.", "i_ans": "Canberra is."},
    {"instruction": "Name another.", "input": "A large one.", "output": "So.", "judgment": "It is wrong."},
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    save_tiny_model(folder / "base")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    return folder


def _refine(workplace: Path, *options: str, data: str = "records.json") -> int:
    paths = ["--model", str(workplace / "base"), "--data", str(workplace / data), "--out", str(workplace / "out.json")]
    return main(["refine", *paths, "--max_new_tokens", "8", "--overwrite", *options])


def test_only_unsatisfactory_records_without_an_improved_response_get_one(workplace, capsys):
    assert _refine(workplace) == 0
    rows = json.loads((workplace / "out.json").read_text())
    assert [row | {"i_ans": None} for row in rows] == [row | {"i_ans": None} for row in RECORDS]
    model, tokenizer = load_trained(workplace / "base", device="cpu")
    encoder = Encoder(tokenizer, "alpaca")
    asked = [load_records(workplace / "records.json")[index] for index in (0, 3)]
    expected = generate_responses(model, tokenizer, encoder, encode_refinement_prompts(asked, encoder), Sampling(8))
    assert [rows[0]["i_ans"], rows[3]["i_ans"]] == expected
    assert "i_ans" not in rows[1]
    assert rows[2]["i_ans"] == "Canberra is."
    assert "2 of 4 responses improved" in capsys.readouterr().out


def test_a_stopped_run_resumes(workplace, capsys):
    assert _refine(workplace, "--batch_size", "1") == 0
    whole = (workplace / "out.json").read_bytes()
    (workplace / "out.json").unlink()
    import cutlm.generation.local as generation

    generate, calls = generation._generate_batch, []

    def fail_on_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_generate_batch", fail_on_second)
        assert _refine(workplace, "--batch_size", "1") == 130
    assert not (workplace / "out.json").exists()
    partial = (workplace / "out.json.partial").read_bytes()
    assert _refine(workplace, "--batch_size", "2") == 0  # with --overwrite
    assert "from the run that was stopped" not in capsys.readouterr().out
    (workplace / "out.json.partial").write_bytes(partial)
    assert _refine(workplace, "--batch_size", "1") == 0
    assert "1 responses are from the run that was stopped" in capsys.readouterr().out
    assert (workplace / "out.json").read_bytes() == whole


def test_nothing_to_refine_is_an_error(workplace, capsys):
    (workplace / "good.json").write_text(json.dumps(RECORDS[1:3]))
    assert _refine(workplace, data="good.json") == 2
    assert "good.json: nothing to refine" in capsys.readouterr().err


def test_an_existing_file_is_not_replaced_without_overwrite(workplace, capsys):
    (workplace / "there.json").write_text("[]")
    options = ["--model", "x", "--data", str(workplace / "records.json"), "--out", str(workplace / "there.json")]
    assert main(["refine", *options]) == 2
    assert "there.json: exists" in capsys.readouterr().err
