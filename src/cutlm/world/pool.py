"""Runs of the comparison over processes, their results kept on disk: what was run once is not run again."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cutlm.data.files import open_atomic
from cutlm.world.methods import find_method
from cutlm.world.runs import Run, execute, start_worker


class Pool:
    """Does runs, one to a processor core, each on one thread; a context, at whose end its processes go.

    Args:
        cache: The folder of results.
        version: Of the base model and the code; results of another version are not used.
        num_workers: Processes; None for one per core.
    """

    def __init__(self, cache: Path, version: str, num_workers: int | None = None) -> None:
        self._cache = cache
        self._version = version
        self._num_workers = num_workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._executor is not None:
            # Not without waiting: processes that outlive this one's queues would wait for each other for good.
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def run_all(self, runs: Sequence[Run], what: str) -> list[dict[str, Any]]:
        """Results of runs in their order; each is on disk as soon as it is there."""
        self._cache.mkdir(parents=True, exist_ok=True)
        paths = {run: self._cache / f"{self._name(run)}.json" for run in runs}
        missing = [run for run in dict.fromkeys(runs) if not paths[run].is_file()]
        # Long ones first, so that no core is left waiting for one at the end.
        missing.sort(key=lambda run: -run.num_steps * run.num_iterations * (4 if "dpo" in run.method else 1))
        progress = tqdm(total=len(paths), initial=len(paths) - len(missing), desc=what, unit="run", ncols=100)
        with progress:
            if missing:
                self._do(missing, paths, progress)
        return [json.loads(paths[run].read_text("utf-8"))["result"] for run in runs]

    def _do(self, missing: Sequence[Run], paths: dict[Run, Path], progress: Any) -> None:
        if self._executor is None:
            # Two runs that wait for each other's threads are slower than one after the other.
            os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._num_workers, context, start_worker, (1,))
        futures = {self._executor.submit(execute, run): run for run in missing}
        for future in as_completed(futures):
            run = futures[future]
            with open_atomic(paths[run]) as file:
                file.write(json.dumps({"run": asdict(run), "result": future.result()}).encode())
            progress.update()

    def _name(self, run: Run) -> str:
        text = json.dumps([self._version, asdict(run), asdict(find_method(run.method))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def hash_code() -> str:
    """Names the state of the library: results of other code are not taken for its own."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def hash_folder(folder: Path) -> str:
    """Names the content of a model's folder: its weights and its tokenizer."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
