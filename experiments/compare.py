"""Compares methods on the tiny world: tables, plots and JSON.

  python experiments/compare.py                 all tables, several hours on 2 cores
  python experiments/compare.py methods         one table
  python experiments/compare.py --quick         one seed and a few steps, to see that everything runs

Learning rates are chosen on the development tasks; what is reported is measured on the test tasks with other seeds.
The result of each run is kept in a cache, and reused as long as neither the code nor the base model changes.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from method_runs import Run, execute
from method_tables import write_results
from methods import ABLATIONS, BASES, METHODS, REMEDIES, TEACHERS, Method, find_method
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import cutlm
from cutlm.data.files import open_atomic
from cutlm.world.base import base_path

FOLDER = Path(__file__).parent
ONLINE = (
    "cut",
    "cut_frozen",
    "cut_frozen_threshold_1.05",
    "cut_frozen_weight_16",
    "redirect",
    "self_distillation",
    "dpo",
)
REWARDS = ("cut", "cut_frozen", "dpo")
NOISES = ("foreign", "praise", "vague")
# Methods with wrong judgments, and of which kinds. Two learn from verdicts only: praise of a wrong response is the only
# kind that changes one, and pairs, which have two verdicts each, get flipped ones.
NOISY = {
    "cut": NOISES,
    "cut_frozen": NOISES,
    "cut_frozen_threshold_1.05": NOISES,
    "cut_frozen_weight_16": NOISES,
    "redirect": NOISES,
    "self_distillation": NOISES,
    "likelihood_satisfactory": ("praise",),
    "dpo": ("flipped",),
}
_DEV_SEED = 0
_SAMPLES_FOR_REWARDS = 4

# Takes runs and what they are for; returns their results in order.
RunAll = Callable[[Sequence[Run], str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Size:
    """How much to run.

    Attributes:
        seeds: Seeds of the test runs.
        learning_rates: The grid.
        num_steps: Optimizer steps of a run.
        num_eval: Tasks to measure on; None for all of the split.
        num_iterations: Iterations of an online run.
        num_responses: Numbers of responses to learn from, in the table of judgments against rewards.
        share: Share of the training tasks to learn from in the others; None for the default of `Run`.
        noise: Shares of wrong judgments.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3)
    num_steps: int = 100
    num_eval: int | None = None
    num_iterations: int = 5
    num_responses: tuple[int, ...] = (80, 240, 720)
    share: float | None = None
    noise: tuple[float, ...] = (0.1, 0.2, 0.3)

    def make_run(self, method: str, **changes: Any) -> Run:
        """A test run of this size; learning rate and seed are set later."""
        run = Run(method, 0.0, 0, "test", self.num_steps, num_eval=self.num_eval, share=self.share)
        return replace(run, **changes)


QUICK = Size((1,), (5e-4,), 6, 35, 2, (64,), 0.1, (0.5,))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"one of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: experiments[-quick])")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that everything runs")
    parser.add_argument(
        "--seeds", type=_positive, metavar="N", help="number of test seeds (default: 5; with --quick: 1)"
    )
    parser.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where results of runs are kept (default: OUT/.runs)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        parser.error(f"TABLE: expected one of {', '.join(TABLES)}, got {', '.join(unknown)}")
    # A quick run does not overwrite the real results.
    out = args.out or (FOLDER.with_name("experiments-quick") if args.quick else FOLDER)
    size = QUICK if args.quick else Size()
    if args.seeds is not None:
        size = replace(size, seeds=tuple(range(1, args.seeds + 1)))
    base = _hash_files([base_path() / "model.safetensors", base_path() / "tokenizer.json"])
    with Pool(args.cache or out / ".runs", f"{base} {_hash_code()}", args.workers) as pool:
        for name in args.tables or TABLES:
            rows = TABLES[name](pool.run_all, size)
            command = f"python experiments/compare.py {name}" + " --quick" * args.quick
            command += "" if args.seeds is None else f" --seeds {args.seeds}"
            write_results(out, name, rows, size.seeds, command, base)
            print((out / f"{name}.md").read_text("utf-8"))
    print(f"Tables, plots and JSON are in {out}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


# ---- Tables ----


def compare_methods(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 2 of the paper: each method trained once on the base model's responses."""
    rates = choose_rates(run_all, [size.make_run(method.name) for method in METHODS], size)
    results = run_all([size.make_run(method.name, num_steps=0) for method in BASES], "testing the base model")
    # The base model is deterministic: it is run once, and listed once per seed like the others.
    rows = [_describe(method, None, [result] * len(size.seeds)) for method, result in zip(BASES, results, strict=True)]
    return rows + _test_methods(run_all, size, METHODS, rates)


def compare_ablations(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 4 of the paper: CUT without one of its parts, with the paper's detector and with the frozen one.

    One thing is changed at a time: an ablation keeps the learning rate of the whole method.
    """
    rate, frozen_rate = choose_rates(run_all, [size.make_run(name) for name in ("cut", "cut_frozen")], size)
    rates = [frozen_rate if method.name.startswith("cut_frozen") else rate for method in ABLATIONS]
    return _test_methods(run_all, size, ABLATIONS, rates)


def compare_teachers(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """What self-distillation and redirection depend on, and controls that learn nothing from what judgments say."""
    names = ("self_distillation", "redirect", "cut_frozen")
    rates = dict(zip(names, choose_rates(run_all, [size.make_run(name) for name in names], size), strict=True))
    chosen = [next(rates[name] for name in names if method.name.startswith(name)) for method in TEACHERS]
    return _test_methods(run_all, size, TEACHERS, chosen)


def compare_iterations(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 6 of the paper: rounds of answering new instructions, judging and training."""
    num_steps = max(1, 2 * size.num_steps // 5)
    templates = [size.make_run(name, num_steps=num_steps, num_iterations=size.num_iterations) for name in ONLINE]
    rates = choose_rates(run_all, templates, size)
    runs = [replace(run, learning_rate=rate) for run, rate in zip(templates, rates, strict=True)]
    return [
        {
            "method": run.method,
            "iteration": iteration + 1,
            "learning_rate": run.learning_rate,
            "test_accuracy": [result["accuracy"][iteration]["macro"] for result in results],
        }
        for run, results in _run_seeds(run_all, runs, size, "testing iterations")
        for iteration in range(size.num_iterations)
    ]


def compare_rewards(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Figure 4 of the paper: judgments against rewards, at equal numbers of judged responses.

    The learning rates are those chosen for the full number of responses.
    """
    rates = choose_rates(run_all, [size.make_run(name) for name in REWARDS], size)
    runs = [
        size.make_run(name, learning_rate=rate, num_responses=num_responses, num_samples=_SAMPLES_FOR_REWARDS)
        for name, rate in zip(REWARDS, rates, strict=True)
        for num_responses in size.num_responses
    ]
    return [
        {
            "method": run.method,
            "num_responses": run.num_responses,
            "learning_rate": run.learning_rate,
            "test_accuracy": [result["accuracy"][-1]["macro"] for result in results],
        }
        for run, results in _run_seeds(run_all, runs, size, "testing judgments against rewards")
    ]


def compare_detectors(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Precision and recall of flagged tokens: the frozen base model, and CUT's own model at the end of training."""
    template = size.make_run("cut")
    (rate,) = choose_rates(run_all, [template], size)
    runs = [replace(template, learning_rate=rate, seed=seed, detects=True) for seed in size.seeds]
    frozen, *current = run_all([replace(template, num_steps=0, detects=True), *runs], "measuring detectors")
    rows = [{"detector": "frozen", **row} for row in frozen["detection"]]
    for index, row in enumerate(current[0]["detection"]):
        same = [result["detection"][index] for result in current]
        means = {name: mean(other[name] for other in same) for name in ("precision", "recall", "f1")}
        rows.append({"detector": "current", **row, **means})
    return rows


def compare_noise(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Wrong judgments: methods and remedies with growing shares of them. Learning rates are those for clean data."""
    rates = dict(zip(NOISY, choose_rates(run_all, [size.make_run(name) for name in NOISY], size), strict=True))
    rates |= {method.name: rates["cut_frozen"] for method in REMEDIES}
    templates = []
    for name, rate in rates.items():
        run = size.make_run(name, learning_rate=rate)
        templates.append(run)
        templates += [
            replace(run, noise=share, noise_kind=kind) for kind in NOISY.get(name, NOISES) for share in size.noise
        ]
    return [
        {
            "method": run.method,
            "noise": run.noise,
            "kind": run.noise_kind,
            "learning_rate": run.learning_rate,
            "test_accuracy": [result["accuracy"][-1]["macro"] for result in results],
        }
        for run, results in _run_seeds(run_all, templates, size, "testing noise")
    ]


TABLES: dict[str, Callable[[RunAll, Size], list[dict[str, Any]]]] = {
    "methods": compare_methods,
    "ablations": compare_ablations,
    "teachers": compare_teachers,
    "iterations": compare_iterations,
    "rewards": compare_rewards,
    "detection": compare_detectors,
    "noise": compare_noise,
}


def choose_rates(run_all: RunAll, templates: Sequence[Run], size: Size) -> list[float]:
    """The learning rate with which each run ends best on the development tasks; the lower one if two are equal."""
    rates = size.learning_rates
    if len(rates) == 1:
        return [rates[0]] * len(templates)
    dev_runs = [replace(run, seed=_DEV_SEED, split="dev") for run in templates]
    runs = [replace(run, learning_rate=rate) for run in dev_runs for rate in rates]
    scores = iter(result["accuracy"][-1]["macro"] for result in run_all(runs, "choosing learning rates"))
    chosen = []
    for _ in templates:
        by_rate = {rate: next(scores) for rate in rates}
        chosen.append(max(rates, key=by_rate.__getitem__))
    return chosen


def _run_seeds(
    run_all: RunAll, runs: Sequence[Run], size: Size, what: str
) -> Iterable[tuple[Run, list[dict[str, Any]]]]:
    """Each run with its results, one for each seed."""
    results = iter(run_all([replace(run, seed=seed) for run in runs for seed in size.seeds], what))
    return [(run, [next(results) for _ in size.seeds]) for run in runs]


def _test_methods(
    run_all: RunAll, size: Size, methods: Sequence[Method], rates: Sequence[float]
) -> list[dict[str, Any]]:
    runs = [size.make_run(method.name, learning_rate=rate) for method, rate in zip(methods, rates, strict=True)]
    tested = _run_seeds(run_all, runs, size, "testing methods")
    return [
        _describe(method, run.learning_rate, results) for method, (run, results) in zip(methods, tested, strict=True)
    ]


def _describe(method: Method, rate: float | None, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of results. Costs except the seconds are means over seeds."""
    families = [name for name in results[0]["accuracy"][-1] if name != "macro"]
    costs = ("num_responses", "tokens_generated", "tokens_trained", "tokens_scored")
    return {
        "method": method.name,
        "about": method.about,
        "learning_rate": rate,
        "test_accuracy": [result["accuracy"][-1]["macro"] for result in results],
        "by_family": {name: mean(result["accuracy"][-1][name] for result in results) for name in families},
        "seconds": [round(result["seconds"], 2) for result in results],
        "seconds_generating": [round(result["seconds_generating"], 2) for result in results],
        **{name: round(mean(result[name] for result in results)) for name in costs},
    }


# ---- Processes and cache ----


class Pool:
    """Executes runs, one per process and core, and keeps their results on disk. Use it as a context manager.

    Args:
        cache: The folder of results.
        version: Identifies the base model and the code; results of other versions are ignored.
        num_workers: Number of processes; None for one per core.
    """

    def __init__(self, cache: Path, version: str, num_workers: int | None = None) -> None:
        self._cache = cache
        self._version = version
        # Processes start when they are first needed, and serve all tables.
        self._executor = ProcessPoolExecutor(
            num_workers or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), _start_worker
        )

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: Any) -> None:
        # Waits, because processes that outlive the queues of this one would never end.
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run_all(self, runs: Sequence[Run], what: str) -> list[dict[str, Any]]:
        """Results of runs in order; each is written to disk as soon as it is done."""
        self._cache.mkdir(parents=True, exist_ok=True)
        paths = {run: self._cache / f"{self._name(run)}.json" for run in runs}
        missing = [run for run in paths if not paths[run].is_file()]
        # Long ones first, so that no core idles while a long one ends.
        missing.sort(key=lambda run: -run.num_steps * run.num_iterations * (4 if "dpo" in run.method else 1))
        futures = {self._executor.submit(execute, run): run for run in missing}
        with tqdm(total=len(paths), initial=len(paths) - len(missing), desc=what, unit="run", ncols=100) as progress:
            for future in as_completed(futures):
                run = futures[future]
                with open_atomic(paths[run]) as file:
                    file.write(json.dumps({"run": asdict(run), "result": future.result()}).encode())
                progress.update()
        return [json.loads(paths[run].read_text("utf-8"))["result"] for run in runs]

    def _name(self, run: Run) -> str:
        text = json.dumps([self._version, asdict(run), asdict(find_method(run.method))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def _start_worker() -> None:
    """Prepare a process for runs: one thread, and no logs, because the results hold what they would say."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("cutlm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)


def _hash_code() -> str:
    """Identify the code that a result depends on; the settings of its method are part of its name."""
    own = [FOLDER / name for name in ("measure.py", "method_runs.py", "noise.py")]
    return _hash_files(sorted([*Path(cutlm.__file__).parent.rglob("*.py"), *own]))


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    # Inherited by the worker processes: runs that wait for each other's threads are slower than one after the other.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    sys.exit(main())
