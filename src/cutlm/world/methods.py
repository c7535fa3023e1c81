"""The methods that are compared on the tiny world: a name, the settings of training, and the data that it needs.

Nothing is tuned here but the learning rate: every method gets the same grid, chosen on the development tasks. An
ablation keeps the rate of the whole method.
"""

from dataclasses import dataclass, field
from typing import Any

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3)
NUM_STEPS = 100
BATCH_SIZE = 32  # responses
NUM_SAMPLES = 8  # a prompt, for DPO


@dataclass(frozen=True)
class Method:
    """One way to learn from judged responses.

    Attributes:
        name: As in the tables.
        settings: Of `CUTConfig`, where they differ from its defaults.
        data: "greedy": one response an instruction, the likeliest; "samples": `NUM_SAMPLES` of them, drawn;
            "refined": greedy, and the model's own rewriting of what was unsatisfactory.
        is_praised: Whether the trained model is prompted with the judgment "Perfect.".
        about: A few words for the table.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "greedy"
    is_praised: bool = False
    about: str = ""


BASES = (
    Method("base", about="the model before alignment"),
    Method("base_perfect", is_praised=True, about='the same, told "Perfect."'),
)
_FROZEN = {"detector": "frozen"}
METHODS = (
    Method("cut", about="CUT as in the paper"),
    Method("cut_frozen", _FROZEN, about="CUT, tokens blamed once by the frozen base model"),
    Method("cut_frozen_threshold_1.05", _FROZEN | {"threshold": 1.05}, about="the same at threshold 1.05"),
    Method("cut_true_spans", {"detector": "spans"}, about="CUT, the truly wrong tokens given by the oracle"),
    Method("dual_cut", {"objective": "dual_cut"}, about="DualCUT: praise too"),
    Method("likelihood", {"objective": "likelihood"}, about="likelihood of every response"),
    Method(
        "likelihood_satisfactory",
        {"objective": "likelihood", "satisfactory_only": True},
        about="likelihood of satisfactory responses",
    ),
    Method(
        "hindsight", {"objective": "hindsight"}, is_praised=True, about='likelihood given the judgment; told "Perfect."'
    ),
    Method("forward_prediction", {"objective": "forward_prediction"}, about="response, then judgment"),
    Method("ilf_mle", {"objective": "ilf_mle"}, data="refined", about="likelihood of the model's own refinements"),
    Method("unlikelihood", {"objective": "unlikelihood"}, about="every token of unsatisfactory responses unlearned"),
    Method("dpo", {"objective": "dpo"}, data="samples", about="DPO, pairs out of 8 samples a prompt"),
    Method("ilf_dpo", {"objective": "ilf_dpo"}, data="refined", about="DPO, refinement over response"),
)
ABLATIONS = (
    Method("cut", about="CUT as in the paper"),
    Method("cut_without_l1", {"use_contrast_loss": False}, about="without L1"),
    Method(
        "cut_without_l2_satisfactory", {"use_satisfactory_loss": False}, about="without L2 of satisfactory responses"
    ),
    Method(
        "cut_without_l2_unsatisfactory",
        {"use_judged_loss": False},
        about="without L2 of unsatisfactory responses",
    ),
    Method("cut_without_detection", {"detector": "off"}, about="every token of an unsatisfactory response flagged"),
    Method("cut_gamma_0", {"gamma": 0.0}, about="without dynamic weighting"),
    Method("cut_threshold_1.05", {"threshold": 1.05}, about="threshold 1.05"),
    Method("cut_threshold_1.2", {"threshold": 1.2}, about="threshold 1.2"),
    Method("cut_frozen", _FROZEN, about="frozen detector"),
    Method("cut_frozen_with_l2", _FROZEN | {"use_judged_loss": True}, about="frozen detector, with all of L2"),
    Method("cut_frozen_threshold_1.05", _FROZEN | {"threshold": 1.05}, about="frozen detector, threshold 1.05"),
    Method("cut_frozen_threshold_1.2", _FROZEN | {"threshold": 1.2}, about="frozen detector, threshold 1.2"),
)
ONLINE = ("cut", "cut_frozen", "hindsight", "dpo")
REWARDS = ("cut", "cut_frozen", "dpo")


def find_method(name: str) -> Method:
    """The method of a name."""
    return next(method for method in (*BASES, *METHODS, *ABLATIONS) if method.name == name)
