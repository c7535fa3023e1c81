"""Measure a model on benchmarks with the package lm-eval: by default the paper's four, ARC-challenge (25 examples),
HellaSwag (10), MMLU (5) and TruthfulQA-MC2 (0), in the layout of its table.

  cutlm eval harness --model MODEL --out DIR
  cutlm eval harness --model MODEL --tasks truthfulqa_mc2,my_task:5 --include_path my_tasks --out DIR

Prompts are plain text; --apply_chat_template wraps them in the model's chat template, which is the prompt of training
for a model trained by cutlm. A stopped run resumes with the next benchmark."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cutlm.cli.model_options import add_options
from cutlm.errors import ConfigError, UserError

_GPU_BATCH_SIZE = 16
# Files that can define a task.
_SUFFIXES = (".yaml", ".py", ".json", ".jsonl", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "model")
    tasks = "tasks of lm-eval, as NAME or NAME:EXAMPLES (default: the paper's four)"
    parser.add_argument("--tasks", metavar="LIST", help=tasks)
    parser.add_argument("--include_path", metavar="DIR", help="a folder with tasks of your own, as YAML files")
    parser.add_argument("--apply_chat_template", action="store_true", help="wrap prompts in the chat template")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf", help="default: hf (transformers)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="default: 16 on a GPU, 1 on a CPU")
    add_options(parser, "dtype", "device")
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task, for a quick test")


def run(args: argparse.Namespace) -> int:
    from cutlm.evaluation import harness
    from cutlm.evaluation.shared import add_to_card, hash_data, open_folder, write_result
    from cutlm.model.loading import fingerprint_model

    _check_options(args)
    args.dtype = args.dtype or "auto"
    benchmarks = harness.read_benchmarks(args.tasks)
    manager = harness.find_tasks(benchmarks, args.include_path)
    settings: dict[str, Any] = {"measure": "harness", "model": fingerprint_model(args.model)}
    names = ("apply_chat_template", "backend", "dtype", "limit", "include_path")
    settings |= {name: getattr(args, name) for name in names}
    settings["tasks"] = [[benchmark.task, benchmark.num_shots] for benchmark in benchmarks]
    if args.include_path is not None:
        files = sorted(path for path in Path(args.include_path).rglob("*") if path.suffix in _SUFFIXES)
        settings["include_files"] = {str(path.relative_to(args.include_path)): hash_data(path) for path in files}
    parts = [benchmark.file for benchmark in benchmarks]
    folder = open_folder(args.out, settings, parts, overwrite=args.overwrite)
    options = {"uses_chat_template": args.apply_chat_template, "limit": args.limit}
    rows = harness.measure_benchmarks(benchmarks, lambda: _load(args), manager, folder, **options)
    name = Path(args.model).resolve().name
    table = harness.tabulate_benchmarks(rows, name)
    if args.limit is not None:
        table += f"\n\nOnly {args.limit} questions per task were asked (--limit): do not report these values."
    packages = (*harness.PACKAGES, "vllm") if args.backend == "vllm" else harness.PACKAGES
    result = harness.summarize_benchmarks(rows) | {"limit": args.limit}
    write_result(folder, result, table, packages, picture=harness.draw_benchmarks(rows, name))
    if args.limit is None:
        values = {f"{row['task']}, {row['num_shots']}-shot": {row["metric"]: row["value"]} for row in rows}
        add_to_card(args.model, values)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded."""
    from cutlm.model.loading import is_adapter_folder

    problems = []
    for name in ("batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name}: expected a whole number of at least 1, got {value}")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        problems.append(f"--include_path {args.include_path}: no such folder; check the path")
    if args.backend == "vllm":
        if args.device is not None:
            problems.append("--device: only for --backend hf, because vLLM uses all visible GPUs; remove it")
        if is_adapter_folder(args.model):
            problems.append(f"--model {args.model}: expected a whole model for vLLM, got an adapter; use cutlm merge")
        if find_spec("vllm") is None:
            problems.append("--backend vllm: vLLM is not installed; run: pip install 'cutlm[vllm]'")
    if problems:
        raise ConfigError(problems)


def _load(args: argparse.Namespace) -> Any:
    """Load the model as lm-eval wants it."""
    from cutlm.evaluation.shared import need_extra
    from cutlm.model.loading import load_trained, unwrap_peft

    if args.backend == "vllm":
        kind = need_extra("lm_eval.models.vllm_causallms").VLLM
        return kind(pretrained=args.model, dtype=args.dtype, batch_size=args.batch_size or _GPU_BATCH_SIZE)
    model, tokenizer = load_trained(args.model, dtype=args.dtype, device=args.device)
    if args.apply_chat_template:
        _check_template(args, tokenizer)
    kind = need_extra("lm_eval.models.huggingface").HFLM
    model = unwrap_peft(model)
    # One prompt keeps a CPU busy, and lm-eval's bar moves after each batch.
    batch_size = args.batch_size or (1 if model.device.type == "cpu" else _GPU_BATCH_SIZE)
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _check_template(args: argparse.Namespace, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"--apply_chat_template: the tokenizer of {args.model} has no chat template; remove the option, or merge"
            " the model with cutlm merge, which saves the prompt of training as its chat template"
        )
    message = [{"role": "user", "content": "1"}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # lm-eval counts the tokens of the prompt without trailing white space; what follows is taken for the answer.
    alone, whole = (len(tokenizer(text).input_ids) for text in (prompt.rstrip(), f"{prompt}1"))
    if whole <= alone:
        raise UserError(
            f"--apply_chat_template: lm-eval cannot separate prompt and answer in the tokens of {args.model}, because"
            " the white space at the end of the prompt is part of a longer token; remove the option"
        )
