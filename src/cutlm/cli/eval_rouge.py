"""Measure how similar responses are to references: ROUGE-1, -2, -L and -Lsum with confidence intervals, next to the
paper's Table 3 (summarization).

  cutlm convert critiques test.jsonl --out test-records.jsonl
  cutlm eval rouge --model MODEL --references test-records.jsonl --out DIR
  cutlm eval rouge --outputs responses.json --references test-records.jsonl --out DIR

A reference is a record's improved response (i_ans), or its output if satisfactory; records with neither are left out
and counted. Responses are generated as by cutlm generate, or read from --outputs."""

import argparse

from cutlm.cli.generate import add_answering_arguments
from cutlm.cli.model_options import SOURCES, add_options
from cutlm.data.files import write_rows
from cutlm.data.sources import describe_sources
from cutlm.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    references = "records, or rows of instruction and output"
    parser.add_argument("--references", required=True, nargs="+", metavar="FILE", help=f"{references}: {SOURCES}")
    add_options(parser, "columns")
    parser.add_argument("--outputs", nargs="+", metavar="FILE", help="responses, as cutlm generate writes them")
    parser.add_argument("--use_stemmer", action="store_true", help="match words with the same stem (English)")
    parser.add_argument("--model", metavar="MODEL", help="generate responses with this model, a folder or hub name")
    add_answering_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cutlm.cli.reuse import PARTS, answer_once, check_source, describe_source
    from cutlm.data.records import check_records, raise_problems
    from cutlm.evaluation.rouge import (
        KINDS,
        PACKAGES,
        draw_rouge,
        list_references,
        make_prompt_row,
        measure_rouge,
        tabulate_rouge,
    )
    from cutlm.evaluation.shared import (
        PROMPTS_FILE,
        add_to_card,
        hash_data,
        need_extra,
        open_folder,
        pair_responses,
        write_result,
    )
    from cutlm.generation.local import describe_bad_seed
    from cutlm.judges.responses import read_responses

    problem = describe_bad_seed(args.seed)
    check_source(args, [] if problem is None else [f"--{problem}"], also_used=["seed"])
    need_extra("rouge_score.rouge_scorer")
    name = describe_sources(args.references)
    check = check_records(args.references, args.columns)
    raise_problems(check, name)
    references = list_references(check.records, check.locations)
    num_left_out = len(check.records) - len(references)
    if not references:
        raise DataError(
            f"{name}: expected records that are satisfactory or have an i_ans, got {num_left_out} other"
            " records; add references"
        )
    settings = {"measure": "rouge", "references": hash_data(args.references), "use_stemmer": args.use_stemmer}
    settings |= {"seed": args.seed, "columns": args.columns} | describe_source(args)
    folder = open_folder(args.out, settings, PARTS, overwrite=args.overwrite)
    outputs = args.outputs
    if outputs is None:
        prompts = folder / PROMPTS_FILE
        write_rows(prompts, [make_prompt_row(row) for row in references])
        outputs = answer_once(args, folder, [str(prompts)])
        if outputs is None:
            return 1
    found = pair_responses(read_responses(outputs), references)
    if not found.pairs:
        raise DataError(f"{describe_sources(outputs)}: no response to any instruction of {name}; check both files")
    pairs = [(response.output, reference.output) for response, reference in found.pairs]
    result = measure_rouge(pairs, use_stemmer=args.use_stemmer, seed=args.seed)
    result |= {"num_without_reference": num_left_out, "num_without_response": found.num_missing}
    result["num_responses_left_out"] = found.num_alone
    generator = ", ".join(sorted({str(response.row.get("generator") or "responses") for response, _ in found.pairs}))
    counts = (
        f"Left out: {num_left_out} records without a reference, {found.num_missing} references without a response,"
        f" {found.num_alone} responses without a reference."
    )
    table, picture = f"{tabulate_rouge(result, generator)}\n\n{counts}", draw_rouge(result, generator)
    write_result(folder, result, table, PACKAGES, picture=picture)
    add_to_card(args.model, {"ROUGE": {kind: result[kind] for kind in KINDS}})
    return 0
