"""Sensitivity: pairs of records, and the numbers by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer

from cutlm.data.records import JudgedRecord
from cutlm.flagging.sensitivity import Contrast, compute_sensitivity, encode_context, pair_foreign
from cutlm.prompting.encoding import Encoder
from cutlm.prompting.rows import encode_records

# ---- Pairs ----

JUDGMENTS = st.lists(st.sampled_from(["Too long.", "Wrong.", "Rude.", "No.", "Vague."]), max_size=40)


@given(JUDGMENTS, st.integers(0, 5))
def test_each_record_gets_a_judgment_with_another_text(judgments: list[str], seed: int) -> None:
    pairs = pair_foreign(judgments, seed)
    if len(set(judgments)) < 2:
        assert pairs == []
        return
    assert len(pairs) == len(judgments)
    assert all(judgments[index] != judgments[source] for index, source in enumerate(pairs))
    uses = Counter(pairs)
    num_largest = max(Counter(judgments).values())
    if 2 * num_largest <= len(judgments):
        assert sorted(pairs) == list(range(len(judgments))), "each judgment is used once"
    else:  # the rare judgments are used equally often, up to one
        rare = [uses[index] for index, text in enumerate(judgments) if Counter(judgments)[text] < num_largest]
        assert max(rare) - min(rare) <= 1


def test_pairs_depend_on_the_seed_only() -> None:
    judgments = [f"Fault {number}." for number in range(50)]
    assert pair_foreign(judgments, 1) == pair_foreign(judgments, 1) != pair_foreign(judgments, 2)


def test_white_space_and_case_do_not_make_another_judgment() -> None:
    assert pair_foreign(["Too long.", " too  long.\n"]) == []


# ---- Numbers ----


def test_flag_signal_and_pairwise_by_hand() -> None:
    # log 1.1 = 0.095: a token is flagged if its log-probability rises by more.
    first = Contrast([-1.0, -1.0, -1.0, -1.0], own=[-0.5, -0.8, -1.0, -2.0], foreign=[-0.95, -0.8, -1.0, -1.0])
    second = Contrast([-1.0, -1.0], own=[-0.8, -0.7], foreign=[-0.6, -1.0])
    found = compute_sensitivity([first, second], threshold=1.1)
    assert found is not None
    assert found.num_records == 2
    # Own: tokens 1 and 2 of the first, both of the second; foreign: token 2 of the first, token 1 of the second.
    assert found.flagged_share_own == pytest.approx((2 + 2) / (4 + 2))
    assert found.flagged_share_foreign == pytest.approx((1 + 1) / (4 + 2))
    assert found.flag_signal == pytest.approx(1 - 2 / 4)
    # The largest rise: 0.5 against 0.2 in the first; 0.3 against 0.4 in the second.
    assert found.pairwise == 1 / 2


def test_the_threshold_decides_what_is_flagged() -> None:
    contrast = Contrast([-1.0, -1.0], own=[-0.5, -0.9], foreign=[-0.9, -1.0])
    at_2 = compute_sensitivity([contrast], threshold=1.5)  # log 1.5 = 0.405
    assert at_2 is not None
    assert (at_2.flagged_share_own, at_2.flagged_share_foreign, at_2.flag_signal) == (1 / 2, 0, 1)


def test_foreign_judgments_that_flag_more_give_a_negative_signal() -> None:
    found = compute_sensitivity([Contrast([-1.0] * 3, own=[-0.5, -1, -1], foreign=[-0.5, -0.5, -1])], threshold=1.1)
    assert found is not None
    assert found.flag_signal == 1 - 2 / 1
    assert found.pairwise == 0, "a tie, 0.5 and 0.5, does not count"
    assert found.describe_noise()


def test_tokens_of_the_template_do_not_count() -> None:
    plain = Contrast([-1.0, -1.0], own=[-0.5, -1.0], foreign=[-0.9, -1.0])
    opened = Contrast([-3.0, *plain.without], own=[-0.1, *plain.own], foreign=[-0.2, *plain.foreign])
    expected = compute_sensitivity([plain], threshold=1.1)
    assert compute_sensitivity([opened._replace(num_template_tokens=1)], threshold=1.1) == expected
    assert compute_sensitivity([opened], threshold=1.1) != expected


def test_without_a_flag_or_a_record_there_is_no_signal() -> None:
    assert compute_sensitivity([], threshold=1.1) is None
    found = compute_sensitivity([Contrast([-1.0], own=[-1.0], foreign=[-0.5])], threshold=1.1)
    assert found is not None
    assert found.flag_signal is None
    assert found.describe_noise()


@pytest.mark.parametrize(("num_foreign", "is_noise"), [(8, True), (7, False), (0, False)])
def test_flags_are_called_noise_below_a_signal_of_three_tenths(num_foreign: int, is_noise: bool) -> None:
    num = 10
    foreign = [-0.5] * num_foreign + [-1.0] * (num - num_foreign)
    found = compute_sensitivity([Contrast([-1.0] * num, own=[-0.4] * num, foreign=foreign)], threshold=1.1)
    assert found is not None
    assert found.flag_signal == pytest.approx(1 - num_foreign / num)
    assert (found.describe_noise() is not None) == is_noise


def test_a_foreign_context_of_a_long_conversation_loses_whole_turns() -> None:
    tokenizer = make_tokenizer("bpe", chat=True)
    encoder = Encoder(tokenizer, "chat")
    turns = [{"role": role, "content": f"Turn {n}."} for n in range(9) for role in ("user", "assistant")]
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {
            "messages": [
                system,
                *turns,
                {"role": "user", "content": "Name it."},
                {"role": "assistant", "content": "It."},
            ]
        },
        {"instruction": "Name it.", "output": "It."},
    ]
    records = [
        JudgedRecord.model_validate(row | {"judgment": text})
        for row, text in zip(rows, ("Wrong.", "Far too short."), strict=True)
    ]
    max_length = len(encoder.encode_prompt(records[0].conversation)) // 2
    encoded = encode_records(records, ["a:1", "a:2"], encoder, max_length)
    context = encode_context(0, 1, encoded.rows, records, encoder, max_length)
    assert len(context.prompt_ids) + len(encoded.rows[0]["response_ids"]) <= max_length
    text = tokenizer.decode(context.prompt_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTurn ")
    assert "Far too short." in text
    assert "Turn 0." not in text
