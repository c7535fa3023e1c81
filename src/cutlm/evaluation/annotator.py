"""Compare two responses by a language model on a server, asked exactly as the package `alpaca-eval` asks.

The package's configuration of an annotator gives the prompt and the parser of answers, and the order of the two
responses is drawn as the package draws it, so the verdicts are those that it would give. Answers are cached as they
arrive.
"""

import hashlib
import json
import logging
import re
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
from cutlm.prompting.reasoning import split_reasoning
from cutlm.servers.cache import Budget, Cache
from cutlm.servers.client import Answer, Client, RequestFailed, Server, describe_commonest

DRAW = 1.5
_ADVICE = "if it is too long for the model, use another one; if it names a field, change it by --extra_body"
# What any server accepts; other configurations call functions or read log-probs.
_KNOWN: dict[str, type | UnionType] = {"model_name": str, "max_tokens": int, "temperature": int | float}
_PLACEHOLDERS = re.compile(r"\{(instruction|output_1|output_2)\}")
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
# Raised by the package's parsers for answers in an unexpected format.
_PARSER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RecursionError, SyntaxError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Pair:
    """Two responses to one instruction."""

    location: str  # of the model's response, for messages
    instruction: str
    reference: str  # the response to compare with
    output: str  # the model's response


@dataclass(frozen=True)
class Annotator:
    """How to ask for a comparison."""

    name: str
    messages: tuple[tuple[str, str], ...]  # role and text, with {instruction}, {output_1} and {output_2}
    parse: Callable[[str], float]  # reads an answer as 1 to 2; raises or returns another number if it cannot
    settings: Mapping[str, Any]  # `model_name`, `temperature` and `max_tokens`, as far as the configuration has them
    is_shuffled: bool = True  # whether the order of the responses is drawn

    def fill(self, pair: Pair) -> list[dict[str, str]]:
        """Return the messages. Texts are inserted literally: placeholders inside them are not filled in."""
        outputs = (pair.output, pair.reference) if self.is_switched(pair) else (pair.reference, pair.output)
        values = {"instruction": pair.instruction, "output_1": outputs[0], "output_2": outputs[1]}
        return [
            {"role": role, "content": _PLACEHOLDERS.sub(lambda match: values[match[1]], text)}
            for role, text in self.messages
        ]

    def is_switched(self, pair: Pair) -> bool:
        """Whether the model's response comes first."""
        utils = import_alpaca_eval("utils")
        seed = f"is_switched_outputs{pair.instruction}0"
        return self.is_shuffled and bool(utils.random_seeded_choice(seed=seed, choices=[False, True]))

    def read(self, answer: str, pair: Pair) -> float | None:
        """Return the verdict: 2 if the model's response is better, 1 if the reference is; None without a verdict.

        The package's parser does not see the thoughts before the answer, which may name either response.
        """
        split = split_reasoning(answer)
        if split.problem is not None:
            return None
        try:
            with _silence_root_logger():  # the parsers log answers that they cannot read as errors
                verdict = float(self.parse(split.output))
        except _PARSER_ERRORS:
            return None
        if not 1 <= verdict <= 2:
            return DRAW if verdict == 0 else None
        return 3 - verdict if self.is_switched(pair) else verdict


@dataclass
class Verdicts:
    """The verdicts on pairs, by their index."""

    preferences: dict[int, float] = field(default_factory=dict)  # 1 to 2; 2: the model's response is better
    unread: dict[int, str] = field(default_factory=dict)  # answers that are not verdicts
    truncated: set[int] = field(default_factory=set)  # answers that do not end, and so are no verdicts either
    failures: dict[int, str] = field(default_factory=dict)  # why there is no answer
    num_cached: int = 0  # verdicts that were in the cache
    num_requests: int = 0  # of this run
    num_tokens: int = 0  # of this run, of prompts and answers

    def describe(self) -> list[str]:
        """Return sentences on requests and failures."""
        lines = []
        if self.num_cached:
            lines.append(f"{self.num_cached} verdicts were in the cache")
        if self.num_requests:
            lines.append(f"{self.num_requests} requests, {self.num_tokens} tokens")
        if self.unread:
            example = min(self.unread.items())[1]
            lines.append(f"{len(self.unread)} answers are not verdicts, such as {example[:200]!r}")
        if self.truncated:
            advice = """set a larger one by --annotator_extra_body '{"max_tokens": 4096}'"""
            what = "answers were truncated at the maximum number of tokens and are not verdicts"
            lines.append(f"{len(self.truncated)} {what}; {advice}")
        if self.failures:
            lines.append(f"{len(self.failures)} pairs have no answer, {describe_commonest(self.failures.values())}")
        return lines


@contextmanager
def _silence_root_logger() -> Iterator[None]:
    def reject(record: logging.LogRecord) -> bool:
        return False

    logging.root.addFilter(reject)
    try:
        yield
    finally:
        logging.root.removeFilter(reject)


def load_annotator(name: str) -> Annotator:
    """Read the configuration of an annotator; UserError if it asks in a way that cutlm does not support.

    The name is that of one that comes with `alpaca-eval`, or of a folder with a `configs.yaml` of the same format.
    """
    base = Path(import_alpaca_eval("constants").EVALUATORS_CONFIG_DIR)
    folder = Path(name) if (Path(name) / "configs.yaml").is_file() else base / name
    config = _read_config(name, folder / "configs.yaml")
    settings = config.get("completions_kwargs") or {}
    is_known = config.get("fn_completions") == "openai_completions" and config.get("batch_size", 1) == 1
    is_known &= set(settings) <= set(_KNOWN) and not {"completion_key", "processors_to_kwargs"} & set(config)
    if not is_known:
        raise UserError(
            f"--annotator {name}: expected one that asks an OpenAI-compatible server for text, got another kind; use"
            " one such as alpaca_eval_gpt4, or run alpaca-eval itself and pass its verdicts by --annotations"
        )
    for key, kind in _KNOWN.items():
        if not isinstance(settings.get(key), kind | None):
            raise UserError(
                f"--annotator {name}: completions_kwargs: field {key!r}: expected"
                f" {'text' if kind is str else 'a number'}, got {settings[key]!r}; fix {folder / 'configs.yaml'}"
            )
    parsers = import_alpaca_eval("completion_parsers")
    parser = config.get("fn_completion_parser") or "regex_parser"
    parse = getattr(parsers, str(parser), None)
    if not callable(parse):
        raise UserError(f"--annotator {name}: alpaca-eval has no completion parser {parser!r}; fix its name")
    text = _read_template(name, config.get("prompt_template"), (folder.parent, folder, base))
    options = config.get("completion_parser_kwargs") or {}

    def parse_one(answer: str) -> float:
        (verdict,) = parse(answer, **options)
        return float(verdict)

    messages = tuple((role, content.strip()) for role, content in _MESSAGE.findall(text)) or (("user", text.strip()),)
    return Annotator(Path(name).name, messages, parse_one, settings, config.get("is_randomize_output_order", True))


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
        raise UserError(f"--annotator {name}: {file} cannot be read as YAML in UTF-8 ({reason}); fix it") from None
    found = list(configs.values()) if isinstance(configs, dict) else []
    mappings = ("completions_kwargs", "completion_parser_kwargs")
    if len(found) != 1 or not isinstance(found[0], dict):
        problem = "one name with the settings of an annotator below it"
    elif wrong := [key for key in mappings if not isinstance(found[0].get(key) or {}, dict)]:
        problem = f"settings below {' and '.join(wrong)}"
    else:
        return found[0]
    raise UserError(
        f"--annotator {name}: {file}: expected {problem}, got something else; see the configurations of alpaca-eval"
    )


def _read_template(name: str, file: Any, folders: Sequence[Path]) -> str:
    """The text of the prompt, which must have every placeholder."""
    if not isinstance(file, str):
        raise UserError(f"--annotator {name}: field 'prompt_template': expected a file name, got {file!r}; add it")
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        raise UserError(f"--annotator {name}: no file {file} (prompt_template); put it next to its configs.yaml")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--annotator {name}: {path} cannot be read as UTF-8 text ({error}); fix it") from None
    if missing := sorted({"instruction", "output_1", "output_2"} - set(_PLACEHOLDERS.findall(text))):
        names = ", ".join(f"{{{placeholder}}}" for placeholder in missing)
        raise UserError(f"--annotator {name}: {path}: expected the placeholders {names}, got none; add them")
    return text


def ask_verdicts(pairs: Sequence[Pair], annotator: Annotator, server: Server, cache_file: str | Path) -> Verdicts:
    """Ask which response of each pair is better; equal responses are a draw without a request.

    Answers are cached, except those that are truncated or not verdicts, which are requested again. If the server
    refuses every request, it raises UserError.
    """
    verdicts = Verdicts({index: DRAW for index, pair in enumerate(pairs) if pair.output == pair.reference})
    bodies = {
        index: make_body(server, annotator, annotator.fill(pair))
        for index, pair in enumerate(pairs)
        if index not in verdicts.preferences
    }
    texts = {index: json.dumps([server.url, body], sort_keys=True) for index, body in bodies.items()}
    keys = {index: hashlib.sha256(text.encode()).hexdigest() for index, text in texts.items()}
    with Cache(cache_file) as cache:
        cached = cache.get_many(set(keys.values()))
        for index, key in keys.items():
            if key in cached and (verdict := annotator.read(cached[key] or "", pairs[index])) is not None:
                verdicts.preferences[index] = verdict
                verdicts.num_cached += 1
        missing = [index for index in keys if index not in verdicts.preferences]
        if not missing:
            return verdicts
        budget = Budget(cache, server.max_requests, server.max_tokens_total)
        client = Client(server, budget)

        def ask(number: int) -> Answer:
            return client.complete(bodies[missing[number]])

        locations = [pairs[index].location for index in missing]
        with tqdm(total=len(missing), desc="comparing", unit="pair") as progress:
            for number, result in client.request_many(ask, locations, advice=_ADVICE, is_answering=bool(cached)):
                index = missing[number]
                progress.update()
                if isinstance(result, RequestFailed):
                    verdicts.failures[index] = str(result)
                elif result.is_truncated:
                    verdicts.truncated.add(index)
                elif (verdict := annotator.read(result.text or "", pairs[index])) is None:
                    verdicts.unread[index] = result.text or ""
                else:
                    cache.put(keys[index], result.text)
                    verdicts.preferences[index] = verdict
    verdicts.num_requests, verdicts.num_tokens = budget.num_requests, budget.num_tokens
    return verdicts


def make_body(server: Server, annotator: Annotator, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the body of a request, with the sampling settings of the annotator's configuration."""
    known = {"temperature": 0.0, "max_tokens": 1024} | dict(annotator.settings)
    return server.make_body(messages, temperature=known["temperature"], max_tokens=known["max_tokens"])
