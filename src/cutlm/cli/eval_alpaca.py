"""Say how often a model's responses are preferred to a reference's: AlpacaEval, beside the paper's rows.

  cutlm eval alpaca --model MODEL --out DIR
  cutlm eval alpaca --outputs responses.json --reference other.json --base_url URL --annotator_model NAME --out DIR
  cutlm eval alpaca --annotations annotations.json --out DIR

The model answers the 805 instructions of the hub's tatsu-lab/alpaca_eval, or a file of the same shape, whose outputs
are the reference unless another one is given. The annotator is asked which response is better as the package
alpaca-eval asks it: by default GPT-4 by OpenAI's API, or any OpenAI-compatible server. A key is read from the
environment variable OPENAI_API_KEY. Answers are kept as they come: a run that was stopped asks only for the missing
ones. Pairs without a verdict are left out and counted.

With --annotations nothing is asked: the verdicts are those in the file, and so are the responses, unless given."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlm.cli.generate import ANSWERING_OPTIONS, LOCAL_OPTIONS, add_answering_arguments

if TYPE_CHECKING:
    from cutlm.evaluation.annotator import Pair
    from cutlm.judges import Response
    from cutlm.servers.chat import ChatServer

_ANNOTATIONS = "annotations.json"
_PROMPTS = "alpaca_eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="answer by this model: a folder, or a hub name")
    parser.add_argument("--prompts", default=_PROMPTS, metavar="FILE", help="the instructions (default: alpaca_eval)")
    parser.add_argument("--outputs", metavar="FILE", help="the model's responses, as cutlm generate writes them")
    parser.add_argument(
        "--reference", metavar="FILE", help="responses to compare with (default: the outputs in --prompts)"
    )
    parser.add_argument(
        "--annotator",
        default="alpaca_eval_gpt4",
        metavar="NAME",
        help="a configuration of alpaca-eval, or a folder with one (default: alpaca_eval_gpt4)",
    )
    parser.add_argument("--annotations", metavar="FILE", help="verdicts made elsewhere; nothing is asked")
    asking = parser.add_argument_group("the annotator's server")
    asking.add_argument("--base_url", metavar="URL", help="default: https://api.openai.com/v1")
    asking.add_argument("--annotator_model", metavar="NAME", help="default: the one that the configuration names")
    asking.add_argument(
        "--annotator_extra_body",
        metavar="JSON",
        help="""further fields of every request; null takes one away: '{"max_tokens": 2000, "temperature": null}'""",
    )
    asking.add_argument(
        "--annotator_concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)"
    )
    asking.add_argument(
        "--annotator_max_requests", type=int, metavar="N", help="most attempts, of all starts (default: no limit)"
    )
    add_answering_arguments(parser, LOCAL_OPTIONS)


def run(args: argparse.Namespace) -> int:
    from cutlm.evaluation.alpaca_eval import PACKAGES, draw_win_rate, measure_win_rate, tabulate_win_rate
    from cutlm.evaluation.shared import import_alpaca_eval, write_result

    _check_options(args)
    import_alpaca_eval("metrics")
    compared = _replay(args) if args.annotations is not None else _ask(args)
    if compared is None:
        return 1
    folder, responses, references, preferences, about = compared
    result = measure_win_rate(preferences, [response.output for response in responses]) | about
    names = _name_generators(responses), _name_generators(references)
    table, picture = tabulate_win_rate(result, *names), draw_win_rate(result, *names)
    write_result(folder, result, table, PACKAGES, picture=picture)
    return 0


def _select_answering(args: argparse.Namespace) -> argparse.Namespace:
    """The options of answering: a local model answers, because --base_url is the annotator's server."""
    return argparse.Namespace(**vars(args) | dict.fromkeys(("base_url", *ANSWERING_OPTIONS.server)))


# Folder, the model's responses, the reference's, a verdict of each pair or None, and further figures.
_Compared = tuple[Path, "list[Response]", "list[Response]", list[float | None], dict[str, Any]]


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options at odds, before anything is loaded or paid for.

    Raises:
        ConfigError: All such options are named.
    """
    from cutlm.cli.reuse import check_source, list_given
    from cutlm.errors import ConfigError
    from cutlm.evaluation.annotator import OPENAI
    from cutlm.servers.http import KEY_VARIABLE, read_key

    if args.annotations is not None:
        own = list_given(args, add_arguments, ("annotations", "annotator", "outputs", "reference"))
        if own:
            raise ConfigError(f"{', '.join(own)}: with --annotations nothing is asked; leave out the one or the other")
        return
    problems = []
    if args.prompts != _PROMPTS and args.outputs is not None and args.reference is not None:
        problems.append("--prompts: of no use with both --outputs and --reference; leave it out")
    if args.base_url is None and read_key() is None:
        problems.append(
            f"{KEY_VARIABLE}: expected a key to {OPENAI}, got none; set it, or name another server by --base_url"
        )
    check_source(_select_answering(args), problems)


def _replay(args: argparse.Namespace) -> _Compared:
    """Takes verdicts from a file, and the responses too where they are not given."""
    from cutlm.evaluation.alpaca_eval import find_verdicts, read_annotations
    from cutlm.evaluation.shared import hash_file, open_folder
    from cutlm.judges import Response
    from cutlm.judges.responses import read_responses

    rows = read_annotations(args.annotations, args.annotator)

    def read(file: str | None, number: int) -> list[Response]:
        if file is not None:
            return read_responses(file)
        return [
            Response(args.annotations, row["instruction"], "", row[f"output_{number}"], {"generator": generator})
            for row in rows
            for generator in [row.get(f"generator_{number}")]
        ]

    responses, references = read(args.outputs, 2), read(args.reference, 1)
    settings = {"measure": "alpaca", "annotator": args.annotator}
    settings |= {
        name: None if getattr(args, name) is None else hash_file(getattr(args, name))
        for name in ("annotations", "outputs", "reference")
    }
    pairs, counts = _pair(args, responses, references)
    folder = open_folder(args.out, settings, overwrite=args.overwrite)
    about = {"annotator": args.annotator, "reference": _name_generators(references), **counts}
    return folder, responses, references, find_verdicts(rows, pairs), about


def _ask(args: argparse.Namespace) -> _Compared | None:
    """Has the model answer and the annotator compare; None where a server had no answer to some."""
    from cutlm.cli.reuse import PARTS, answer_once, describe_source
    from cutlm.data.files import write_rows
    from cutlm.evaluation.annotator import ask_verdicts, describe_verdicts, load_annotator
    from cutlm.evaluation.shared import VERDICTS_FILE, hash_file, open_folder
    from cutlm.judges.responses import read_responses

    annotator = load_annotator(args.annotator)
    server = _make_server(args, dict(annotator.settings))
    references = _read_references(args)
    settings: dict[str, Any] = {"measure": "alpaca", "annotator": args.annotator, "url": server.url}
    # A name on the hub, or what a file holds: a changed one is another.
    prompts = hash_file(args.prompts) if Path(args.prompts).exists() else args.prompts
    settings |= {"prompts": prompts, "reference": _hash_responses(references)}
    settings |= {"request": server.make_request("")} | describe_source(_select_answering(args))
    folder = open_folder(args.out, settings, (*PARTS, _ANNOTATIONS), overwrite=args.overwrite)
    outputs = args.outputs or answer_once(_select_answering(args), folder, args.prompts)
    if outputs is None:
        return None
    responses = read_responses(outputs)
    pairs, counts = _pair(args, responses, references)
    verdicts = ask_verdicts(pairs, annotator, server, folder / VERDICTS_FILE)
    for sentence in describe_verdicts(verdicts):
        print(sentence)
    if verdicts.failures:
        print("start again with the same options to ask for these alone")
        return None
    preferences = [verdicts.preferences.get(index) for index in range(len(pairs))]
    names = {"generator_1": _name_generators(references), "generator_2": _name_generators(responses)}
    write_rows(
        folder / _ANNOTATIONS,
        [
            {
                "instruction": pair.instruction,
                "output_1": pair.reference,
                "output_2": pair.output,
                **names,
                "annotator": annotator.name,
                "preference": preference,
            }
            for pair, preference in zip(pairs, preferences, strict=True)
        ],
    )
    about: dict[str, Any] = {"annotator": annotator.name, "annotator_model": server.model, "annotator_url": server.url}
    about |= {"reference": _name_generators(references)} | counts
    return folder, responses, references, preferences, about


def _make_server(args: argparse.Namespace, settings: dict[str, Any]) -> "ChatServer":
    from cutlm.cli.judge import read_fields
    from cutlm.errors import ConfigError
    from cutlm.evaluation.annotator import OPENAI
    from cutlm.servers.chat import ChatServer
    from cutlm.servers.http import describe_bad_address

    url = args.base_url or OPENAI
    if (problem := describe_bad_address(url, "--base_url")) is not None:
        raise ConfigError(problem)
    model = args.annotator_model or settings.get("model_name")
    if not model:
        raise ConfigError(f"--annotator {args.annotator}: it names no model to ask; name one by --annotator_model")
    return ChatServer(
        url,
        model,
        temperature=settings.get("temperature", 0.0),
        max_tokens=settings.get("max_tokens", 1024),
        fields=read_fields(args.annotator_extra_body or "{}", "--annotator_extra_body"),
        concurrency=args.annotator_concurrency,
        max_requests=args.annotator_max_requests,
    )


def _read_references(args: argparse.Namespace) -> "list[Response]":
    from cutlm.errors import ConfigError
    from cutlm.generation.local import load_prompts
    from cutlm.judges import Response
    from cutlm.judges.responses import read_responses

    if args.reference is not None:
        return read_responses(args.reference)
    rows = load_prompts(args.prompts)
    num_without = sum(not isinstance(row.get("output"), str) for row in rows)
    if num_without:
        raise ConfigError(
            f"--reference: expected a file of responses to compare with, got none, and {num_without} rows of"
            f" {args.prompts} have no output either; name one"
        )
    return [
        Response(f"{args.prompts}[{index}]", row["instruction"], row.get("input") or "", row["output"], row)
        for index, row in enumerate(rows)
    ]


def _hash_responses(responses: "list[Response]") -> str:
    import hashlib
    import json

    texts = [[response.full_instruction, response.output] for response in responses]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _pair(
    args: argparse.Namespace, responses: "list[Response]", references: "list[Response]"
) -> "tuple[list[Pair], dict[str, int]]":
    from cutlm.errors import DataError
    from cutlm.evaluation.annotator import Pair
    from cutlm.evaluation.shared import pair_responses

    found = pair_responses(responses, references)
    if not found.pairs:
        raise DataError(
            f"{args.outputs or 'the responses'}: no response to any instruction of the reference; name those that"
            " belong together"
        )
    pairs = [Pair(own.location, own.full_instruction, other.output, own.output) for own, other in found.pairs]
    counts = {"num_without_reference": found.num_alone, "num_without_response": found.num_missing}
    if found.num_alone or found.num_missing:
        print(
            f"{found.num_alone} responses without a reference and {found.num_missing} references without a response are"
            " left out"
        )
    return pairs, counts


def _name_generators(responses: "list[Response]") -> str:
    return ", ".join(sorted({str(response.row.get("generator") or "unnamed") for response in responses}))
