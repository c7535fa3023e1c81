"""The methods that are compared on the tiny world, by table."""

from dataclasses import dataclass, field
from typing import Any

NUM_SAMPLES = 8  # responses per instruction, for DPO


@dataclass(frozen=True)
class Method:
    """One way to learn from judged responses.

    Attributes:
        name: Its name in the tables.
        settings: Settings of `CUTConfig` that differ from the defaults.
        data: "greedy": the greedy response to each instruction; "samples": `NUM_SAMPLES` sampled responses each;
            "refined": greedy, and the model's own refinements of unsatisfactory responses.
        is_shuffled: Whether each unsatisfactory response gets another one's judgment: a control, which learns nothing
            from what judgments say.
        is_praised: Whether the trained model is prompted with the judgment "Perfect.".
        about: A short description for the tables.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "greedy"
    is_shuffled: bool = False
    is_praised: bool = False
    about: str = ""


_FROZEN = {"detector": "frozen"}
_DISTILLED = {"objective": "self_distillation"}
_REDIRECTED = {"objective": "redirect"}
BASES = (
    Method("base", about="the model before alignment"),
    Method("base_perfect", is_praised=True, about='the same, prompted with "Perfect."'),
)
METHODS = (
    Method("cut", about="CUT as in the paper"),
    Method("cut_frozen", _FROZEN, about="CUT, tokens flagged once by the frozen base model"),
    Method("cut_frozen_threshold_1.05", _FROZEN | {"threshold": 1.05}, about="the same at threshold 1.05"),
    Method(
        "cut_frozen_weight_4",
        _FROZEN | {"threshold": 1.05, "unlikelihood_weight": 4.0},
        about="the same at threshold 1.05, flagged tokens weigh 4 times as much",
    ),
    Method(
        "cut_frozen_weight_16",
        _FROZEN | {"threshold": 1.05, "unlikelihood_weight": 16.0},
        about="the same at threshold 1.05, flagged tokens weigh 16 times as much",
    ),
    Method("cut_true_spans", {"detector": "spans"}, about="CUT, the truly wrong tokens given by the oracle"),
    Method("redirect", _REDIRECTED, about="CUT, flagged tokens redirected by a frozen teacher, too"),
    Method("redirect_threshold_1.05", _REDIRECTED | {"threshold": 1.05}, about="the same at threshold 1.05"),
    Method("self_distillation", _DISTILLED, about="guided self-distillation, frozen teacher"),
    Method("dual_cut", {"objective": "dual_cut"}, about="DualCUT, which also learns from praise"),
    Method("likelihood", {"objective": "likelihood"}, about="likelihood of every response"),
    Method(
        "likelihood_satisfactory",
        {"objective": "likelihood", "satisfactory_only": True},
        about="likelihood of satisfactory responses",
    ),
    Method(
        "hindsight",
        {"objective": "hindsight"},
        is_praised=True,
        about='likelihood given the judgment; prompted with "Perfect."',
    ),
    Method("forward_prediction", {"objective": "forward_prediction"}, about="likelihood of response, then judgment"),
    Method("ilf_mle", {"objective": "ilf_mle"}, data="refined", about="likelihood of the model's own refinements"),
    Method("unlikelihood", {"objective": "unlikelihood"}, about="every token of unsatisfactory responses unlearned"),
    Method("dpo", {"objective": "dpo"}, data="samples", about="DPO, pairs from 8 samples per instruction"),
    Method("ilf_dpo", {"objective": "ilf_dpo"}, data="refined", about="DPO, refinement over response"),
)
ABLATIONS = (
    Method("cut", about="CUT as in the paper"),
    Method("cut_without_l1", {"use_contrast_loss": False}, about="without L1"),
    Method(
        "cut_without_l2_satisfactory", {"use_satisfactory_loss": False}, about="without L2 of satisfactory responses"
    ),
    Method("cut_without_l2_unsatisfactory", {"use_judged_loss": False}, about="without L2 of unsatisfactory responses"),
    Method("cut_without_detection", {"detector": "off"}, about="every token of an unsatisfactory response flagged"),
    Method("cut_gamma_0", {"gamma": 0.0}, about="without dynamic weight"),
    Method("cut_threshold_1.05", {"threshold": 1.05}, about="threshold 1.05"),
    Method("cut_threshold_1.2", {"threshold": 1.2}, about="threshold 1.2"),
    Method("cut_frozen", _FROZEN, about="frozen detector"),
    Method("cut_frozen_with_l2", _FROZEN | {"use_judged_loss": True}, about="frozen detector, with all of L2"),
    Method("cut_frozen_threshold_1.05", _FROZEN | {"threshold": 1.05}, about="frozen detector, threshold 1.05"),
    Method("cut_frozen_threshold_1.2", _FROZEN | {"threshold": 1.2}, about="frozen detector, threshold 1.2"),
)
# One thing is changed at a time; `compare.py` gives each the learning rate of the method whose name it starts with.
TEACHERS = (
    Method("self_distillation", _DISTILLED, about='guided self-distillation: "Perfect.", guidance 1, forward KL'),
    Method("self_distillation_guidance_0", _DISTILLED | {"guidance": 0.0}, about="guidance 0: no judged context"),
    Method("self_distillation_guidance_2", _DISTILLED | {"guidance": 2.0}, about="guidance 2"),
    Method("self_distillation_guidance_4", _DISTILLED | {"guidance": 4.0}, about="guidance 4"),
    Method("self_distillation_advice", _DISTILLED | {"teacher_context": "advice"}, about="the teacher gets advice"),
    Method(
        "self_distillation_draft",
        _DISTILLED | {"teacher_context": "advice", "teacher_sees_response": True},
        about="the teacher gets advice and the response",
    ),
    Method("self_distillation_reverse_kl", _DISTILLED | {"divergence": "reverse_kl"}, about="reverse KL"),
    Method("self_distillation_jsd", _DISTILLED | {"divergence": "jsd"}, about="Jensen-Shannon divergence"),
    Method("self_distillation_sampled", _DISTILLED | {"distillation": "sampled"}, about="the response's tokens only"),
    Method("self_distillation_ema", _DISTILLED | {"teacher": "ema"}, about="the teacher is a moving average"),
    Method(
        "self_distillation_without_satisfactory",
        _DISTILLED | {"use_satisfactory_loss": False},
        about="without satisfactory responses",
    ),
    Method("self_distillation_shuffled", _DISTILLED, is_shuffled=True, about="control: other responses' judgments"),
    Method("redirect", _REDIRECTED, about='redirected: "Perfect.", strength 1, and unlikelihood'),
    Method("redirect_strength_0", _REDIRECTED | {"redirect_strength": 0.0}, about="strength 0: no judged context"),
    Method("redirect_strength_2", _REDIRECTED | {"redirect_strength": 2.0}, about="strength 2"),
    Method("redirect_advice", _REDIRECTED | {"teacher_context": "advice"}, about="the teacher gets advice"),
    Method(
        "redirect_without_unlikelihood", _REDIRECTED | {"use_unlikelihood_loss": False}, about="without unlikelihood"
    ),
    Method("redirect_with_l2", _REDIRECTED | {"use_judged_loss": True}, about="with CUT's L2 of judged records"),
    Method("redirect_shuffled", _REDIRECTED, is_shuffled=True, about="control: other responses' judgments"),
    Method("cut_frozen", _FROZEN, about="CUT with the frozen detector"),
    Method("cut_frozen_critiques", _FROZEN | {"critique_weight": 0.1}, about="also learns to judge its responses"),
    Method("cut_frozen_shuffled", _FROZEN, is_shuffled=True, about="control: other responses' judgments"),
)
# What may help if judgments are wrong; each keeps the learning rate of the method without it.
REMEDIES = (
    Method("cut_frozen_auto", _FROZEN | {"threshold": "auto"}, about="frozen detector, threshold auto"),
    Method(
        "cut_frozen_dropped",
        _FROZEN | {"drop_ineffective": True},
        about="frozen detector, without ineffective judgments",
    ),
    Method(
        "cut_frozen_weighed",
        _FROZEN | {"weigh_by_effect": True},
        about="frozen detector, records weighed by the effect of their judgment",
    ),
)


def find_method(name: str) -> Method:
    """The method with a name; what several tables show is the same in each."""
    return next(method for method in (*BASES, *METHODS, *ABLATIONS, *TEACHERS, *REMEDIES) if method.name == name)
