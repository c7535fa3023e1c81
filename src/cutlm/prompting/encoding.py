"""Records to token ids: the prompt without and with the judgment, and one response that follows both.

The response's tokens are the same in both contexts and are those that the model has to produce after the prompt
when it generates: the text is split as a continuation of the prompt, ends with one end-of-sequence token and
starts with no second beginning-of-sequence. Special tokens that a user's text spells out are plain text here.
Batching is left to `cutlm.model.collator`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cutlm.data.records import JudgedRecord
from cutlm.errors import ConfigError
from cutlm.prompting.spans import locate_tokens
from cutlm.prompting.templates import (
    Prompt,
    TemplateName,
    build_alpaca_chat_template,
    render_alpaca_prompt,
    render_chat_conversation,
    render_chat_prompt,
    render_chat_refinement_prompt,
    render_refinement_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedRecord:
    """One record as token ids.

    Attributes:
        prompt_ids: The prompt without the judgment, or the only one that a view has.
        judged_prompt_ids: The prompt with the judgment; None where one context is enough.
        response_ids: The response, end-of-sequence included.
        extra: Further columns of the row.
        is_truncated: Whether a prompt was cut from the left to fit.
    """

    prompt_ids: list[int]
    judged_prompt_ids: list[int] | None
    response_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    is_truncated: bool = False


@dataclass
class EncodedRecords:
    """All records of a data set that could be encoded, as rows, and what became of the rest.

    Attributes:
        rows: Dictionaries with `prompt_ids`, `judged_prompt_ids`, `response_ids`, `place`, `is_satisfactory` and
            what else a view adds.
        indices: For each row, the index of its record.
        num_truncated: Records of which a prompt was cut from the left.
        left_out: A sentence for each record left out for its length.
        skipped: How many records a view leaves out, by its reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    num_truncated: int = 0
    left_out: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def num_left_out(self) -> int:
        return len(self.left_out) + self.skipped.total()

    def describe_left_out(self) -> list[str]:
        """A sentence for each reason of a view, and for each record that is too long."""
        return [f"{num} records left out: {reason}" for reason, num in self.skipped.items()] + self.left_out

    def describe(self, max_length: int) -> str:
        """One line of counts, fit to be printed."""
        num_satisfactory = sum(row["is_satisfactory"] for row in self.rows)
        return (
            f"{len(self.rows)} records encoded ({num_satisfactory} satisfactory,"
            f" {len(self.rows) - num_satisfactory} unsatisfactory); {self.num_truncated} prompts truncated on the"
            f" left to fit max_length {max_length}; {self.num_left_out} records left out"
        )


class Encoder:
    """Encodes prompts and responses with one tokenizer and one template.

    Args:
        tokenizer: Any tokenizer of `transformers`.
        template: "alpaca", or "chat" for the tokenizer's own chat template.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token, or no chat template under "chat".
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: TemplateName) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so that a model could never"
                " learn to stop; set tokenizer.eos_token and save it again"
            )
        self._leading_ids = _find_leading_ids(tokenizer)
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._special_tokens = list(special.values())
        special.pop(tokenizer.unk_token_id, None)  # most of these are unknown characters, which are no order to a model
        self._special_ids = set(special)
        self._splits_like_start_after_special = _splits_like_start_after_special(tokenizer)
        self._tail = self.render("x").tail
        self._tail_ids = self._split(self._tail)

    def render(self, instruction: str, judgment: str | None = None) -> Prompt:
        """The prompt as text."""
        if self.template == "alpaca":
            return render_alpaca_prompt(instruction, judgment)
        return render_chat_prompt(self.tokenizer, instruction, judgment)

    def encode_prompt(self, instruction: str, judgment: str | None = None) -> list[int]:
        """Token ids of a prompt, as they are fed to the model when it generates."""
        return self._encode_prompt(self.render(instruction, judgment))

    def encode_refinement_prompt(self, instruction: str, response: str, judgment: str) -> list[int]:
        """Token ids of the request to rewrite a response so that its judgment no longer holds."""
        if self.template == "alpaca":
            return self._encode_prompt(render_refinement_prompt(instruction, response, judgment))
        return self._encode_prompt(render_chat_refinement_prompt(self.tokenizer, instruction, response, judgment))

    def encode_conversation(self, texts: Sequence[str]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, as they are fed to the model when it generates.

        Args:
            texts: What was said, by the user and the model in turn; the last is the user's. Special tokens that any of
                them spells out are plain text.
        """
        assert self.template == "chat", "the alpaca prompt has no turns"
        return self._split(*render_chat_conversation(self.tokenizer, texts))

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        if self.template == "alpaca":
            return self._leading_ids + self._split(prompt.text)
        # A chat template writes its own beginning-of-sequence.
        return self._split(prompt.text, [(prompt.content_start, prompt.content_end)])

    def encode_response(self, response: str) -> list[int]:
        """Token ids of a response as the continuation of any prompt of this template, end-of-sequence included."""
        joint = self._split(self._tail + response, [(len(self._tail), len(self._tail) + len(response))])
        num_tail = len(self._tail_ids)
        if joint[:num_tail] == self._tail_ids:
            ids = joint[num_tail:]
        else:
            ids = self._split_after_boundary(response, joint)
        return [*ids, self.tokenizer.eos_token_id]

    def locate_tokens(self, response: str, response_ids: list[int]) -> list[tuple[int, int]]:
        """The characters of `response` that each token of `encode_response(response)` stands for.

        White space around a token's characters is left out, so " word" spans "word"; a token of white space alone
        keeps it. Each token of a character of several tokens spans the whole character. Starts and ends never go back,
        and every character but white space lies in a span.

        Args:
            response: The response.
            response_ids: Its token ids, end-of-sequence included, whose span is the empty one at the very end.
        """
        spans = locate_tokens(self.tokenizer, self._tail, self._tail_ids, response, response_ids[:-1])
        return [*spans, (len(response), len(response))]

    def _split_after_boundary(self, response: str, joint: list[int]) -> list[int]:
        """Splits a response whose first characters would merge with the prompt's last ones.

        When generating, the prompt's tokens stand; so of the ways to split the response alone, the one is taken that
        reads as the joint text.
        """
        text = self.tokenizer.decode(joint)
        for ids in (self._split_plain(response), self._continue_plain(response)):
            if self.tokenizer.decode(self._tail_ids + ids) == text:
                return ids
        return ids

    def encode_record(self, record: JudgedRecord, max_length: int) -> EncodedRecord | None:
        """Encodes a record, its prompts cut from the left to fit.

        Args:
            record: The record.
            max_length: Most tokens of a prompt and the response together.

        Returns:
            None where the response, which is never cut, leaves no room for a prompt.
        """
        return self.fit(view_both_contexts(record, self), max_length)

    def fit(self, record: EncodedRecord, max_length: int) -> EncodedRecord | None:
        """Cuts an encoded record's prompts from the left to fit; None where the response leaves them no room."""
        room = max_length - len(record.response_ids)
        if room < 1:
            return None
        judged_ids = record.judged_prompt_ids
        is_truncated = len(record.prompt_ids) > room or (judged_ids is not None and len(judged_ids) > room)
        return replace(
            record,
            prompt_ids=self.truncate(record.prompt_ids, room),
            judged_prompt_ids=None if judged_ids is None else self.truncate(judged_ids, room),
            is_truncated=is_truncated,
        )

    def truncate(self, ids: list[int], room: int) -> list[int]:
        """Cuts a prompt from the left; a beginning-of-sequence token stays, for models are lost without it."""
        if len(ids) <= room:
            return ids
        bos_id = self.tokenizer.bos_token_id
        if bos_id is not None and ids[0] == bos_id and room > 1:
            return [bos_id, *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]

    def build_chat_template(self) -> str | None:
        """The chat template by which other tools give a model the prompts it was trained with.

        Returns:
            The tokenizer's own under "chat". Under "alpaca" one that gives exactly `encode_prompt`'s ids for one
            user turn; None if this tokenizer splits no such template's text the same way.
        """
        if self.template == "chat":
            return self.tokenizer.chat_template
        probe = "Name a colour.\nJust one."
        expected = self.encode_prompt(probe)
        has_bos = bool(self._leading_ids)
        for gap in ("", " "):
            template = build_alpaca_chat_template(has_bos, gap)
            got = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": probe}],
                chat_template=template,
                add_generation_prompt=True,
                return_dict=False,
            )
            if got == expected:
                return template
        return None

    def _split(self, text: str, plain_spans: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Splits text into token ids, adding nothing.

        Args:
            text: The text.
            plain_spans: Characters written by a user or a model, in order. Under "chat", special tokens count as such
                outside of them and as plain text inside; under "alpaca" nothing is a special token.
        """
        if self.template == "alpaca":
            return self._split_plain(text)
        if not self.tokenizer.is_fast:
            if any(token in text[start:end] for token in self._special_tokens for start, end in plain_spans):
                raise ConfigError(
                    "template: chat: a text spells out a special token, which only a fast tokenizer can keep plain;"
                    " use the model's fast tokenizer, or template: alpaca"
                )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        locations = [place for place, index in enumerate(ids) if self._is_special(index, text, offsets[place])]
        spelled = {
            place: (start, end)
            for place in locations
            for start, end in plain_spans
            if offsets[place][0] < end and offsets[place][1] > start
        }
        # All from the template's last special token before such a text to its first one after it is plain text.
        frame = [place for place in locations if place not in spelled]
        regions = {
            (
                max((place + 1 for place in frame if offsets[place][1] <= start), default=0),
                min((place for place in frame if offsets[place][0] >= end), default=len(ids)),
            )
            for start, end in spelled.values()
        }
        split: list[int] = []
        reached = 0
        for first, last in sorted(regions):
            left = offsets[first - 1][1] if first else 0
            right = offsets[last][0] if last < len(ids) else len(text)
            is_fresh = not first or self._splits_like_start_after_special
            plain = self._split_plain(text[left:right]) if is_fresh else self._continue_plain(text[left:right])
            split += [*ids[reached:first], *plain]
            reached = last
        return [*split, *ids[reached:]]

    def _is_special(self, index: int, text: str, span: tuple[int, int]) -> bool:
        """Whether a token is an order to the model: a special one, the unknown one only where it is spelled out."""
        if index == self.tokenizer.unk_token_id:
            return text[slice(*span)].strip() == self.tokenizer.unk_token
        return index in self._special_ids

    def _split_plain(self, text: str) -> list[int]:
        """Splits text in which nothing is a special token, whatever it spells out."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        is_unknown_spelled = self.tokenizer.unk_token_id in ids and self.tokenizer.unk_token in text
        if self._special_ids.isdisjoint(ids) and not is_unknown_spelled:
            return ids
        # Some tokenizers find them all the same: a unigram model has them among its words, and an added token that is
        # not marked as special is always taken whole. They are split in the middle.
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )["offset_mapping"]
            spans = [span for index, span in zip(ids, offsets, strict=True) if self._is_special(index, text, span)]
        else:
            spans = [
                (text.find(token), text.find(token) + len(token)) for token in self._special_tokens if token in text
            ]
        spans = [(start, end) for start, end in spans if end - start > 1]
        if not spans:
            return ids
        start, end = min(spans)
        middle = (start + end) // 2
        return self._split_plain(text[:middle]) + self._continue_plain(text[middle:])

    def _continue_plain(self, text: str) -> list[int]:
        """Splits text from the middle of a sentence: no space before its first word."""
        for anchor in ("\n", ":", "a"):
            anchor_ids = self.tokenizer(anchor, add_special_tokens=False)["input_ids"]
            joint = self._split_plain(anchor + text)
            if joint[: len(anchor_ids)] == anchor_ids:
                return joint[len(anchor_ids) :]
        return self._split_plain(text)


def _find_leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens a tokenizer puts before any text: usually one beginning-of-sequence, or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def view_both_contexts(record: JudgedRecord, encoder: Encoder) -> EncodedRecord:
    """The response without the judgment and, where it is unsatisfactory, with it: what CUT learns from."""
    instruction = record.full_instruction
    return EncodedRecord(
        encoder.encode_prompt(instruction),
        None if record.is_satisfactory else encoder.encode_prompt(instruction, record.judgment),
        encoder.encode_response(record.output),
    )


def encode_records(
    records: Sequence[JudgedRecord],
    locations: Sequence[str],
    encoder: Encoder,
    max_length: int,
    view: Callable[[JudgedRecord, Encoder], EncodedRecord | str] = view_both_contexts,
) -> EncodedRecords:
    """Encodes records; what does not fit is named, not dropped in silence.

    Args:
        records: The records.
        locations: Where each stands, for messages: `data.jsonl:17`.
        encoder: Tokenizer and template.
        max_length: Most tokens of a prompt and the response together.
        view: What of a record is learned from (`cutlm.training.views`); a text instead says why a record is left out.
    """
    encoded = EncodedRecords()
    for index, (record, place) in enumerate(zip(records, locations, strict=True)):
        viewed = view(record, encoder)
        if isinstance(viewed, str):
            encoded.skipped[viewed] += 1
            continue
        row = encoder.fit(viewed, max_length)
        if row is None:
            encoded.left_out.append(f"{place}: the response alone fills max_length {max_length}; left out")
            continue
        encoded.num_truncated += row.is_truncated
        encoded.indices.append(index)
        encoded.rows.append(
            {
                "prompt_ids": row.prompt_ids,
                "judged_prompt_ids": row.judged_prompt_ids,
                "response_ids": row.response_ids,
                "location": place,
                "is_satisfactory": record.is_satisfactory,
                **row.extra,
            }
        )
    names = {name for row in encoded.rows for name in row}
    # A table takes its columns from the first row.
    encoded.rows = [dict.fromkeys(sorted(names)) | row for row in encoded.rows]
    return encoded


def _splits_like_start_after_special(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether text behind a special token is split like the start of a text (older SentencePiece conversions)."""
    special = tokenizer.eos_token
    joint = tokenizer(f"{special}a", add_special_tokens=False)["input_ids"]
    return joint[1:] == tokenizer("a", add_special_tokens=False)["input_ids"]


def choose_template(tokenizer: "PreTrainedTokenizerBase") -> TemplateName:
    """The template that a model with this tokenizer was trained with, by the chat template that is saved with it.

    One that is the alpaca prompt knows nothing of judgments: "alpaca" then gives the same prompts, and judged ones too.
    """
    is_alpaca = tokenizer.chat_template == Encoder(tokenizer, "alpaca").build_chat_template()
    return "alpaca" if is_alpaca and tokenizer.chat_template else "chat"
