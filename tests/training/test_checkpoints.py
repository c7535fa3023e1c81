"""The private methods of the libraries' trainers that are overridden here, and what they were checked against."""

import hashlib
import inspect

import transformers
import trl

from cutlm.training.checkpoints import TRAINER_OVERRIDES, CheckpointingTrainer
from cutlm.training.pairs import PairTrainer
from cutlm.training.trainer import CUTTrainer

LIBRARIES = {"DPOTrainer": trl.DPOTrainer, "Trainer": transformers.Trainer}


def test_every_overridden_private_method_is_listed() -> None:
    overridden = {
        f"{library.__name__}.{name}"
        for trainer in (CheckpointingTrainer, CUTTrainer, PairTrainer)
        for library in LIBRARIES.values()
        for name, value in vars(trainer).items()
        if callable(value) and name.startswith("_") and not name.startswith("__") and name in vars(library)
    }
    assert overridden == set(TRAINER_OVERRIDES)


def test_the_overridden_methods_are_those_that_were_checked() -> None:
    changed = {}
    for name, expected in TRAINER_OVERRIDES.items():
        library, _, method = name.partition(".")
        source = inspect.getsource(vars(LIBRARIES[library])[method])
        found = hashlib.sha256(source.encode()).hexdigest()[:12]
        if found != expected:
            changed[name] = found
    assert not changed, (
        f"transformers {transformers.__version__}, trl {trl.__version__} changed these methods: {sorted(changed)}; read"
        f" their source, adapt the overrides, then update TRAINER_OVERRIDES: {changed}"
    )
