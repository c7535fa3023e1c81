"""The comparison of methods on the tiny world: which runs a table takes, and what is made of their results.

One table, one function: a plan of runs on the development tasks (each learning rate once), the best rate of each
method, a plan of runs on the test tasks with fresh seeds. How a run is done is `cutlm.world.runs`' affair, how results
are kept and runs spread over processes `cutlm.world.pool`'s, how tables look `cutlm.world.tables`'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from cutlm.world.methods import ABLATIONS, BASES, LEARNING_RATES, METHODS, NUM_STEPS, ONLINE, REWARDS, Method
from cutlm.world.runs import Run

# Runs to results, in their order.
RunAll = Callable[[Sequence[Run], str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Size:
    """How much to run.

    Attributes:
        seeds: Of the test runs.
        learning_rates: The grid.
        num_steps: Of a run.
        num_eval: Tasks to measure on; None for all of the split.
        num_iterations: Of an online run.
        num_responses: To learn from, in the table of judgments against rewards.
        share: Of the training tasks, to learn from in the others; None for what `cutlm.world.runs` takes.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    learning_rates: tuple[float, ...] = LEARNING_RATES
    num_steps: int = NUM_STEPS
    num_eval: int | None = None
    num_iterations: int = 5
    num_responses: tuple[int, ...] = (80, 240, 720)
    share: float | None = None


QUICK = Size((1,), (5e-4,), 6, 35, 2, (64,), 0.1)
_DEV_SEED = 0
_SAMPLES_FOR_REWARDS = 4


def choose_rates(run_all: RunAll, templates: Sequence[Run], size: Size) -> list[float]:
    """The learning rate by which each run does best on the development tasks, at its end; the lower one of equals."""
    if len(size.learning_rates) == 1:
        return [size.learning_rates[0]] * len(templates)
    runs = [
        replace(run, learning_rate=rate, seed=_DEV_SEED, split="dev")
        for run in templates
        for rate in size.learning_rates
    ]
    scores = [result["accuracy"][-1]["macro"] for result in run_all(runs, "choosing learning rates")]
    num = len(size.learning_rates)
    return [
        size.learning_rates[max(range(num), key=lambda place: scores[start + place])]
        for start in range(0, len(scores), num)
    ]


def compare_methods(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 2 of the paper, on the tiny world: each method trained once on the base model's responses."""
    templates = [
        Run(method.name, 0.0, 0, "test", size.num_steps, num_eval=size.num_eval, share=size.share) for method in METHODS
    ]
    rates = choose_rates(run_all, templates, size)
    bases = [Run(method.name, 0.0, 0, "test", 0, num_eval=size.num_eval, share=size.share) for method in BASES]
    rows = [
        # One run: there is nothing of chance in it. Listed once per seed, as the others are.
        _describe(method, None, [result] * len(size.seeds))
        for method, result in zip(BASES, run_all(bases, "testing the base model"), strict=True)
    ]
    return rows + _test(run_all, size, METHODS, rates)


def compare_ablations(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 4: CUT without one of its parts, by the paper's detector and by the frozen one.

    One thing is changed at a time: the learning rate is the one chosen for the whole method.
    """
    whole = [
        Run(name, 0.0, 0, "test", size.num_steps, num_eval=size.num_eval, share=size.share)
        for name in ("cut", "cut_frozen")
    ]
    rate, rate_frozen = choose_rates(run_all, whole, size)
    rates = [rate_frozen if method.name.startswith("cut_frozen") else rate for method in ABLATIONS]
    return _test(run_all, size, ABLATIONS, rates)


def _test(run_all: RunAll, size: Size, methods: Sequence[Method], rates: Sequence[float]) -> list[dict[str, Any]]:
    """A row of test results for each method."""
    runs = [
        Run(method.name, rate, seed, "test", size.num_steps, num_eval=size.num_eval, share=size.share)
        for method, rate in zip(methods, rates, strict=True)
        for seed in size.seeds
    ]
    results = run_all(runs, "testing methods")
    num = len(size.seeds)
    return [
        _describe(method, rate, results[place * num : (place + 1) * num])
        for place, (method, rate) in enumerate(zip(methods, rates, strict=True))
    ]


def compare_iterations(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Table 6: rounds of answering fresh instructions, judging and training."""
    templates = [
        Run(
            name,
            0.0,
            0,
            "test",
            max(1, 2 * size.num_steps // 5),
            num_iterations=size.num_iterations,
            num_eval=size.num_eval,
            share=size.share,
        )
        for name in ONLINE
    ]
    rates = choose_rates(run_all, templates, size)
    runs = [
        replace(run, learning_rate=rate, seed=seed)
        for run, rate in zip(templates, rates, strict=True)
        for seed in size.seeds
    ]
    results = run_all(runs, "testing iterations")
    num = len(size.seeds)
    rows = []
    for place, (name, rate) in enumerate(zip(ONLINE, rates, strict=True)):
        part = results[place * num : (place + 1) * num]
        for iteration in range(size.num_iterations):
            rows.append(
                {
                    "method": name,
                    "iteration": iteration + 1,
                    "learning_rate": rate,
                    "test_accuracy": [result["accuracy"][iteration]["macro"] for result in part],
                }
            )
    return rows


def compare_rewards(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Figure 4: learning from judgments and from rewards, at equal numbers of judged responses.

    The learning rates are those chosen at the full number of responses.
    """
    whole = [Run(name, 0.0, 0, "test", size.num_steps, num_eval=size.num_eval, share=size.share) for name in REWARDS]
    templates = [
        replace(
            run,
            learning_rate=rate,
            num_responses=num_responses,
            num_samples=_SAMPLES_FOR_REWARDS,
        )
        for run, rate in zip(whole, choose_rates(run_all, whole, size), strict=True)
        for num_responses in size.num_responses
    ]
    runs = [replace(run, seed=seed) for run in templates for seed in size.seeds]
    results = run_all(runs, "testing judgments against rewards")
    num = len(size.seeds)
    return [
        {
            "method": run.method,
            "num_responses": run.num_responses,
            "learning_rate": run.learning_rate,
            "test_accuracy": [result["accuracy"][-1]["macro"] for result in results[place * num : (place + 1) * num]],
        }
        for place, run in enumerate(templates)
    ]


def compare_detectors(run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """Precision and recall of flagged tokens: the frozen base model, and CUT's own at the end of its training."""
    template = Run("cut", 0.0, 0, "test", size.num_steps, num_eval=size.num_eval, share=size.share)
    (rate,) = choose_rates(run_all, [template], size)
    current = [replace(template, learning_rate=rate, seed=seed, detects=True) for seed in size.seeds]
    frozen = replace(template, num_steps=0, detects=True)
    results = run_all([frozen, *current], "measuring detectors")
    rows = [{"detector": "frozen", **row} for row in results[0]["detection"]]
    for place, row in enumerate(results[1]["detection"]):
        same = [result["detection"][place] for result in results[1:]]
        numbers = {name: mean(other[name] for other in same) for name in ("precision", "recall", "f1")}
        rows.append({"detector": "current", **row, **numbers})
    return rows


def compare_table(name: str, run_all: RunAll, size: Size) -> list[dict[str, Any]]:
    """The rows of a table by its name."""
    return {
        "methods": compare_methods,
        "ablations": compare_ablations,
        "iterations": compare_iterations,
        "rewards": compare_rewards,
        "detection": compare_detectors,
    }[name](run_all, size)


def _describe(method: Method, rate: float | None, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of results; costs are means over the seeds but for the seconds."""
    families = [name for name in results[0]["accuracy"][-1] if name != "macro"]
    return {
        "method": method.name,
        "about": method.about,
        "learning_rate": rate,
        "test_accuracy": [result["accuracy"][-1]["macro"] for result in results],
        "by_family": {name: mean(result["accuracy"][-1][name] for result in results) for name in families},
        "seconds": [round(result["seconds"], 2) for result in results],
        "seconds_generating": [round(result["seconds_generating"], 2) for result in results],
        "num_responses": round(mean(result["num_responses"] for result in results)),
        **{
            name: round(mean(result[name] for result in results))
            for name in ("tokens_generated", "tokens_trained", "tokens_blamed")
        },
    }
