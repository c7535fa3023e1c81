"""Which of two responses is better, by a language model on a server, asked as the package `alpaca-eval` asks.

The package's configuration of an annotator says what is asked and how an answer is read; which response comes first is
drawn as it draws it, so that the verdicts are those that it would have had. Asking is `cutlm.servers.requests`'s
affair: several questions at a time, tried again where that may help. Answers go to a cache as they come, and are paid
for once.
"""

import hashlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from tqdm import tqdm

from cutlm.errors import UserError
from cutlm.evaluation.shared import import_alpaca_eval
from cutlm.servers.budget import Spending
from cutlm.servers.cache import Cache
from cutlm.servers.chat import Answer, ChatServer, OptionNames, ask, explain_refusal, make_client
from cutlm.servers.http import Refused, read_key
from cutlm.servers.requests import ask_all

OPENAI = "https://api.openai.com/v1"
OPTIONS = OptionNames(
    "--base_url", "--annotator_model", "--annotator_extra_body", "name another model by --annotator_model"
)
DRAW = 1.5
# What can be sent to any server; others ask for functions to be called, or for log-probs.
_KNOWN: dict[str, type | UnionType] = {"model_name": str, "max_tokens": int, "temperature": int | float}
_PLACES = re.compile(r"\{(instruction|output_1|output_2)\}")
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """Two responses to one instruction.

    Attributes:
        place: Where the model's response stands, for messages.
        instruction: What was asked.
        reference: The one that it is compared with.
        output: The model's.
    """

    location: str
    instruction: str
    reference: str
    output: str


@dataclass(frozen=True)
class Annotator:
    """How an annotator is asked.

    Attributes:
        name: Of its configuration.
        messages: Role and text of each, with {instruction}, {output_1} and {output_2}.
        parse: Reads an answer: 1 or 2, or what lies between them; fails, or gives no number, where it is no verdict.
        settings: Model, temperature and the longest answer, by the names that `alpaca-eval` gives them.
        is_shuffled: Whether which response comes first is drawn.
    """

    name: str
    messages: tuple[tuple[str, str], ...]
    parse: Callable[[str], float]
    settings: Mapping[str, Any]
    is_shuffled: bool = True

    def fill(self, pair: Pair) -> list[dict[str, str]]:
        """The question. The texts are inserted literally: placeholders inside them are not filled."""
        outputs = (pair.output, pair.reference) if self.is_switched(pair) else (pair.reference, pair.output)
        values = {"instruction": pair.instruction, "output_1": outputs[0], "output_2": outputs[1]}
        return [
            {"role": role, "content": _PLACES.sub(lambda found: values[found[1]], text)} for role, text in self.messages
        ]

    def is_switched(self, pair: Pair) -> bool:
        """Whether the model's response comes first."""
        utils = import_alpaca_eval("utils")
        seed = f"is_switched_outputs{pair.instruction}0"
        return self.is_shuffled and bool(utils.random_seeded_choice(seed=seed, choices=[False, True]))

    def read(self, answer: str, pair: Pair) -> float | None:
        """The verdict: 2 where the model's response is better, 1 where the reference is; None where there is none."""
        try:
            with _quietly():  # it logs what it cannot read as something to be mended by hand
                verdict = float(self.parse(answer))
        except Exception:
            return None
        if not 1 <= verdict <= 2:
            return DRAW if verdict == 0 else None
        return 3 - verdict if self.is_switched(pair) else verdict


@dataclass
class Verdicts:
    """What became of pairs, by their index.

    Attributes:
        preferences: 1 to 2, where 2 means that the model's response is better.
        unread: Answers that are no verdict.
        failures: Why there is no answer.
        num_cached: Verdicts that were paid for before.
        num_requests: Made now.
        num_tokens: Of questions and answers made now.
    """

    preferences: dict[int, float] = field(default_factory=dict)
    unread: dict[int, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    num_cached: int = 0
    num_requests: int = 0
    num_tokens: int = 0


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def load_annotator(name: str) -> Annotator:
    """Reads an annotator's configuration.

    Args:
        name: Of one that comes with `alpaca-eval`, or a folder with a `configs.yaml` of the same kind.

    Raises:
        UserError: There is none, or it cannot be used, or it asks in a way that is not known here.
    """
    base = Path(import_alpaca_eval("constants").EVALUATORS_CONFIG_DIR)
    folder = Path(name) if (Path(name) / "configs.yaml").is_file() else base / name
    config = _read_config(name, folder / "configs.yaml")
    settings = config.get("completions_kwargs") or {}
    is_known = config.get("fn_completions") == "openai_completions" and config.get("batch_size", 1) == 1
    is_known &= set(settings) <= set(_KNOWN) and not {"completion_key", "processors_to_kwargs"} & set(config)
    if not is_known:
        raise UserError(
            f"--annotator {name}: it asks for more than text, or by another service, and cutlm cannot; ask another one,"
            " such as alpaca_eval_gpt4, or have alpaca-eval itself ask and give its verdicts by --annotations"
        )
    for key, kind in _KNOWN.items():
        if not isinstance(settings.get(key), kind | None):
            raise UserError(
                f"--annotator {name}: completions_kwargs: field {key!r}: expected"
                f" {'text' if kind is str else 'a number'}, got {settings[key]!r}; mend {folder / 'configs.yaml'}"
            )
    parsers = import_alpaca_eval("completion_parsers")
    parser = config.get("fn_completion_parser") or "regex_parser"
    parse = getattr(parsers, str(parser), None)
    if not callable(parse):
        raise UserError(f"--annotator {name}: alpaca-eval has no parser of answers {parser!r}; check its name")
    text = _read_template(name, config.get("prompt_template"), (folder.parent, folder, base))
    options = config.get("completion_parser_kwargs") or {}
    return Annotator(
        Path(name).name,
        tuple((role, content.strip()) for role, content in _MESSAGE.findall(text)) or (("user", text.strip()),),
        lambda answer: _take_one(parse(answer, **options)),
        settings,
        config.get("is_randomize_output_order", True),
    )


def _read_config(name: str, file: Path) -> dict[str, Any]:
    """The one configuration in a file."""
    try:
        configs = yaml.safe_load(file.read_text("utf-8"))
    except OSError:
        raise UserError(
            f"--annotator {name}: expected an annotator of alpaca-eval such as alpaca_eval_gpt4, or a folder with its"
            " configs.yaml, got none; check the name"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--annotator {name}: {file} is no YAML in UTF-8 ({reason}); mend it") from None
    found = list(configs.values()) if isinstance(configs, dict) else []
    mappings = ("completions_kwargs", "completion_parser_kwargs")
    if len(found) != 1 or not isinstance(found[0], dict):
        problem = "one name with the settings of an annotator below it, got something else"
    elif wrong := [key for key in mappings if not isinstance(found[0].get(key) or {}, dict)]:
        problem = f"settings below {' and '.join(wrong)}, got something else"
    else:
        return found[0]
    raise UserError(f"--annotator {name}: {file}: expected {problem}; see the configurations of alpaca-eval")


def _read_template(name: str, file: Any, folders: Sequence[Path]) -> str:
    """The text of the question, which must have a place for each of what is compared."""
    if not isinstance(file, str):
        raise UserError(f"--annotator {name}: field 'prompt_template': expected a file's name, got {file!r}; add it")
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        raise UserError(f"--annotator {name}: no file {file} (prompt_template); put it beside its configs.yaml")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--annotator {name}: {path} cannot be read as UTF-8 text ({error}); mend it") from None
    missing = sorted({"instruction", "output_1", "output_2"} - set(_PLACES.findall(text)))
    if missing:
        locations = ", ".join(f"{{{place}}}" for place in missing)
        raise UserError(f"--annotator {name}: {path}: expected a place for {locations}, got none; add it")
    return text


def _take_one(verdicts: Sequence[Any]) -> float:
    (verdict,) = verdicts
    return float(verdict)


def ask_verdicts(
    pairs: Sequence[Pair],
    annotator: Annotator,
    server: ChatServer,
    cache_file: str | Path,
    *,
    show_progress: bool = True,
) -> Verdicts:
    """Asks which response of each pair is better; of two that are equal word for word, none is.

    Args:
        pairs: What to compare.
        annotator: What to ask.
        server: Whom to ask.
        cache_file: Where answers are kept that are verdicts; others are asked for again the next time.
        show_progress: Whether to show a progress bar.

    Raises:
        UserError: The server refuses what it is asked. What was said before is in the cache.
    """
    key = read_key()
    verdicts = Verdicts({index: DRAW for index, pair in enumerate(pairs) if pair.output == pair.reference})
    questions = {index: annotator.fill(pair) for index, pair in enumerate(pairs) if index not in verdicts.preferences}
    keys = {index: _make_key(server, question) for index, question in questions.items()}
    with Cache(cache_file) as cache:
        found = cache.find(set(keys.values()))
        for index, name in keys.items():
            if name in found and (verdict := annotator.read(found[name] or "", pairs[index])) is not None:
                verdicts.preferences[index] = verdict
                verdicts.num_cached += 1
        missing = [index for index in keys if index not in verdicts.preferences]
        if not missing:
            return verdicts
        spending = Spending(server.max_requests, server.max_tokens_total, cache, prefix="--annotator_")
        client = make_client(server, key)

        def ask_one(place: int, stop: threading.Event) -> Answer:
            return ask(client, server, questions[missing[place]], key=key, spending=spending, stop=stop)

        with tqdm(total=len(missing), desc="comparing", unit="pair", disable=not show_progress) as progress:
            for place, result in ask_all(len(missing), ask_one, server.concurrency, is_answering=bool(found)):
                index = missing[place]
                if isinstance(result, Refused):
                    raise UserError(explain_refusal(server, result, pairs[index].location, OPTIONS))
                if isinstance(result, UserError):
                    raise result
                progress.update()
                if isinstance(result, BaseException):
                    verdicts.failures[index] = str(result)
                    continue
                verdict = annotator.read(result.text or "", pairs[index])
                if verdict is None:
                    verdicts.unread[index] = result.text or ""
                else:
                    cache.keep(keys[index], result.text)
                    verdicts.preferences[index] = verdict
    verdicts.num_requests, verdicts.num_tokens = spending.num_requests, spending.num_tokens
    return verdicts


def _make_key(server: ChatServer, question: Sequence[Mapping[str, str]]) -> str:
    return hashlib.sha256(json.dumps([server.url, server.make_request(question)], sort_keys=True).encode()).hexdigest()


def describe_verdicts(verdicts: Verdicts) -> list[str]:
    """Sentences on what was asked and what was not to be had."""
    lines = []
    if verdicts.num_cached:
        lines.append(f"{verdicts.num_cached} verdicts were there from before")
    if verdicts.num_requests:
        lines.append(f"{verdicts.num_requests} requests, {verdicts.num_tokens} tokens")
    if verdicts.unread:
        example = min(verdicts.unread.items())[1]
        lines.append(f"{len(verdicts.unread)} answers are no verdict, such as {example[:200]!r}")
    for reason, count in Counter(verdicts.failures.values()).most_common():
        lines.append(f"{count} pairs without an answer: {reason}")
    return lines
