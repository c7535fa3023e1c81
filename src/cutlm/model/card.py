"""Model cards: the README.md of a saved adapter or model, in the format of the hub.

The facts of a card are a mapping, which is `cutlm` in its metadata; its text is rendered from them. So `cutlm merge`
and the online loop make the card of a model from the one next to its adapter. Its keys, each of which may be absent:

    name        the name of the model, if it is not that of its folder
    kind        "adapter", "model" (all weights were trained) or "merged"
    role        what it does if it does not answer instructions: "judge" or "detector"
    base        `name`, `hub_name`, `trained_from` (if it is local), `license`, `license_name`, `license_link`
    objective, template, settings (those that differ from their defaults), lora
    data        numbers of records, and `sha256`; datasets (names on the hub)
    training, sensitivity, evaluation, iteration (of the online loop), merge, versions: names and values

Text of others, such as the name of a folder, is shown as code or with its control characters escaped.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError

from cutlm.data.files import write_text

CARD_FILE = "README.md"
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_TIMEOUT = 5.0  # seconds
_MAX_SHOWN = 300  # characters of one value
_OBJECTIVES = {
    "cut": "Contrastive Unlikelihood Training ([arXiv 2312.14591](https://arxiv.org/abs/2312.14591)): tokens that a"
    " judgment objects to become less likely, all others more likely",
    "dual_cut": "DualCUT ([arXiv 2412.20297](https://arxiv.org/abs/2412.20297)): CUT, and tokens that praise makes more"
    " likely are learned with a larger weight",
    "self_distillation": "self-distillation ([arXiv 2601.20802](https://arxiv.org/abs/2601.20802)): the model with a"
    " description of a better response in its prompt teaches the model without one",
    "redirect": "CUT, with the probability of flagged tokens moved to where a teacher puts it",
    "likelihood": "maximum likelihood of responses",
    "hindsight": "likelihood of responses given their judgments (hindsight)",
    "forward_prediction": "likelihood of responses and then their judgments (forward prediction)",
    "ilf_mle": "likelihood of responses that were improved by their judgments (ILF)",
    "unlikelihood": "likelihood of satisfactory responses and unlikelihood of all others",
    "dpo": "DPO on pairs of a satisfactory and an unsatisfactory response",
    "ilf_dpo": "DPO on pairs of a refined response and the judged one",
}
_EVALUATIONS = {
    "share_satisfactory": "held-out instructions, share of satisfactory responses",
    "loss": "held-out judged records, loss",
}

Facts = dict[str, Any]
# The type of each fact that is not text.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("base", "settings", "lora", "data", "training", "sensitivity", "evaluation"), dict),
    **dict.fromkeys(("iteration", "merge", "versions"), dict),
    "datasets": list,
}


def write_card(folder: str | Path, facts: Mapping[str, Any], name: str | None = None) -> None:
    """Write the card of the model in a folder.

    Args:
        folder: The folder.
        facts: The facts.
        name: The name of the model, unless the facts have one; None for that of the folder.
    """
    name = facts.get("name") or name or Path(folder).resolve().name
    write_text(Path(folder) / CARD_FILE, render_card(name, facts))


def read_facts(folder: str | Path) -> Facts:
    """Read the facts of the card in a folder, without those of another type; empty if it is not by cutlm."""
    card = _load_card(Path(folder) / CARD_FILE)
    facts = getattr(card.data, "cutlm", None) if card is not None else None
    if not isinstance(facts, dict):
        return {}
    return {key: value for key, value in _clean(facts).items() if isinstance(value, _TYPES.get(key, str))}


def update_card(folder: str | Path, **facts: Any) -> None:
    """Add facts to the card of the model in a folder, if it has one by cutlm."""
    if known := read_facts(folder):
        write_card(folder, known | facts)


def add_results(folder: str | Path, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Add results of evaluations to the metadata of the card in a folder, from which the hub shows them.

    Earlier results of the same name are replaced; the text of the card stays, as people may have changed it.

    Args:
        folder: The folder of a model.
        results: The values of metrics by the name of the evaluation.

    Returns:
        Whether the folder has a card by cutlm.

    Example:

        >>> add_results("runs/first", {"alpaca_eval": {"win_rate": 61.1}})
        True
    """
    path = Path(folder) / CARD_FILE
    card = _load_card(path) if read_facts(folder) else None
    if card is None:
        return False
    data: Any = card.data
    kept = [result for result in data.eval_results or [] if result.dataset_name not in results]
    data.eval_results = kept + [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for name, values in results.items()
        for metric, value in values.items()
    ]
    data.model_name = data.model_name or Path(folder).resolve().name
    write_text(path, str(card))
    return True


def _load_card(path: Path) -> ModelCard | None:
    if not path.is_file():
        return None
    try:
        return ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # not text, not YAML, or not metadata of a model
        return None


def name_model(name: str | Path) -> str:
    """Return the name of a model for a card: that of a folder is without its path."""
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else str(name)


def describe_base(name: str | Path) -> Facts:
    """Describe the origin and the license of a base model, as far as they are known.

    The card of a model on the hub is asked for once, without a retry; offline, its license is not known.
    """
    path = Path(name)
    if not str(name):
        return {"name": "unknown"}  # a model that was made in memory
    if path.exists():
        card = _load_card(path / CARD_FILE) if path.is_dir() else None
        facts: Facts = {"name": name_model(path)}
        own = read_facts(path).get("base") or {} if card is not None else {}
        parent = own.get("hub_name") or own.get("trained_from") or getattr(card and card.data, "base_model", None)
        if isinstance(parent, str) and _HUB_NAME.fullmatch(parent):
            facts["trained_from"] = parent
        return facts | _list_license(card.data if card is not None else None)
    if not _HUB_NAME.fullmatch(str(name)):
        return {"name": name_model(name)}
    try:
        data = HfApi().model_info(str(name), timeout=_HUB_TIMEOUT).card_data
    except (OSError, HTTPError, HFValidationError):  # no network, offline mode, or no such model
        data = None
    return {"name": str(name), "hub_name": str(name)} | _list_license(data)


def _list_license(data: Any) -> Facts:
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _clean(value: Any) -> Any:
    """Copy a value as one of plain YAML; numbers that are not finite become text."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_clean(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# ---- Rendering ----


def render_card(name: str, facts: Mapping[str, Any]) -> str:
    """Render the card of a model: metadata, and a text about its use, its training and its measurements."""
    facts = {key: value for key, value in _clean(facts).items() if value not in (None, {}, [])}
    sections = [
        f"# {_escape(name)}\n\n{_introduce(facts)}",
        f"## How to use it\n\n{_explain_use(name, facts)}",
        _describe_training(facts),
        _describe_sensitivity(facts.get("sensitivity") or {}),
        _describe_evaluation(facts.get("evaluation") or {}),
        f"## License\n\n{_describe_license(facts.get('base') or {})}",
    ]
    text = "\n\n".join(section for section in sections if section)
    return f"---\n{make_metadata(name, facts).to_yaml()}\n---\n\n{text}\n"


def make_metadata(name: str, facts: Mapping[str, Any]) -> ModelCardData:
    """Make the metadata of a card, by which the hub finds, filters and links models."""
    base = facts.get("base") or {}
    is_adapter = facts.get("kind") == "adapter"
    # An adapter belongs to its very base; a model that was trained from a local one comes from the parent of that.
    base_model = base.get("hub_name") or (None if is_adapter else base.get("trained_from"))
    evaluation = [
        EvalResult(
            task_type="text-generation",
            dataset_type="judged-responses",
            dataset_name="held-out",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in (facts.get("evaluation") or {}).items()
    ]
    tags = ["cutlm", facts.get("objective"), "lora" if facts.get("lora") else None, facts.get("role")]
    others: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"} if base_model else {}
    return ModelCardData(
        base_model=base_model,
        datasets=facts.get("datasets") or None,
        eval_results=evaluation or None,
        model_name=name if evaluation else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in tags if tag],
        **{key: base[key] for key in ("license", "license_name", "license_link") if key in base},
        **others,
        cutlm=_clean(facts),  # a copy, because YAML would refer to lists that occur twice
    )


def _introduce(facts: Mapping[str, Any]) -> str:
    base = facts.get("base") or {}
    name = _name_base(base)
    kind = {
        "adapter": f"A LoRA adapter of {name}",
        "merged": f"{name} with a LoRA adapter merged into it",
    }.get(str(facts.get("kind")), f"A fine-tuned version of {name}")
    kind = kind[0].upper() + kind[1:]
    role = {
        "judge": "It judges responses: it writes what is wrong with one, and whether it is satisfactory.",
        "detector": "It reads judgments, for `cutlm blame` to flag the tokens that they object to.",
    }.get(str(facts.get("role")), "It was trained on judgments: written critiques of responses.")
    if "objective" not in facts:  # an adapter that another program has trained
        return f"{kind} by cutlm."
    version = (facts.get("versions") or {}).get("cutlm")
    return f"{kind}, trained by cutlm{f' {_escape(version)}' if version else ''}. {role}"


def _name_base(base: Mapping[str, Any]) -> str:
    if hub_name := base.get("hub_name"):
        return _link_model(hub_name)
    parent = base.get("trained_from")
    origin = f", which was made from {_link_model(parent)}" if parent else ""
    return f"the model {_as_code(base.get('name') or 'unknown')}{origin}"


def _link_model(name: str) -> str:
    """Link a model of the hub; a name that none can have, from a card by others, is shown as code."""
    return f"[{_escape(name)}](https://huggingface.co/{name})" if _HUB_NAME.fullmatch(str(name)) else _as_code(name)


def _explain_use(name: str, facts: Mapping[str, Any]) -> str:
    shell_name = shlex.quote(_shorten(name))
    if facts.get("role") == "judge":
        return _block("bash", f"cutlm judge --responses FILE --judge local --judge_model {shell_name} --out FILE")
    if facts.get("role") == "detector":
        contrast = "--contrast perfect "
        return _block("bash", f"cutlm blame --model {shell_name} --data FILE {contrast}--out FILE")
    parts = [_explain_prompt(facts)]
    if facts.get("objective") == "hindsight":
        command = f"cutlm generate --model {shell_name} --judgment Perfect. --prompts FILE --out FILE"
        return "\n\n".join([*parts, _block("bash", command)])
    is_adapter = facts.get("kind") == "adapter"
    loading = 'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")'
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if is_adapter:
        imports = f"from peft import PeftConfig, PeftModel\n{imports}"
        loading = (
            "base = PeftConfig.from_pretrained(name).base_model_name_or_path\n"
            'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")\n'
            "model = PeftModel.from_pretrained(model, name)"
        )
    parts.append(
        _block(
            "python",
            f"""{imports}

name = {json.dumps(name)}  # this folder, or its name on the hub
{loading}
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "Name the capital of Australia."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
outputs = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
        )
    )
    if is_adapter:
        merged = shlex.quote(f"{_shorten(name)}-merged")
        parts.append(
            "To serve it with vLLM, or to use it without PEFT, merge it:\n\n"
            + _block(
                "bash",
                f"cutlm merge --adapter {shell_name} --out {merged}\nvllm serve {merged} --generation-config vllm",
            )
        )
    else:
        parts.append("With vLLM:\n\n" + _block("bash", f"vllm serve {shell_name} --generation-config vllm"))
    return "\n\n".join(part for part in parts if part)


def _explain_prompt(facts: Mapping[str, Any]) -> str:
    prompt = {
        "alpaca": "The chat template of the tokenizer makes the prompt of training (Alpaca's), which has one turn: pass"
        " the instruction as one message by the user.",
        "chat": "The prompt of training is the chat template of the tokenizer.",
    }.get(str(facts.get("template")), "")
    if not prompt and "objective" in facts:
        prompt = "It was trained on token ids: prompt it as these were made."
    if facts.get("objective") == "hindsight":
        prompt += ' It answers according to a judgment in its prompt: ask for a response that deserves "Perfect.".'
    return prompt


def _describe_training(facts: Mapping[str, Any]) -> str:
    rows: dict[str, str] = {}
    if objective := facts.get("objective"):
        rows["objective"] = _OBJECTIVES.get(objective, _as_code(objective))
    data = facts.get("data") or {}
    for key, value in data.items():
        rows[_title(key)] = _as_code(value) if isinstance(value, str) else _show(value)
    if names := facts.get("datasets"):
        rows["datasets"] = ", ".join(_as_code(name) for name in names)
    for key, value in (facts.get("training") or {}).items():
        rows[_title(key)] = _show(value)
    for group in ("iteration", "merge"):
        for key, value in (facts.get(group) or {}).items():
            rows[_title(key)] = _as_code(value) if isinstance(value, str) else _show(value)
    if settings := facts.get("settings"):
        rows["settings that differ from the defaults"] = _list_settings(settings)
    if lora := facts.get("lora"):
        rows["LoRA"] = _list_settings(lora)
    if versions := facts.get("versions"):
        rows["versions"] = _escape(", ".join(f"{key} {value}" for key, value in versions.items()))
    return f"## Training\n\n{_table(rows)}" if rows else ""


def _describe_sensitivity(sensitivity: Mapping[str, Any]) -> str:
    if not sensitivity:
        return ""
    text = (
        "How far the flags of the model before training depended on the content of the judgments. `flag_signal` is 1 if"
        " only a response's own judgment flags its tokens and 0 if any judgment does; below 0.3 flags are mostly noise."
        " `pairwise` is the share of records whose largest log ratio is larger under their own judgment."
    )
    return f"## Sensitivity\n\n{text}\n\n" + _table({_as_code(key): _show(item) for key, item in sensitivity.items()})


def _describe_evaluation(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    return "## Evaluation\n\n" + _table(
        {_EVALUATIONS.get(key, _as_code(key)): _show(value) for key, value in evaluation.items()}
    )


def _describe_license(base: Mapping[str, Any]) -> str:
    if license_id := base.get("license"):
        name = f" ({_escape(base['license_name'])})" if "license_name" in base else ""
        link = f" at {_as_code(base['license_link'])}" if "license_link" in base else ""
        return f"That of the base model: {_as_code(license_id)}{name}{link}."
    return f"That of the base model, {_name_base(base)}; it was not known when this card was written."


# ---- Text ----


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _list_settings(settings: Mapping[str, Any]) -> str:
    return "<br>".join(_as_code(f"{key}: {_show_plain(value)}") for key, value in settings.items())


def _title(key: str) -> str:
    words = key.removeprefix("num_").replace("_", " ")
    return {"sha256": "SHA-256 of the data"}.get(key, _escape(words))


def _show(value: Any) -> str:
    return _escape(_show_plain(value))


def _show_plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shorten(text: object) -> str:
    """Put a text on one line of limited length, with control characters escaped."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def _escape(text: object) -> str:
    """Escape text so that Markdown shows it as it is, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&$])", r"\\\1", _shorten(text))


def _as_code(text: object) -> str:
    """Show text as code; a vertical bar would end the cell of a table, also behind an escaped backslash."""
    line = re.sub(r"(\\*)\|", r"\1\1\|", _shorten(text))
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if len(ticks) > 1 or not line.strip() else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _block(language: str, code: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"
