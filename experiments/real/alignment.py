"""Compares alignment methods on a real model: does it follow verifiable instructions better after the training?

  make real-model                                              once: fetch the model
  python experiments/real/alignment.py --data shared/data      continue until the table is complete
  python experiments/real/alignment.py --data shared/data --minutes 50
                                                               start no new run after 50 minutes

Every finished run is in alignment-runs.jsonl at once, and is not repeated. What was generated and trained is kept in
the cache (CUTLM_CACHE, or ~/.cache/cutlm). Learning rates are chosen on a development split of instructions; the test
is IFEval, which nothing is chosen on.

  1. responses   the model answers the instructions, and the rules judge the responses
  2. base        the model before alignment is measured
  3. rates       each method is trained with each learning rate, and measured on the development split
  4. test        each method is tested with the best rate and two seeds; the best four methods with three
"""

import argparse
import hashlib
import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from alignment_data import Task, draw_held_out, draw_tasks, judge_responses
from alignment_runs import (
    BASE,
    DTYPE,
    GENERATION_BATCH_SIZE,
    METHODS,
    Method,
    Training,
    check_responses,
    find_model_cache,
    load_aligned,
    measure_retention,
    respond,
    train_adapter,
)
from ifeval import Prompt, find_cache, measure_strict, read_prompts

from cutlm.data.files import write_text
from cutlm.data.journal import Journal
from cutlm.data.records import JudgedRecord
from cutlm.generation.local import Sampling, generate_with_journal
from cutlm.inspect.tables import format_table
from cutlm.model.loading import load_tokenizer
from cutlm.prompting.encoding import Encoder

FOLDER = Path(__file__).parent
STAGES = ("responses", "base", "rates", "test")
_MODEL = find_cache() / "tests" / "SmolLM2-135M-Instruct-float32"
_NUM_DRAWS = 2000  # of the bootstrap
# Fields of `Size` that choose runs; the result of a run does not depend on them.
_PLAN = ("learning_rates", "seeds", "num_best", "num_seeds_of_others")


@dataclass(frozen=True)
class Size:
    """How much to run.

    Attributes:
        num_responses: Judged responses that every method learns from.
        max_response_tokens: Maximum number of tokens of each.
        num_dev: Tasks of the development split.
        num_held_out: Responses to measure retention on.
        max_new_tokens: Maximum number of tokens of a measured response.
        num_tested: IFEval prompts to test on, drawn by a fixed seed; None for all.
        learning_rates: The grid.
        num_steps: Optimizer steps of a training.
        batch_size: Judged responses in each.
        seeds: The seeds of the test; the first is also that of the grid.
        num_best: Methods to test with all seeds.
        num_seeds_of_others: Seeds, the first ones, to test the other methods with.
    """

    num_responses: int = 400
    max_response_tokens: int = 96
    num_dev: int = 64
    num_held_out: int = 64
    max_new_tokens: int = 128
    num_tested: int | None = None
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    num_steps: int = 50
    batch_size: int = 8
    seeds: tuple[int, ...] = (1, 2, 3)
    num_best: int = 4
    num_seeds_of_others: int = 2


class OutOfTimeError(Exception):
    """No run may be started any more."""


@dataclass(frozen=True)
class Data:
    """What runs learn from and are measured on."""

    records: dict[str, list[JudgedRecord]]  # "greedy" and "samples", see `Method`
    dev: list[Prompt]
    test: list[Prompt]
    held_out: list[JudgedRecord]


class Experiment:
    """Executes what is missing, and writes each result at once.

    Args:
        model: The folder of the model.
        data: The folder with `judgments/` and `ifeval/even.jsonl`.
        out: The folder of the results.
        size: How much to run.
        methods: The methods to compare.
        minutes: No run is started after so many minutes; None for no limit.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        out: Path,
        size: Size,
        methods: Sequence[Method] = METHODS,
        minutes: float | None = None,
    ) -> None:
        self.size, self.methods = size, tuple(methods)
        self._model, self._out = model, out
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._cache = find_model_cache(model)
        self._runs_file = out / "alignment-runs.jsonl"
        self._runs = _read_lines(self._runs_file)
        self._data_folder = data
        self._data: Data | None = None

    # ---- Stages ----

    def prepare(self) -> Data:
        """Draw the tasks, have the model answer them, and judge the responses; generated responses are cached."""
        if self._data is None:
            size = self.size
            test = read_prompts(self._data_folder / "ifeval" / "even.jsonl")
            judgments = self._data_folder / "judgments"
            tasks = draw_tasks(judgments, test, size.num_responses + size.num_dev)
            train, dev = tasks[: size.num_responses], tasks[size.num_responses :]
            if size.num_tested is not None:
                test = random.Random("tested").sample(test, size.num_tested)
            sampled = [task for task in train[: size.num_responses // 2] for _ in range(2)]
            records = {
                "greedy": judge_responses(train, self._generate("greedy", train, 0.0)),
                "samples": judge_responses(sampled, self._generate("samples", sampled, 1.0)),
            }
            held_out = draw_held_out(judgments, tasks, size.num_held_out)
            self._data = Data(records, [task.as_prompt() for task in dev], test, held_out)
        return self._data

    def measure_base(self) -> None:
        """Measure the model before alignment on both splits."""
        for split in ("test", "dev"):
            self.execute(BASE, None, self.size.seeds[0], split)

    def try_rates(self) -> None:
        """Train every method with every rate, one method after the other, and measure on the development split."""
        for method in self.methods:
            for rate in self.size.learning_rates:
                self.execute(method, rate, self.size.seeds[0], "dev")

    def test(self) -> None:
        """Test every method with its best rate; those that are best on the development split with more seeds."""
        chosen = [(method, self._choose_rate(method)) for method in self.methods]
        best = sorted(chosen, key=lambda pair: -pair[1][1])[: self.size.num_best]
        for index, seed in enumerate(self.size.seeds):
            for method, (rate, _) in chosen if index < self.size.num_seeds_of_others else best:
                self.execute(method, rate, seed, "test")

    # ---- Runs ----

    def execute(self, method: Method, rate: float | None, seed: int, split: str) -> dict[str, Any]:
        """Train and measure, unless the result is there already.

        Raises:
            OutOfTimeError: There is no time left to start.
        """
        key = self._make_key(method, rate, seed, split)
        if key in self._runs:
            return self._runs[key]
        if self._end is not None and time.monotonic() > self._end:
            raise OutOfTimeError
        print(f"{method.name}, rate {rate}, seed {seed}: {split}", flush=True)
        data, size = self.prepare(), self.size
        adapter, seconds, num_judged = None, 0.0, 0
        if rate is not None:
            records = data.records[method.data]
            training = Training(method, rate, seed, size.num_steps, size.batch_size)
            adapter = self._cache / "adapters" / training.make_key(records)
            seconds = train_adapter(self._model, records, training, adapter)
            num_judged = len(records)
        started = time.perf_counter()
        model = load_aligned(self._model, adapter)
        prompts = data.test if split == "test" else data.dev
        responses = respond(
            model, self._model, prompts, max_new_tokens=size.max_new_tokens, is_praised=method.is_praised
        )
        followed = check_responses(prompts, responses)
        generating = time.perf_counter() - started
        retention = measure_retention(model, self._model, data.held_out)
        result: dict[str, Any] = {
            "key": key,
            "method": method.name,
            "settings": method.settings,
            "learning_rate": rate,
            "seed": seed,
            "split": split,
            **measure_strict(followed),
            "retention": retention,
            "seconds": round(seconds, 1),
            "seconds_generating": round(generating, 1),
            "seconds_scoring": round(time.perf_counter() - started - generating, 1),
            "num_judged": num_judged,
            "num_prompts": len(prompts),
            "mean_response_words": round(mean(len(text.split()) for text in responses), 1),
            "followed": ["".join(str(int(value)) for value in values) for values in followed],
        }
        write_text(self._cache / f"test-{key}.json", json.dumps(responses, indent=1, ensure_ascii=False))
        self._runs[key] = result
        lines = "".join(json.dumps(run) + "\n" for run in self._runs.values())
        write_text(self._runs_file, lines)
        shown = {name: round(result[name], 4) for name in ("instruction_strict", "prompt_strict", "retention")}
        print(f"  {shown}, {seconds:.0f} s training, {generating:.0f} s generating", flush=True)
        return result

    def _make_key(self, method: Method, rate: float | None, seed: int, split: str) -> str:
        other = _PLAN if rate is not None else (*_PLAN, "num_steps", "batch_size")
        facts = {name: value for name, value in asdict(self.size).items() if name not in other}
        parts = [self._model.name, method.name, method.settings, method.data, rate, seed, split, facts, str(DTYPE)]
        return _hash(parts)

    def _choose_rate(self, method: Method) -> tuple[float, float]:
        """The best rate on the development split and its accuracy; the lower rate if two are equal."""
        scores = {
            rate: self.execute(method, rate, self.size.seeds[0], "dev")["instruction_strict"]
            for rate in self.size.learning_rates
        }
        best = max(scores, key=scores.__getitem__)
        return best, scores[best]

    def _generate(self, name: str, tasks: Sequence[Task], temperature: float) -> list[dict[str, Any]]:
        """Generate a response to each task, or read what was generated before; a stopped generation resumes."""
        prompts = [task.prompt for task in tasks]
        sampling = Sampling(
            self.size.max_response_tokens, temperature=temperature, seed=0, batch_size=GENERATION_BATCH_SIZE
        )
        header = {"sampling": asdict(sampling), "prompts": _hash(prompts)}
        file = self._cache / f"{name}-{_hash(header)}.json"
        if file.is_file():
            return list(json.loads(file.read_text("utf-8")))
        tokenizer = load_tokenizer(self._model)
        encoder = Encoder(tokenizer, "chat")
        journal = Journal(file, header)
        ids = [encoder.encode_prompt(prompt) for prompt in prompts]
        # In float32, so that all machines learn from the same responses.
        model = load_aligned(self._model, None, torch.float32)
        generated = generate_with_journal(model, tokenizer, encoder, ids, sampling, journal)
        rows = [
            {
                "prompt": prompt,
                "output": generated.responses.get(index, ""),
                "is_unfinished": index in generated.unfinished,
            }
            for index, prompt in enumerate(prompts)
        ]
        write_text(file, json.dumps(rows, indent=1, ensure_ascii=False))
        journal.remove()
        return rows

    # ---- The table ----

    def write_table(self, command: str) -> None:
        """Write alignment.json and alignment.md from the finished runs."""
        rows, size = list(self._list_rows()), self.size
        best = sorted(self.methods, key=lambda method: -self._find_dev_score(method))[: size.num_best]
        num_seeds = {method.name: min(size.num_seeds_of_others, len(size.seeds)) for method in self.methods}
        num_seeds |= {method.name: len(size.seeds) for method in best} | {BASE.name: 1}
        num_planned = sum(num_seeds.values())
        # Methods that were among the best before may have more seeds.
        num_tested = sum(min(len(row["instruction_strict"]), num_seeds[row["method"]]) for row in rows)
        content = {
            "results": rows,
            "seeds": list(size.seeds),
            "command": command,
            "date": date.today().isoformat(),
            "num_test_runs": {"finished": num_tested, "planned": num_planned},
            "dtype": str(DTYPE).removeprefix("torch."),
            "size": asdict(size),
        }
        write_text(self._out / "alignment.json", json.dumps(content, indent=1) + "\n")
        write_text(self._out / "alignment.md", describe_rows(rows, content))

    def _find_dev_score(self, method: Method) -> float:
        """The best accuracy on the development split so far; 0 without a run."""
        keys = [self._make_key(method, rate, self.size.seeds[0], "dev") for rate in self.size.learning_rates]
        return max((self._runs[key]["instruction_strict"] for key in keys if key in self._runs), default=0.0)

    def _list_rows(self) -> Iterator[dict[str, Any]]:
        size = self.size
        base = self._runs.get(self._make_key(BASE, None, size.seeds[0], "test"))
        for method in (BASE, *self.methods):
            rates: tuple[float | None, ...] = (None,) if method is BASE else size.learning_rates
            for rate in rates:
                keys = [self._make_key(method, rate, seed, "test") for seed in size.seeds]
                runs = [self._runs[key] for key in keys if key in self._runs]
                if runs:
                    yield make_row(method, runs, base)


def make_row(method: Method, runs: Sequence[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """Make a row of results from a method's test runs, one for each seed."""
    names = ("instruction_strict", "prompt_strict", "retention", "seconds", "mean_response_words")
    row: dict[str, Any] = {"method": method.name, "about": method.about, "learning_rate": runs[0]["learning_rate"]}
    row |= {name: [run[name] for run in runs] for name in names}
    row |= {"num_judged": runs[0]["num_judged"], "num_prompts": runs[0]["num_prompts"]}
    followed = [run["followed"] for run in runs]
    row["instruction_interval"] = bootstrap(followed, _rate_instructions)
    row["prompt_interval"] = bootstrap(followed, _rate_prompts)
    if base is not None and method.name != base["method"]:
        row["gain"] = mean(row["instruction_strict"]) - base["instruction_strict"]
        row["gain_interval"] = bootstrap(followed, _rate_instructions, base["followed"])
    return row


def _rate_instructions(followed: Sequence[str]) -> float:
    text = "".join(followed)
    return text.count("1") / len(text)


def _rate_prompts(followed: Sequence[str]) -> float:
    return sum("0" not in text for text in followed) / len(followed)


def bootstrap(
    runs: Sequence[Sequence[str]], rate: Callable[[Sequence[str]], float], base: Sequence[str] | None = None
) -> list[float]:
    """The 95 % interval of a rate, or of its gain over the base model's, by drawing the prompts again.

    Args:
        runs: For each run, a text of 0 and 1 for each prompt: which of its instructions were followed.
        rate: The rate of one run.
        base: The same for the base model.
    """
    draw = random.Random(0)
    num = len(runs[0])
    values = []
    for _ in range(_NUM_DRAWS):
        indices = draw.choices(range(num), k=num)
        value = mean(rate([run[index] for index in indices]) for run in runs)
        values.append(value - (rate([base[index] for index in indices]) if base is not None else 0.0))
    values.sort()
    return [values[round(0.025 * (_NUM_DRAWS - 1))], values[round(0.975 * (_NUM_DRAWS - 1))]]


def describe_rows(rows: Sequence[dict[str, Any]], content: dict[str, Any]) -> str:
    """Make the table in Markdown."""
    size, num_runs = content["size"], content["num_test_runs"]
    header = ["method", "instructions followed", "gain over base", "prompts followed", "retention", "lr", "seeds"]
    header += ["responses judged"]
    cells = [
        [
            f"`{row['method']}` {row['about']}",
            _show(row["instruction_strict"], row["instruction_interval"]),
            f"{row['gain']:+.3f} [{row['gain_interval'][0]:+.3f}, {row['gain_interval'][1]:+.3f}]"
            if "gain" in row
            else "",
            _show(row["prompt_strict"], row["prompt_interval"]),
            f"{mean(row['retention']):.3f}",
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            str(len(row["instruction_strict"])),
            str(row["num_judged"]),
        ]
        for row in sorted(rows, key=lambda row: -mean(row["instruction_strict"]))
    ]
    num_prompts = rows[0]["num_prompts"] if rows else 0
    drawn = "" if size["num_tested"] is None else ", drawn by a fixed seed"
    notes = [
        f"Strict accuracy on {num_prompts} IFEval prompts{drawn}, {size['max_new_tokens']} new tokens, greedy, means"
        " over the seeds; in brackets 95 % intervals from drawing the prompts again. Retention: mean log-likelihood per"
        f" token of {size['num_held_out']} satisfactory responses of the published judgments, in nats. Every method"
        f" makes {size['num_steps']} steps of {size['batch_size']} responses.",
        f"Measured on {content['date']} in {content['dtype']} with `{content['command']}`.",
    ]
    if num_runs["finished"] < num_runs["planned"]:
        notes.append(
            f"Not complete: {num_runs['finished']} of {num_runs['planned']} test runs are finished. The command"
            " continues."
        )
    text = "\n\n".join(notes)
    return f"# Alignment methods on a real model\n\n{format_table(header, cells)}\n\n{text}\n"


def _show(values: Sequence[float], interval: Sequence[float]) -> str:
    return f"{mean(values):.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {run["key"]: run for run in runs}


# ---- The command ----


def main(argv: Sequence[str] | None = None, size: Size | None = None) -> int:
    """Run what is missing and write the table; `size` is for tests."""
    parser = argparse.ArgumentParser(
        prog="alignment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("shared/data"), metavar="DIR", help="folder with judgments/")
    parser.add_argument("--model", type=Path, default=_MODEL, metavar="DIR", help="model folder (default: SmolLM2's)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="folder of the results")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no new run after N minutes")
    parser.add_argument("--prompts", type=int, metavar="N", help="test on N of IFEval's prompts, drawn by a fixed seed")
    parser.add_argument(
        "--add",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "JSON"),
        help='another method: its name and settings, such as cut_foreign \'{"detector": "frozen"}\'',
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="METHOD", help="methods to leave out")
    args = parser.parse_args(argv)
    methods = [method for method in METHODS if method.name not in args.skip]
    methods += [Method(name, json.loads(text), about=f"`{text}`") for name, text in args.add]
    if not args.model.is_dir():
        parser.error(f"--model: no folder {args.model}; make it with: make real-model")
    size = size or Size()
    if args.prompts is not None:
        size = replace(size, num_tested=args.prompts)
    experiment = Experiment(args.model, args.data, args.out, size, methods, args.minutes)
    stages = dict(
        zip(
            STAGES,
            (experiment.prepare, experiment.measure_base, experiment.try_rates, experiment.test),
            strict=True,
        )
    )
    status = 0
    try:
        for name in STAGES[: STAGES.index(args.until) + 1]:
            stages[name]()
    except OutOfTimeError:
        print("The time is up; the same command continues.")
        status = 1
    command = "python experiments/real/alignment.py --data shared/data"
    command += "".join(f" --add {shlex.quote(name)} {shlex.quote(text)}" for name, text in args.add)
    command += f" --prompts {args.prompts}" if args.prompts is not None else ""
    command += f" --skip {shlex.join(args.skip)}" if args.skip else ""
    experiment.write_table(command)
    print((args.out / "alignment.md").read_text("utf-8"))
    return status


if __name__ == "__main__":
    sys.exit(main())
