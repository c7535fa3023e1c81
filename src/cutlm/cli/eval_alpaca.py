"""Measure how often a model's responses are preferred to a reference's: AlpacaEval, next to the paper's rows.

  cutlm eval alpaca --model MODEL --out DIR
  cutlm eval alpaca --outputs responses.json --reference other.json --base_url URL --annotator_model NAME --out DIR
  cutlm eval alpaca --annotations annotations.json --out DIR

The model is a local one; for responses from a server, run cutlm generate and pass them by --outputs. It answers the 805
instructions of the hub's tatsu-lab/alpaca_eval, or a file of the same format, whose outputs are the reference unless
--reference names another one. The annotator at --base_url is asked which response is better exactly as the package
alpaca-eval asks it: by default GPT-4 by OpenAI's API, or any OpenAI-compatible server. Its key is read from the
environment variable OPENAI_API_KEY. Answers are cached as they arrive: a run that was stopped asks only for the missing
ones. Pairs without a verdict are left out and counted.

With --annotations the verdicts are read from a file, and so are the responses unless --outputs and --reference are set;
no annotator is asked."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.generate import ANSWERING_OPTIONS, LOCAL_OPTIONS, add_answering_arguments
from cutlm.cli.model_options import SOURCES, add_options, make_server
from cutlm.data.files import write_rows
from cutlm.data.sources import describe_sources
from cutlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cutlm.evaluation.annotator import Pair
    from cutlm.judges import Response
    from cutlm.servers.client import Server

_OPENAI = "https://api.openai.com/v1"
_ANNOTATIONS = "annotations.json"
_PROMPTS = "alpaca_eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="generate responses by this model: a folder, or a hub name")
    prompts = f"the instructions (default: alpaca_eval): {SOURCES}"
    parser.add_argument("--prompts", nargs="+", default=[_PROMPTS], metavar="FILE", help=prompts)
    outputs = "the model's responses, as cutlm generate writes them"
    parser.add_argument("--outputs", nargs="+", metavar="FILE", help=outputs)
    reference = "responses to compare with (default: those in --prompts)"
    parser.add_argument("--reference", nargs="+", metavar="FILE", help=reference)
    add_options(parser, "columns")
    annotator = "a configuration of alpaca-eval, or a folder with one (default: alpaca_eval_gpt4)"
    parser.add_argument("--annotator", default="alpaca_eval_gpt4", metavar="NAME", help=annotator)
    parser.add_argument("--annotations", metavar="FILE", help="verdicts of an earlier annotation; no requests")
    server = parser.add_argument_group("the annotator's server")
    server.add_argument("--base_url", metavar="URL", help=f"default: {_OPENAI}")
    server.add_argument("--annotator_model", metavar="NAME", help="default: the one that the configuration names")
    body = """further fields of every request; null removes one: '{"max_tokens": 2000, "temperature": null}'"""
    names = ("--extra_body", "--annotator_extra_body")
    server.add_argument(*names, dest="annotator_extra_body", default="{}", metavar="JSON", help=body)
    concurrency = "requests at a time (default: 8)"
    server.add_argument("--annotator_concurrency", type=int, default=8, metavar="N", help=concurrency)
    limit = "most requests of all runs (default: no limit)"
    server.add_argument("--annotator_max_requests", type=int, metavar="N", help=limit)
    add_options(server, "requests_per_minute", "tokens_per_minute")
    add_answering_arguments(parser, LOCAL_OPTIONS)


def run(args: argparse.Namespace) -> int:
    from cutlm.evaluation.alpaca_eval import PACKAGES, draw_win_rate, measure_win_rate, tabulate_win_rate
    from cutlm.evaluation.shared import add_to_card, import_alpaca_eval, write_result

    _check_options(args)
    import_alpaca_eval("metrics")
    compared = _replay(args) if args.annotations is not None else _annotate(args)
    if compared is None:
        return 1
    folder, responses, references, preferences, about = compared
    names = _name_generators(responses), _name_generators(references)
    result = measure_win_rate(preferences, [response.output for response in responses])
    result |= {"reference": names[1]} | about
    table, picture = tabulate_win_rate(result, *names), draw_win_rate(result, *names)
    write_result(folder, result, table, PACKAGES, picture=picture)
    add_to_card(args.model, {"AlpacaEval": {"win_rate": result["win_rate"]}})
    return 0


# Folder, the model's responses, the reference's, a verdict of each pair or None, and further figures.
_Compared = tuple[Path, "list[Response]", "list[Response]", list[float | None], dict[str, Any]]


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is loaded or paid for."""
    from cutlm.cli.reuse import check_source, list_given
    from cutlm.servers.client import KEY_VARIABLE, read_key

    if args.annotations is not None:
        if own := list_given(args, add_arguments, ("annotations", "annotator", "outputs", "reference")):
            raise ConfigError(f"{', '.join(own)}: expected only without --annotations; leave out one or the other")
        return
    problems = []
    if args.prompts != [_PROMPTS] and args.outputs is not None and args.reference is not None:
        problems.append("--prompts: not used with both --outputs and --reference; leave it out")
    if args.base_url is None and read_key() is None:
        problems.append(f"{KEY_VARIABLE}: expected a key for {_OPENAI}, got none; set it, or pass --base_url")
    check_source(_select_answering(args), problems)


def _select_answering(args: argparse.Namespace) -> argparse.Namespace:
    """The options of answering, which a local model does: --base_url is the annotator's server."""
    return argparse.Namespace(**vars(args) | dict.fromkeys(("base_url", *ANSWERING_OPTIONS.server)))


def _replay(args: argparse.Namespace) -> _Compared:
    """Read verdicts from a file, and the responses too if they are not given."""
    from cutlm.evaluation.alpaca_eval import find_verdicts, read_annotations
    from cutlm.evaluation.shared import hash_data, open_folder
    from cutlm.judges import Response
    from cutlm.judges.responses import read_responses

    rows = read_annotations(args.annotations, args.annotator)

    def read(files: list[str] | None, number: int) -> list[Response]:
        if files is not None:
            return read_responses(files)
        texts = [(row["instruction"], "", row[f"output_{number}"]) for row in rows]
        names = [{"generator": row.get(f"generator_{number}")} for row in rows]
        return [Response(args.annotations, *text, name) for text, name in zip(texts, names, strict=True)]

    responses, references = read(args.outputs, 2), read(args.reference, 1)
    settings = {"measure": "alpaca", "annotator": args.annotator}
    files = {name: getattr(args, name) for name in ("annotations", "outputs", "reference")}
    settings |= {name: None if file is None else hash_data(file) for name, file in files.items()}
    pairs, counts = _pair(args, responses, references)
    folder = open_folder(args.out, settings, overwrite=args.overwrite)
    return folder, responses, references, find_verdicts(rows, pairs), {"annotator": args.annotator, **counts}


def _annotate(args: argparse.Namespace) -> _Compared | None:
    """Generate responses and ask the annotator to compare them; None if some pairs have no answer."""
    from cutlm.cli.reuse import PARTS, answer_once, describe_source
    from cutlm.evaluation.annotator import ask_verdicts, load_annotator, make_body
    from cutlm.evaluation.shared import VERDICTS_FILE, hash_data, open_folder
    from cutlm.judges.responses import read_responses

    annotator = load_annotator(args.annotator)
    server = _make_server(args, annotator.settings.get("model_name"))
    references = _read_references(args)
    answering = _select_answering(args)
    settings: dict[str, Any] = {"measure": "alpaca", "annotator": args.annotator, "url": server.url}
    # Either a name on the hub, or the contents of a file.
    prompts = _PROMPTS if args.prompts == [_PROMPTS] else hash_data(args.prompts)
    texts = json.dumps([[response.full_instruction, response.output] for response in references])
    settings |= {
        "columns": args.columns,
        "prompts": prompts,
        "reference": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
    settings |= {"request": make_body(server, annotator, [])} | describe_source(answering)
    folder = open_folder(args.out, settings, (*PARTS, _ANNOTATIONS), overwrite=args.overwrite)
    outputs = args.outputs or answer_once(answering, folder, args.prompts, args.columns)
    if outputs is None:
        return None
    responses = read_responses(outputs)
    pairs, counts = _pair(args, responses, references)
    verdicts = ask_verdicts(pairs, annotator, server, folder / VERDICTS_FILE)
    for sentence in verdicts.describe():
        print(sentence)
    if verdicts.failures:
        print("start again with the same options to ask only for these")
        return None
    preferences = [verdicts.preferences.get(index) for index in range(len(pairs))]
    names = {"generator_1": _name_generators(references), "generator_2": _name_generators(responses)}
    rows = []
    for pair, preference in zip(pairs, preferences, strict=True):
        row = {"instruction": pair.instruction, "output_1": pair.reference, "output_2": pair.output} | names
        rows.append({**row, "annotator": annotator.name, "preference": preference})
    write_rows(folder / _ANNOTATIONS, rows)
    about: dict[str, Any] = {"annotator": annotator.name, "annotator_model": server.model, "annotator_url": server.url}
    return folder, responses, references, preferences, about | counts


def _make_server(args: argparse.Namespace, default_model: str | None) -> "Server":
    model = args.annotator_model or default_model
    if not model:
        raise ConfigError(f"--annotator {args.annotator}: its configuration names no model; set --annotator_model")
    options = {"base_url": args.base_url or _OPENAI, "extra_body": args.annotator_extra_body}
    options |= {"requests_per_minute": args.requests_per_minute, "tokens_per_minute": args.tokens_per_minute}
    limits = {"concurrency": args.annotator_concurrency, "max_requests": args.annotator_max_requests}
    return make_server(argparse.Namespace(**options), model, **limits)


def _read_references(args: argparse.Namespace) -> "list[Response]":
    from cutlm.data.conversations import ends_with_response
    from cutlm.data.files import read_rows
    from cutlm.generation.files import check_prompts, find_prompts
    from cutlm.judges.responses import make_response, read_responses

    if args.reference is not None:
        return read_responses(args.reference, args.columns)
    name = describe_sources(args.prompts)
    rows, problems = read_rows(find_prompts(args.prompts), args.columns)
    check_prompts(rows, problems, name)
    if num_without := sum(not ends_with_response(row.value) for row in rows):
        raise ConfigError(
            f"--reference: expected a file of responses to compare with, got none, and {num_without} rows of {name}"
            " have no output; pass one"
        )
    return [make_response(row) for row in rows]


def _pair(
    args: argparse.Namespace, responses: "list[Response]", references: "list[Response]"
) -> "tuple[list[Pair], dict[str, int]]":
    from cutlm.evaluation.annotator import Pair
    from cutlm.evaluation.shared import pair_responses

    found = pair_responses(responses, references)
    if not found.pairs:
        name = describe_sources(args.outputs or "the responses")
        raise DataError(
            f"{name}: expected responses to instructions of the reference, got none; pass files that belong together"
        )
    pairs = [Pair(own.location, own.full_instruction, other.output, own.output) for own, other in found.pairs]
    counts = {"num_without_reference": found.num_alone, "num_without_response": found.num_missing}
    if any(counts.values()):
        left_out = f"{found.num_alone} responses without a reference, {found.num_missing} references without a response"
        print(f"left out: {left_out}")
    return pairs, counts


def _name_generators(responses: "list[Response]") -> str:
    return ", ".join(sorted({str(response.row.get("generator") or "unnamed") for response in responses}))
