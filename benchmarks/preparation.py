"""Measure time and memory of preparing records for training, against TRL's SFTTrainer on the same texts.

  python benchmarks/preparation.py --records iter1.json iter2.json iter3.json --tokenizer MODEL

    cutlm      `load_data` and `encode_dataset`, as in `cutlm train`: read, check, render and tokenize both contexts of
               every record, without the cache
    trl        `load_dataset` and `SFTTrainer` on the same prompts and responses: an unsatisfactory record is two of its
               examples, one for each context
    plain      the same with one example for each record, the context without the judgment
    cached     cutlm again, with the rows in the cache

The records of the files are repeated up to --num_records, with a number in each text, so that all texts differ. Each
variant runs in a process of its own; `cutlm N` prepares the first N records, for the fit of seconds against records.
Importing libraries is not measured."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from common import make_parser, read_peak_bytes, run_benchmark

PARTS = (0.25, 0.5, 1.0)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--records", nargs="+", required=True, metavar="FILE", help="judged records")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="a tokenizer with a chat template")
    parser.add_argument("--num_records", type=int, default=64_000)
    parser.add_argument("--num_processes", type=int, help="dataset_num_proc of both (default: none)")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--variants", nargs="+", choices=("cutlm", "trl", "plain", "cached"), default=None)
    parser.add_argument("--limit", type=float, default=3600, help="seconds for all turns (default: 3600)")
    args = parser.parse_args()
    sizes = [int(part * args.num_records) for part in PARTS]
    variants = [f"cutlm {size}" for size in sizes] + [f"{name} {sizes[-1]}" for name in ("trl", "plain", "cached")]
    chosen = [name for name in variants if args.variants is None or name.split()[0] in args.variants]
    run_benchmark(args, chosen, run_variant, summarize, prepare=prepare, limit=args.limit)


def summarize(results: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for variant, result in results.items():
        known = {"seconds": result.get("failed"), "CPU seconds": "", "peak GB": ""}
        if "failed" not in result:
            cpu, peak = result["cpu_seconds"], result["peak"] / 1e9
            known = {"seconds": result["seconds"], "CPU seconds": cpu, "peak GB": peak}
        rows.append({"variant": variant} | known)
    return rows, compare(results)


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the largest runs, their peak memory, and a line through seconds over records."""
    done = {name: result for name, result in results.items() if "failed" not in result}
    sizes = sorted(int(name.split()[1]) for name in done if name.startswith("cutlm "))
    figures: dict[str, float] = {}
    if not sizes:
        return figures
    ours = done[f"cutlm {sizes[-1]}"]
    for figure, name in (("time_over_trl", "trl"), ("time_over_trl_plain", "plain")):
        if other := done.get(f"{name} {sizes[-1]}"):
            figures[figure] = ours["seconds"] / other["seconds"]
            figures[f"cpu_{figure}"] = ours["cpu_seconds"] / other["cpu_seconds"]
    figures["peak_gb"] = ours["peak"] / 1e9
    if len(sizes) > 1:
        seconds = [done[f"cutlm {size}"]["seconds"] for size in sizes]
        slope, intercept = linear_regression(sizes, seconds)
        figures |= {"seconds_per_1000_records": 1000 * slope, "seconds_at_no_records": intercept}
        figures["largest_deviation_from_line"] = max(
            abs(second / (slope * size + intercept) - 1) for size, second in zip(sizes, seconds, strict=True)
        )
    return figures


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the records, and the same texts as examples of TRL.

    Returns:
        The number of examples with both contexts, and of unsatisfactory records.
    """
    from cutlm import load_records
    from cutlm.prompting.templates import add_judgment

    known = load_records(args.records)
    sizes = {int(part * args.num_records) for part in PARTS}
    names = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in ("trl", "plain")}
    own = {size: (folder / f"cutlm-{size}.jsonl").open("w", encoding="utf-8") for size in sizes}
    num_judged = 0
    for index in range(args.num_records):
        record = _number(known[index % len(known)], index // len(known))
        row = json.dumps(record.model_dump(include={"instruction", "input", "output", "judgment", "score"})) + "\n"
        for size in sizes:
            if index < size:
                own[size].write(row)
        contexts = [record.conversation]
        if not record.is_satisfactory:
            contexts.append(add_judgment(record.conversation, str(record.judgment)))
            num_judged += 1
        for number, context in enumerate(contexts):
            example = {"prompt": _list_messages(context), "completion": [_say("assistant", record.output)]}
            for name in ("trl", "plain")[: 2 - number]:
                names[name].write(json.dumps(example) + "\n")
    for file in (*names.values(), *own.values()):
        file.close()
    return {"num_examples": args.num_records + num_judged, "num_unsatisfactory": num_judged}


def _number(record: Any, number: int) -> Any:
    """A copy of a record with a number in each text."""
    if not number:
        return record
    texts = {"instruction": f"({number}) {record.instruction}", "output": f"{number}. {record.output}"}
    if record.judgment is not None and not record.is_satisfactory:
        texts["judgment"] = f"{number}: {record.judgment}"
    return record.model_copy(update=texts)


def _list_messages(conversation: Any) -> list[dict[str, str]]:
    return [_say(message["role"], message["content"]) for message in conversation.messages]


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def run_variant(args: argparse.Namespace) -> dict[str, Any]:
    name, size = args.variant.split()
    if name == "cutlm" or name == "cached":
        return run_cutlm(args, int(size), is_cached=name == "cached")
    return run_trl(args, name)


def run_cutlm(args: argparse.Namespace, size: int, *, is_cached: bool) -> dict[str, Any]:
    import datasets

    from cutlm.model.loading import load_tokenizer
    from cutlm.training.config import CUTConfig
    from cutlm.training.dataset import encode_dataset, make_encoder
    from cutlm.training.run import load_data

    datasets.config.HF_DATASETS_CACHE = Path(args.folder) / "cache"
    if not is_cached:
        datasets.disable_caching()
    path = str(Path(args.folder) / f"cutlm-{size}.jsonl")
    config = CUTConfig(
        **_make_settings(args), template="chat", max_length=args.max_length, dataset_num_proc=args.num_processes
    )
    tokenizer = load_tokenizer(args.tokenizer)

    def encode() -> Any:
        data = load_data([path])
        encoder = make_encoder(tokenizer, config)
        return encode_dataset(data.rows, "train_dataset", config, encoder, data.locations)[0].rows

    if is_cached:
        encode()
    return _time(encode)


def run_trl(args: argparse.Namespace, name: str) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    config = SFTConfig(**_make_settings(args), max_length=args.max_length, dataset_num_proc=args.num_processes)
    cache = str(Path(args.folder) / f"{args.variant}-{os.getpid()}")

    def encode() -> Any:
        path = str(Path(args.folder) / f"{name}.jsonl")
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train_dataset

    return _time(encode)


def _make_settings(args: argparse.Namespace) -> dict[str, Any]:
    folder = tempfile.mkdtemp(dir=args.folder)
    return {"output_dir": folder, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}


def _time(encode: Any) -> dict[str, Any]:
    before, began = _read_cpu_seconds(), time.perf_counter()
    rows = encode()
    seconds, cpu = time.perf_counter() - began, _read_cpu_seconds() - before
    print(f"{len(rows)} rows", file=sys.stderr)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak": read_peak_bytes(), "num_rows": len(rows)}


def _read_cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    times: Sequence[float] = os.times()
    return sum(times[:4])


if __name__ == "__main__":
    main()
