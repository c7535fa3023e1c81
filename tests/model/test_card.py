"""Model cards: metadata that the hub's own parser reads, and texts that hostile names cannot break out of."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cutlm.model import card as card_module
from cutlm.model.card import add_results, describe_base, name_model, read_facts, render_card, update_card, write_card

FACTS: dict[str, Any] = {
    "kind": "adapter",
    "base": {"name": "org/base", "hub_name": "org/base", "license": "apache-2.0"},
    "objective": "cut",
    "template": "chat",
    "settings": {"learning_rate": 1e-3, "chat_template_kwargs": {"enable_thinking": False}},
    "lora": {"r": 16, "target_modules": ["down_proj", "up_proj"]},
    "data": {"num_records": 1200, "num_satisfactory": 300, "num_unsatisfactory": 900, "sha256": "ab12"},
    "datasets": ["org/judgments"],
    "training": {"num_steps": 75, "final_loss": 0.51234},
    "sensitivity": {"flag_signal": 0.82, "pairwise": 0.95},
    "evaluation": {"loss": 1.25, "share_satisfactory": 0.904},
    "versions": {"cutlm": "0.1.0", "torch": "2.13.0"},
}
HOSTILE = [
    "a\n---\nlicense: mit\n---\n# Owned",
    '<script>alert("x")</script>',
    "a | b `c` ``d`` [e](https://evil.org) ![f](https://evil.org/f.png)",
    "[e](https://evil.org) \\| <b> \\\\| c",
    "# heading\u2028\u202e\x1b[31m\x00",
    "*" * 5000,
    "'; rm -rf ~; echo '",
    '"""\nimport os\n"""',
    "- !!python/object/apply:os.system [id]",
    "",
]


def test_the_metadata_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card("first", FACTS)).data
    assert data.library_name == "peft"
    assert data.base_model == "org/base"
    assert data.base_model_relation == "adapter"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["cutlm", "cut", "lora"]
    assert data.datasets == ["org/judgments"]
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("loss", 1.25),
        ("share_satisfactory", 0.904),
    ]
    assert data.model_name == "first"


def test_the_text_has_the_values() -> None:
    text = ModelCard(render_card("first", FACTS)).text
    assert "[org/base](https://huggingface.co/org/base)" in text
    for value in ("1,200", "900", "`ab12`", "`learning_rate: 0.001`", "0.5123", "0.82", "0.95", "1.25", "0.904"):
        assert value in text, value
    assert '`chat_template_kwargs: {"enable_thinking": false}`' in text
    assert "arxiv.org/abs/2312.14591" in text
    assert "cutlm merge --adapter first --out first-merged" in text
    assert "vllm serve first-merged" in text


def test_facts_are_read_back(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    assert read_facts(tmp_path) == FACTS
    update_card(tmp_path, evaluation={"accuracy": 0.5})
    assert read_facts(tmp_path) == FACTS | {"evaluation": {"accuracy": 0.5}}


def test_results_are_added_to_the_metadata_and_the_text_stays(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS)
    path = tmp_path / "README.md"
    path.write_text(path.read_text("utf-8") + "\n## Uses\n\nFor colours.\n", "utf-8")
    before = ModelCard.load(path)
    assert add_results(tmp_path, {"AlpacaEval": {"win_rate": 50.0}, "ROUGE": {"rouge1": 30.0, "rougeL": 20.0}})
    assert add_results(tmp_path, {"AlpacaEval": {"win_rate": 61.5}})
    after = ModelCard.load(path)
    assert after.text == before.text
    assert read_facts(tmp_path) == FACTS
    added = [("AlpacaEval", "win_rate", 61.5), ("ROUGE", "rouge1", 30.0), ("ROUGE", "rougeL", 20.0)]
    assert _list_results(after) == sorted(_list_results(before) + added)


def _list_results(card: ModelCard) -> list[tuple[str, str, float]]:
    results = card.data.eval_results or []
    return sorted((result.dataset_name, result.metric_type, result.metric_value) for result in results)


@pytest.mark.parametrize("content", [None, "# A model\n", "---\nlicense: mit\n---\n# A model\n"])
def test_results_go_to_no_card_by_others(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    if content is not None:
        path.write_text(content)
    assert not add_results(tmp_path, {"AlpacaEval": {"win_rate": 50.0}})
    assert (path.read_text() if path.exists() else None) == content


def test_what_was_not_measured_is_not_mentioned() -> None:
    facts = {name: FACTS[name] for name in ("kind", "base", "objective", "template")}
    card = ModelCard(render_card("first", facts))
    assert card.data.eval_results is None
    headings = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert headings == ["How to use it", "Training", "License"]


def test_the_license_of_the_base_is_named_as_unknown() -> None:
    card = ModelCard(render_card("first", FACTS | {"base": {"name": "org/base", "hub_name": "org/base"}}))
    assert card.data.license is None
    assert "was not known" in card.text


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"role": "judge"}, "cutlm judge --responses FILE --judge local --judge_model first"),
        ({"role": "detector"}, "cutlm blame --model first"),
        ({"objective": "hindsight"}, "cutlm generate --model first --judgment Perfect."),
        ({"kind": "merged"}, "vllm serve first --generation-config vllm"),
        ({"template": "alpaca"}, "Alpaca's"),
    ],
)
def test_how_to_use_it(facts: dict[str, Any], expected: str) -> None:
    assert expected in ModelCard(render_card("first", FACTS | facts)).text


def test_a_model_is_linked_to_the_parent_of_its_local_base() -> None:
    base = {"name": "model", "trained_from": "org/base"}
    merged = ModelCard(render_card("second", FACTS | {"kind": "merged", "base": base}))
    assert (merged.data.base_model, merged.data.base_model_relation) == ("org/base", "finetune")
    assert merged.data.library_name == "transformers"
    adapter = ModelCard(render_card("second", FACTS | {"base": base}))
    assert adapter.data.base_model is None, "the adapter does not fit the parent"
    assert "https://huggingface.co/org/base" in adapter.text


# ---- Hostile text ----


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_not_interpreted(text: str, tmp_path: Path) -> None:
    facts: dict[str, Any] = FACTS | {
        "base": {"name": text, "trained_from": text, "license": text, "license_name": text, "license_link": text},
        "objective": text,
        "template": text,
        "settings": {"output": text, text: [text]},
        "datasets": [text],
        "data": {"source": text, text: 1},
        "sensitivity": {text: 0.5},
        "evaluation": {text or "x": text or "y"},
        "iteration": {"judge": text},
        "versions": {text: text},
    }
    content = render_card(text or "x", facts)
    card = ModelCard(content)
    assert card.data.cutlm["objective"] == text
    assert card.data.license in (text, None)
    tokens = MarkdownIt().enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    links = [token.attrs["href"] for token in inline if token.type == "link_open"]
    assert not [link for link in links if "evil" in str(link)]
    assert not [token for token in inline if token.type == "image"]
    html = {token.content for token in [*tokens, *inline] if "html" in token.type}
    assert html <= {"<br>"}
    headings = [following.content for token, following in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert len(headings) == 6
    for row in re.findall(r"^\| .*$", card.text, re.MULTILINE):
        assert len(re.findall(r"(?:^|[^\\])(?:\\\\)*\|", row)) == 3
    assert not re.search(r"[\x00\x1b\u2028\u202e]", card.text)


def test_the_code_compiles_for_any_name() -> None:
    for text in HOSTILE:
        tokens = MarkdownIt().parse(ModelCard(render_card(text or "x", FACTS)).text)
        (code,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
        compile(code, "card", "exec")
        assert f"name = {json.dumps(text or 'x')}" in code


def test_numbers_that_are_not_finite_are_kept_as_text(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS | {"evaluation": {"loss": math.nan}})
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert result.metric_value == "nan"


@pytest.mark.parametrize(
    "content", ["", "no metadata", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\ncutlm: [1]\n---\n", "\ufffe"]
)
def test_a_card_by_others_has_no_facts_and_is_not_replaced(content: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(content, "utf-8")
    assert read_facts(tmp_path) == {}
    update_card(tmp_path, evaluation={"loss": 1.0})
    assert path.read_text("utf-8") == content
    assert describe_base(tmp_path)["name"] == tmp_path.name


@pytest.mark.parametrize("key", ["base", "settings", "lora", "datasets", "data", "objective", "kind", "versions"])
def test_facts_of_another_type_are_left_out(key: str, tmp_path: Path) -> None:
    facts = FACTS | {"name": "first", key: 3 if key in FACTS and isinstance(FACTS[key], str) else "text"}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'cutlm': facts | {'role': [1]}})}\n---\n")
    known = read_facts(tmp_path)
    assert known == {name: value for name, value in facts.items() if name != key}
    write_card(tmp_path, known)
    assert read_facts(tmp_path) == known


def test_a_base_that_no_hub_can_have_is_not_linked() -> None:
    name = "a/b) <img src=x> [c](https://evil.org"
    card = ModelCard(render_card("first", FACTS | {"base": {"name": "b", "hub_name": name}}))
    tokens = [child for token in MarkdownIt().parse(card.text) for child in token.children or ()]
    assert {token.content for token in tokens if "html" in token.type} == {"<br>"}
    assert not [token for token in tokens if "evil" in str(token.attrs)]


# ---- The base model ----


def test_a_model_is_named_without_its_path(tmp_path: Path) -> None:
    assert name_model(tmp_path) == tmp_path.name
    assert [name_model(name) for name in ("/gone/judge", "org/judge", "a/b/judge")] == [
        "judge",
        "org/judge",
        "a/b/judge",
    ]


def test_a_base_that_is_gone_is_named_without_its_path(tmp_path: Path) -> None:
    assert describe_base(tmp_path / "gone") == {"name": "gone"}


def test_a_local_base_has_the_license_and_the_parent_of_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\nbase_model: org/parent\n---\n# A\n")
    found = describe_base(tmp_path)
    assert found == {
        "name": tmp_path.name,
        "trained_from": "org/parent",
        "license": "other",
        "license_name": "llama2",
    }


def test_a_base_that_cutlm_made_passes_on_its_own_base(tmp_path: Path) -> None:
    write_card(tmp_path, FACTS | {"kind": "merged"})
    found = describe_base(tmp_path)
    assert (found["trained_from"], found["license"]) == ("org/base", "apache-2.0")


@pytest.mark.parametrize("value", ["license: [a, b]", "license: 3", "base_model: [org/a, org/b]", "license: null"])
def test_values_of_other_types_are_left_out(value: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{value}\n---\n")
    assert describe_base(tmp_path) == {"name": tmp_path.name}


def test_the_hub_is_asked_for_the_license(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            return huggingface_hub.ModelInfo(id=name, cardData={"license": "llama3"})

    monkeypatch.setattr(card_module, "HfApi", Api)
    assert describe_base("org/base") == {"name": "org/base", "hub_name": "org/base", "license": "llama3"}


@pytest.mark.parametrize("error", [ConnectionError("offline"), huggingface_hub.errors.OfflineModeIsEnabled("offline")])
def test_without_the_hub_the_license_is_not_known(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            raise error

    monkeypatch.setattr(card_module, "HfApi", Api)
    assert describe_base("org/base") == {"name": "org/base", "hub_name": "org/base"}
