"""What each objective sees of a judged record: the paper's section 3, one short function each.

A view makes of a record one response to be learned and the prompt (or two) before it. What is then learned from its
tokens is left to `cutlm.losses`; pairs for DPO are made by `cutlm.training.pairs`.
"""

from collections.abc import Callable

from cutlm.blame.token_scores import flag_spans
from cutlm.data.records import JudgedRecord
from cutlm.prompting.encoding import EncodedRecord, Encoder, view_both_contexts

_FORWARD_MARK = "\n\n### Judgment:\n"

View = Callable[[JudgedRecord, Encoder], EncodedRecord | str]


def view_praise_too(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
    """Both contexts of every record, satisfactory ones with the praise they got: what DualCUT learns from."""
    judged_ids = encoder.encode_prompt(record.full_instruction, record.stated_judgment)
    extra = {"is_praised": record.is_satisfactory}
    return EncodedRecord(
        encoder.encode_prompt(record.full_instruction), judged_ids, encoder.encode_response(record.output), extra
    )


def view_response(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
    """The response from the instruction, whatever was said about it (maximum likelihood)."""
    return EncodedRecord(encoder.encode_prompt(record.full_instruction), None, encoder.encode_response(record.output))


def view_satisfactory(record: JudgedRecord, encoder: Encoder) -> EncodedRecord | str:
    """Satisfactory responses only (rejection sampling)."""
    if not record.is_satisfactory:
        return "unsatisfactory, and satisfactory_only is on"
    return view_response(record, encoder)


def view_hindsight(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
    """The response from the instruction and the judgment it got (paper, section 3; Liu et al. 2023, arXiv 2302.02676).

    To be prompted for its best, such a model is given the judgment "Perfect.".
    """
    return EncodedRecord(
        encoder.encode_prompt(record.full_instruction, record.stated_judgment),
        None,
        encoder.encode_response(record.output),
    )


def view_forward(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
    """The response, then its judgment (forward prediction: Weston 2016, arXiv 1604.06045).

    An end-of-sequence token stands behind the response too, so that the model answers as it would without this.
    """
    ids = encoder.encode_response(record.output)
    ids += encoder.encode_response(_FORWARD_MARK + record.stated_judgment)
    return EncodedRecord(encoder.encode_prompt(record.full_instruction), None, ids)


def view_refinement(record: JudgedRecord, encoder: Encoder) -> EncodedRecord | str:
    """The improved response `i_ans`, or a satisfactory one as it is (ILF: Scheurer et al. 2023, arXiv 2303.16755)."""
    if record.is_satisfactory:
        return view_response(record, encoder)
    if not record.i_ans:
        return "unsatisfactory, and without an improved response in i_ans (cutlm refine makes them)"
    return EncodedRecord(encoder.encode_prompt(record.full_instruction), None, encoder.encode_response(record.i_ans))


def view_blamed_whole(weight: float) -> View:
    """Every token of an unsatisfactory response is unlearned, every satisfactory response learned."""

    def view(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
        encoded = view_response(record, encoder)
        num_tokens = 0 if record.is_satisfactory else len(encoded.response_ids)
        if num_tokens:
            encoded.extra.update(is_flagged=[True] * num_tokens, weights=[weight] * num_tokens)
        return encoded

    return view


def view_wrong_spans(weight: float) -> View:
    """Both contexts, and the tokens that a record's `wrong_spans` name in place of detected ones."""

    def view(record: JudgedRecord, encoder: Encoder) -> EncodedRecord | str:
        encoded = view_both_contexts(record, encoder)
        if record.is_satisfactory:
            return encoded
        if not record.wrong_spans:
            return "unsatisfactory, and without wrong_spans"
        is_flagged = flag_spans(encoder.locate_tokens(record.output, encoded.response_ids), record.wrong_spans)
        if not any(is_flagged):
            return "unsatisfactory, and its wrong_spans meet no token"
        encoded.extra.update(is_flagged=is_flagged, weights=[weight * flag for flag in is_flagged])
        return encoded

    return view


def choose_view(objective: str, detector: str | None, weight: float, satisfactory_only: bool) -> View:
    """The view of an objective.

    Args:
        objective: Its name in the settings.
        detector: "spans" takes CUT's flags from the records.
        weight: alpha, of the unlikelihood of a token that is blamed without a look at the model.
        satisfactory_only: Whether maximum likelihood leaves the others out.
    """
    if objective == "cut":
        return view_wrong_spans(weight) if detector == "spans" else view_both_contexts
    if objective == "likelihood" and satisfactory_only:
        return view_satisfactory
    return {
        "dual_cut": view_praise_too,
        "likelihood": view_response,
        "hindsight": view_hindsight,
        "forward_prediction": view_forward,
        "ilf_mle": view_refinement,
        "unlikelihood": view_blamed_whole(weight),
    }[objective]
