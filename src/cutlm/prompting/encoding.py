"""Tokenize prompts and responses, and turn records into training rows.

A response has the same token ids in both contexts (without and with the judgment), and they are the ids that the model
must produce after the prompt when it generates: the text is tokenized as a continuation of the prompt, ends with one
end-of-turn token and has no second beginning-of-sequence token. Special tokens spelled out in a user's or a model's
text are tokenized as plain text.

Texts are rendered one by one and tokenized in batches, which a tokenizer divides among its threads. A method for one
text is the one for a batch of one.
"""

import datetime
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cutlm.data.conversations import Conversation
from cutlm.data.records import JudgedRecord, join_problems
from cutlm.errors import ConfigError, DataError
from cutlm.prompting.spans import CONTINUATION_ANCHORS, Span, locate_tokens
from cutlm.prompting.templates import (
    ALPACA_TAIL,
    JUDGMENT_ROLES,
    ChatTemplate,
    JudgmentRole,
    Prompt,
    RenderError,
    TemplateName,
    add_advice,
    add_judgment,
    ask_for_refinement,
    build_alpaca_chat_template,
    fingerprint_template,
    list_template_sources,
    render_advised_prompt,
    render_alpaca_prompt,
    render_refinement_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")
R = TypeVar("R")
_ONE_TURN = "template: alpaca has one turn and no system prompt; use template: chat for conversations"
# A tokenizer cannot be called by two threads: its options are set for each call.
_calling = threading.RLock()


class Encoder:
    """Turns prompts and responses into token ids, with one tokenizer and one template.

    Under "chat", the tokenizer's chat template renders the conversation with this answer as a prompt and its response,
    through the token that ends the assistant's turn. The template's text between the generation prompt and the answer
    (a channel, an empty block of thoughts, a space) is the start of the response.

    Args:
        tokenizer: Any tokenizer of `transformers` with an end-of-sequence token.
        template: "alpaca", or "chat" for the tokenizer's own chat template.
        date: For chat templates that print today's date; None is today, once for all prompts.
        judgment_role: Who states the judgment under "chat": the user, at the end of the last turn, or the system, in a
            message after the conversation. Templates that render system messages only at the start have it there.

    Attributes:
        end_of_turn_id: The token that ends a response: that of the chat template, otherwise the end-of-sequence token.
        template_date: The date in the prompts, such as "2026-11-26"; None if they have none.

    Example:

        >>> encoder = Encoder(tokenizer, "chat")
        >>> ids = encoder.encode_prompt("Name a colour.") + encoder.encode_response("Mauve.")
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: TemplateName,
        date: datetime.date | None = None,
        judgment_role: JudgmentRole = "user",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if judgment_role not in JUDGMENT_ROLES:
            raise ConfigError(f"judgment_role: expected one of {', '.join(JUDGMENT_ROLES)}, got {judgment_role!r}")
        if judgment_role == "system" and template != "chat":
            raise ConfigError(f"judgment_role: system needs template: chat, got template: {template}")
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a model could not learn to"
                " stop; set tokenizer.eos_token and save it again"
            )
        self._has_backend = _has_backend(tokenizer)
        self._unk_id = tokenizer.unk_token_id  # a slow attribute, needed for every token
        self._leading_ids = _find_leading_ids(tokenizer)
        control = _find_control_tokens(tokenizer)
        self._control_tokens = list(control.values())
        self._control_ids = set(control) - {self._unk_id}  # usually an unknown character; see `_is_control`
        self._candidates = self._control_ids | {self._unk_id}
        self._texts = control
        self._restarts_after_special = _restarts_after_special(tokenizer)
        date = date or datetime.date.today()
        self._chat = ChatTemplate(tokenizer, date, self._control_tokens) if template == "chat" else None
        self.template_date = date.isoformat() if self._chat and self._chat.prints_date else None
        self._system_place = self._chat.find_system_place() if self._chat and judgment_role == "system" else None
        self.fingerprint = fingerprint_template(template, self._chat.sources if self._chat else [], judgment_role)
        tail = self._chat.answer_format.prompt if self._chat else ALPACA_TAIL
        tail_ids = self._tokenize(tail)
        # The text before an answer: the end of the prompt, and the template's text after the generation prompt.
        self._before = self._chat.answer_format.before if self._chat else tail
        before_ids = self._tokenize(self._before)
        num_prompt = _count_common(tail_ids, before_ids)
        self._prompt_ids, self._opening_ids = before_ids[:num_prompt], before_ids[num_prompt:]
        # White space at the end may be tokenized otherwise if a word follows.
        followed_ids = [self._tokenize(self._before + letter) for letter in "ab"]
        if followed_ids[0][:num_prompt] == self._prompt_ids:
            self._opening_ids = followed_ids[0][num_prompt : _count_common(*followed_ids)]
        self._num_dropped = len(tail_ids) - num_prompt
        self._opening = self._before[len(tail) :] if self._before.startswith(tail) else ""
        self._closing, self.end_of_turn_id = self._find_end_of_turn()

    def render(self, prompt: str | Conversation, judgment: str | None = None) -> Prompt:
        """Render a generation prompt as text, for an instruction or a conversation.

        Raises:
            RenderError: The template refuses it; the alpaca prompt has one turn.
        """
        conversation = Conversation.start(prompt) if isinstance(prompt, str) else prompt
        if self._chat and judgment is not None and self._system_place is not None:
            return self._chat.render_with_system_judgment(conversation, judgment, self._system_place)
        if self._chat:
            return self._chat.render(conversation if judgment is None else add_judgment(conversation, judgment))
        return render_alpaca_prompt(_get_single_turn(conversation), judgment)

    def encode_prompt(self, prompt: str | Conversation, judgment: str | None = None) -> list[int]:
        """Encode what precedes a response whose text is known, in training and scoring.

        It is the generation prompt, or its beginning if the template writes an answer in another place than where the
        generation prompt ends: that of a reasoning model may begin its thoughts.
        """
        return self.encode_prompts([self.render(prompt, judgment)])[0]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode rendered prompts as `encode_prompt` does."""
        return [ids[: len(ids) - self._num_dropped] for ids in self._encode_generation_prompts(prompts)]

    def encode_generation_prompt(self, prompt: str | Conversation, judgment: str | None = None) -> list[int]:
        """Encode a prompt as it is fed to the model for generation."""
        return self._encode_generation_prompts([self.render(prompt, judgment)])[0]

    def encode_refinement_prompt(self, prompt: str | Conversation, response: str, judgment: str) -> list[int]:
        """Encode the request to improve a response so that its judgment no longer applies, for generation."""
        conversation = Conversation.start(prompt) if isinstance(prompt, str) else prompt
        if self._chat:
            rendered = self._chat.render(ask_for_refinement(conversation, response, judgment))
        else:
            rendered = render_refinement_prompt(_get_single_turn(conversation), response, judgment)
        return self._encode_generation_prompts([rendered])[0]

    def encode_advised_prompt(
        self, prompt: str | Conversation, judgment: str, response: str | None = None, *, for_generation: bool = False
    ) -> list[int]:
        """Encode the request of a response without the problem that a judgment names.

        If the judged response is given, the request shows it, and is the request to refine it.
        """
        conversation = Conversation.start(prompt) if isinstance(prompt, str) else prompt
        if response is not None:
            ids = self.encode_refinement_prompt(conversation, response, judgment)
        elif self._chat:
            ids = self._encode_generation_prompts([self._chat.render(add_advice(conversation, judgment))])[0]
        else:
            ids = self._encode_generation_prompts([render_advised_prompt(_get_single_turn(conversation), judgment)])[0]
        return ids if for_generation else ids[: len(ids) - self._num_dropped]

    def describe_omissions(self, records: Iterable[JudgedRecord]) -> list[str]:
        """List the parts of the records' conversations that the chat template omits, such as tool calls."""
        conversations = (record.conversation for record in records if record.messages is not None)
        return self._chat.describe_omissions(conversations) if self._chat else []

    def check_conversation(self, conversation: Conversation, response: str) -> None:
        """Check that a conversation with its answer is rendered as its prompt and its response are.

        Raises:
            RenderError: The template writes something else before the answer than in a conversation of one turn.
        """
        if self._chat is None or conversation.is_single_turn:
            return
        before = self._chat.answer_format.before
        prompt = self.render(conversation).text.removesuffix(self._chat.answer_format.prompt)
        expected = prompt + before + self._chat.render_answer(response) + self._closing
        if not self._chat.render_answered(conversation, response).startswith(expected):
            raise RenderError(
                "template: chat: the tokenizer's chat template renders the last answer of this conversation otherwise"
                " than an answer to one message; use a conversation without tools or with fewer turns"
            )

    def _encode_generation_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        # A chat template writes its own beginning-of-sequence token.
        leading_ids = [] if self._chat else self._leading_ids
        return [leading_ids + ids for ids in self._tokenize_each(prompts)]

    def render_response(self, response: str) -> str:
        """Return a response as the template writes it.

        Raises:
            RenderError: The chat template refuses the response or renders another text.
        """
        return self._chat.render_answer(response) if self._chat else response

    def encode_response(self, response: str) -> list[int]:
        """Encode a response as the continuation of any prompt of this template, through the end-of-turn token.

        Raises:
            RenderError: The chat template refuses the response or renders another text.
        """
        return self.encode_responses([self.render_response(response)])[0]

    def encode_responses(self, rendered: Sequence[str]) -> list[list[int]]:
        """Encode rendered responses as `encode_response` does."""
        end = self._texts.get(self.end_of_turn_id, "") if self._chat else ""
        num_prompt = len(self._prompt_ids)
        frames = [self._frame(self._before, shown) for shown in rendered]
        encoded = self._tokenize_each([Prompt(text + end, spans) for text, spans in frames], num_prompt, bool(end))
        unended = [index for index, ids in enumerate(encoded) if not end or ids[-1] != self.end_of_turn_id]
        if end:
            for index, ids in zip(unended, self._tokenize_each([frames[index] for index in unended]), strict=True):
                encoded[index] = ids
        for index in unended:
            encoded[index] = [*encoded[index], self.end_of_turn_id]
        # The first characters of some merge with the last ones of the prompt. In generation the prompt's tokens are
        # fixed, so take the tokenization of the response alone that decodes to the same text.
        merged = [index for index, ids in enumerate(encoded) if ids[:num_prompt] != self._prompt_ids]
        alone = [self._frame(self._opening, rendered[index]) for index in merged]
        for index, (text, _), ids in zip(merged, alone, self._tokenize_each(alone), strict=True):
            joint, ids = encoded[index], [*ids, self.end_of_turn_id]
            if self.tokenizer.decode(self._prompt_ids + ids) != self.tokenizer.decode(joint):
                ids = [*self._tokenize_continuation(text), self.end_of_turn_id]
            encoded[index] = self._prompt_ids + ids
        return [ids[num_prompt:] for ids in encoded]

    def _frame(self, before: str, shown: str) -> Prompt:
        """A rendered response between what precedes it and what closes it."""
        return Prompt(before + shown + self._closing, [(len(before), len(before) + len(shown))])

    def remove_template_space(self, answer: str) -> str:
        """Remove the white space that the template writes before and after an answer from a generated one."""
        if self._opening.isspace():
            answer = answer.removeprefix(self._opening)
        return answer.removesuffix(self._closing)

    def count_template_tokens(self, response_ids: Sequence[int]) -> int:
        """Count the tokens at the start of a response that the template writes: a channel, an empty block of thoughts.

        These are learned like the others, but never flagged, because no judgment is about them.
        """
        return _count_common(self._opening_ids, response_ids)

    def locate_tokens(self, response: str, response_ids: list[int]) -> list[Span]:
        """Find the characters that each token of `encode_response(response)` covers; see `cutlm.prompting.spans`.

        Tokens that the template writes have empty spans at the start or the end of the response.
        """
        shown = self.render_response(response)
        num_opening = self.count_template_tokens(response_ids)
        known_ids = [*self._prompt_ids, *response_ids[:num_opening]]
        text, ids = shown + self._closing, response_ids[num_opening:-1]
        offset, length = response.find(shown), len(shown)
        spans = [(0, 0)] * num_opening
        with _calling:
            located = locate_tokens(self.tokenizer, self._before, known_ids, text, ids)
        spans += [(offset + min(start, length), offset + min(end, length)) for start, end in located]
        return [*spans, (len(response), len(response))]

    def fit(self, record: "EncodedRecord", max_length: int) -> "EncodedRecord | None":
        """Truncate prompts on the left, so that each has at most `max_length` tokens together with the response.

        Returns None if the response, which is never truncated, leaves no space for a prompt.
        """
        num_tokens = max_length - len(record.response_ids)
        if num_tokens < 1:
            return None
        judged_ids = record.judged_prompt_ids
        return replace(
            record,
            prompt_ids=self.truncate(record.prompt_ids, num_tokens),
            judged_prompt_ids=None if judged_ids is None else self.truncate(judged_ids, num_tokens),
            is_truncated=max(len(record.prompt_ids), len(judged_ids or ())) > num_tokens,
        )

    def fit_prompt(
        self, encode: Callable[[Conversation], list[int]], conversation: Conversation, num_tokens: int
    ) -> list[int]:
        """Encode a conversation in at most a number of tokens: without its oldest turns, and truncated on the left."""
        prompt_ids = encode(conversation)
        while len(prompt_ids) > num_tokens and (shorter := conversation.drop_oldest_turn()) is not None:
            conversation = shorter
            prompt_ids = encode(conversation)
        return self.truncate(prompt_ids, num_tokens)

    def truncate(self, ids: list[int], num_tokens: int) -> list[int]:
        """Truncate a prompt on the left to `num_tokens` tokens, keeping the beginning-of-sequence token.

        Models produce nonsense without that token.
        """
        if len(ids) <= num_tokens:
            return ids
        bos_id = self.tokenizer.bos_token_id
        leading_ids = [bos_id] if bos_id is not None and ids[0] == bos_id and num_tokens > 1 else []
        return leading_ids + ids[len(ids) - num_tokens + len(leading_ids) :]

    def build_chat_template(self) -> str | None:
        """Build the chat template with which other tools prompt a model as it was trained.

        Under "chat" it is the tokenizer's own. Under "alpaca" it gives exactly the ids of `encode_prompt` for one user
        turn; it is None if no such template does with this tokenizer, which training refuses.
        """
        if self._chat:
            return self.tokenizer.chat_template
        instruction = "Name a colour.\nJust one."
        expected = self.encode_prompt(instruction)
        leading = "".join(self.tokenizer.convert_ids_to_tokens(self._leading_ids))
        for gap in ("", " "):
            template = build_alpaca_chat_template(leading + gap if leading else "")
            options: Any = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
            if self.tokenizer.apply_chat_template([{"role": "user", "content": instruction}], **options) == expected:
                return template
        return None

    def _find_end_of_turn(self) -> tuple[str, int]:
        """Find the template's text after an answer: white space, and the token that ends the turn.

        It is the first control token after the answer. Some templates write none and mark only the next turn. Others
        close the answer with a separate token before they end the turn with the end-of-sequence token, in every turn.
        """
        if self._chat:
            answer_format = self._chat.answer_format
            for after in (answer_format.after, answer_format.after_in_history):
                rest = after.lstrip()
                found = [text for text in self._control_tokens if text and rest.startswith(text)]
                if found:
                    end, gap = max(found, key=len), after[: len(after) - len(rest)]
                    closed = gap + end
                    if all(
                        text.startswith(closed + self.tokenizer.eos_token)
                        for text in (answer_format.after, answer_format.after_in_history)
                    ):
                        return closed, self.tokenizer.eos_token_id
                    index = next(index for index, text in self._texts.items() if text == end)
                    return gap, index
        return "", self.tokenizer.eos_token_id

    def _tokenize(self, text: str, user_spans: Sequence[Span] = ()) -> list[int]:
        """Tokenize text without adding tokens.

        Under "chat", special tokens count as such outside of the spans written by a user or a model, and are plain text
        inside; under "alpaca" nothing is a special token.
        """
        return self._tokenize_each([Prompt(text, list(user_spans))])[0]

    def _tokenize_each(
        self, texts: Sequence[Prompt], num_frame: int = 0, has_frame_end: bool = False
    ) -> list[list[int]]:
        """Tokenize texts as `_tokenize` does, each different one once.

        The first `num_frame` tokens, and with `has_frame_end` the last one, are usually the template's own.
        """
        batch = list(dict.fromkeys(text for text, _ in texts))
        if not batch:
            return []
        if not self._chat:
            known = dict(zip(batch, self._tokenize_plain_each(batch), strict=True))
            return [known[text] for text, _ in texts]
        if not self.tokenizer.is_fast:
            for text, user_spans in texts:
                if any(token in text[start:end] for token in self._control_tokens for start, end in user_spans):
                    raise ConfigError(
                        "template: chat: a text spells out a special token, which only a fast tokenizer can keep as"
                        " plain text; use the model's fast tokenizer, or template: alpaca"
                    )
        known = dict(zip(batch, self._tokenize_batch(batch), strict=True))
        if not self.tokenizer.is_fast:
            return [known[text] for text, _ in texts]
        frame = self._prompt_ids[:num_frame] if num_frame else []
        encoded = []
        for text, user_spans in texts:
            ids = known[text]
            is_framed = ids[:num_frame] == frame and (not has_frame_end or ids[-1] == self.end_of_turn_id)
            own_ids = ids[num_frame : len(ids) - has_frame_end] if is_framed else ids
            if user_spans and not self._candidates.isdisjoint(own_ids):
                ids = self._keep_spelled(text, ids, self._call([text])[0].offsets, user_spans)
            encoded.append(ids)
        return encoded

    def _tokenize_batch(self, texts: list[str], *, is_plain: bool = False) -> list[list[int]]:
        """Tokenize texts of any author; under `is_plain` special tokens are plain text."""
        backend = self.tokenizer.backend_tokenizer if self._has_backend else None
        with _calling:
            if backend is None or backend.truncation or backend.padding:  # which a call by someone else has set
                return list(self._call(texts, is_plain=is_plain)["input_ids"])
            # Without offsets, which few texts need, and without the wrapper, it takes a seventh less time.
            backend.encode_special_tokens = is_plain or self.tokenizer.split_special_tokens
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _call(self, texts: list[str], *, is_plain: bool = False) -> Any:
        options: Any = {"split_special_tokens": True} if is_plain else {}
        options |= {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        with _calling:
            return self.tokenizer(texts, **options)

    def _keep_spelled(
        self, text: str, ids: list[int], offsets: Sequence[Span], user_spans: Sequence[Span]
    ) -> list[int]:
        """Tokenize again, as plain text, the spans in which a user or a model spelled out special tokens."""
        candidates = [index for index, token_id in enumerate(ids) if token_id in self._candidates]
        special = [index for index in candidates if self._is_control(ids[index], text, offsets[index])]
        located = {index: self._locate_control_token(ids[index], text, offsets[index]) for index in special}
        spelled = {}
        for index, (left, right) in located.items():
            span = next(((start, end) for start, end in user_spans if left < end and right > start), None)
            if span is not None:
                spelled[index] = span
        # Around each such span, everything between the template's own special tokens is tokenized again as plain text.
        frame = [index for index in special if index not in spelled]
        regions = set()
        for start, end in spelled.values():
            first = max((index + 1 for index in frame if located[index][1] <= start), default=0)
            regions.add((first, min((index for index in frame if located[index][0] >= end), default=len(ids))))
        result: list[int] = []
        num_done = 0
        for first, last in sorted(regions):
            left = offsets[first - 1][1] if first else 0
            right = offsets[last][0] if last < len(ids) else len(text)
            is_text_start = not first or self._restarts_after_special
            tokenize = self._tokenize_plain if is_text_start else self._tokenize_continuation
            result += [*ids[num_done:first], *tokenize(text[left:right])]
            num_done = last
        return [*result, *ids[num_done:]]

    def _is_control(self, token_id: int, text: str, span: Span) -> bool:
        """Whether a token is a special one; the unknown token is only if the text spells it out."""
        is_unknown_spelled = token_id == self._unk_id and text[slice(*span)].strip() == self.tokenizer.unk_token
        return is_unknown_spelled or token_id in self._control_ids

    def _locate_control_token(self, token_id: int, text: str, span: Span) -> Span:
        """Find a control token in its span, to which some tokens add the white space next to them."""
        content = self._texts.get(token_id, "")
        start = text.find(content, *span) if content else -1
        return span if start < 0 else (start, start + len(content))

    def _tokenize_plain(self, text: str) -> list[int]:
        """Tokenize text as plain text, even if it spells out special tokens."""
        return self._tokenize_plain_each([text])[0]

    def _tokenize_plain_each(self, texts: list[str]) -> list[list[int]]:
        return [
            self._split_special(text, ids)
            if not self._control_ids.isdisjoint(ids) or (self._unk_id in ids and self.tokenizer.unk_token in text)
            else ids
            for text, ids in zip(texts, self._tokenize_batch(texts, is_plain=True), strict=True)
        ]

    def _split_special(self, text: str, ids: list[int]) -> list[int]:
        """Tokenize text in two parts if it has special tokens even as plain text."""
        # Some tokenizers find special tokens even so: a unigram model has them in its vocabulary, and an added token
        # not marked as special is never split. Split the text in the middle of the first one.
        if self.tokenizer.is_fast:
            pairs = zip(ids, self._call([text], is_plain=True)[0].offsets, strict=True)
            spans = [span for token_id, span in pairs if self._is_control(token_id, text, span)]
        else:
            found = ((text.find(token), len(token)) for token in self._control_tokens)
            spans = [(start, start + length) for start, length in found if start >= 0]
        spans = [(start, end) for start, end in spans if end - start > 1]
        if not spans:
            return ids
        middle = sum(min(spans)) // 2
        return self._tokenize_plain(text[:middle]) + self._tokenize_continuation(text[middle:])

    def _tokenize_continuation(self, text: str) -> list[int]:
        """Tokenize text as plain text that continues a sentence, without a space before its first word."""
        for anchor in CONTINUATION_ANCHORS:
            anchor_ids = self._tokenize_batch([anchor])[0]
            joint = self._tokenize_plain(anchor + text)
            if joint[: len(anchor_ids)] == anchor_ids:
                return joint[len(anchor_ids) :]
        return self._tokenize_plain(text)


# Control tokens that a template may build from parts, such as '<|' + role + '|>'.
_CONTROL_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


def _find_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Find the tokens that only a template may write: special ones, and added ones that the chat template uses.

    Other added tokens, such as Gemma's HTML tags, are ordinary text.
    """
    source = "".join(list_template_sources(tokenizer)) if tokenizer.chat_template else ""
    control = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_used = text in source and len(text) > 1 and not text.isspace() and not text.isalnum()
        # Ordinary text does not swallow the white space next to it.
        if token.special or is_used or token.lstrip or token.rstrip or _CONTROL_SHAPE.fullmatch(text):
            control[index] = text
    return control | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _get_single_turn(conversation: Conversation) -> str:
    if conversation.is_single_turn:
        return conversation.instruction
    raise RenderError(_ONE_TURN)


def join_errors(problems: Sequence[tuple[str, str]]) -> DataError:
    """Make an error of problems with their locations; conversations that need another template share one line."""
    shared = [(location, problem) for location, problem in problems if problem == _ONE_TURN]
    others = [f"{location}: {problem}" for location, problem in problems if problem != _ONE_TURN]
    return DataError([f"{location}: {problem}" for location, problem in problems], shown=join_problems(shared) + others)


def encode_each(encode: Callable[[T], R], items: Sequence[T], locations: Sequence[str]) -> list[R]:
    """Encode items one by one.

    Raises:
        DataError: A chat template refuses some of them; all are named by their locations.
    """
    encoded, problems = [], []
    for item, location in zip(items, locations, strict=True):
        try:
            encoded.append(encode(item))
        except RenderError as error:
            problems.append((location, str(error)))
    if problems:
        raise join_errors(problems)
    return encoded


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def _has_backend(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether calling a tokenizer does nothing but call its backend of the library `tokenizers`."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    is_same = (
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(is_same)


def _find_leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Find the special tokens that a tokenizer puts before any text: usually a beginning-of-sequence token or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _restarts_after_special(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether text after a special token is tokenized like the start of a text (older SentencePiece conversions)."""
    joint = tokenizer(f"{tokenizer.eos_token}a", add_special_tokens=False)["input_ids"]
    return joint[1:] == tokenizer("a", add_special_tokens=False)["input_ids"]


def choose_template(tokenizer: "PreTrainedTokenizerBase") -> TemplateName:
    """Choose the template that a model was trained with, by the chat template saved with its tokenizer.

    If that is the alpaca prompt, "alpaca" gives the same prompts, and judged ones too.
    """
    is_alpaca = tokenizer.chat_template == Encoder(tokenizer, "alpaca").build_chat_template()
    return "alpaca" if is_alpaca and tokenizer.chat_template else "chat"


def describe_unused_template(tokenizer: "PreTrainedTokenizerBase", template: TemplateName) -> str | None:
    """Say that a model has a chat template, but is prompted as in the paper; None if it has none or it is used."""
    if template != "alpaca" or not tokenizer.chat_template or choose_template(tokenizer) == "alpaca":
        return None
    return "this model has a chat template, which is not used (template: alpaca); to use it, set template: chat"


@dataclass(frozen=True)
class RenderedRecord:
    """The texts of one record that are to be tokenized.

    Attributes:
        prompt: The prompt without the judgment, or the only prompt of a view.
        judged_prompt: The prompt with the judgment; None if there is only one context.
        response: The response as the template writes it.
        continuation: A second text that is learned after the response, with a separate end-of-turn token.
        extra: Further columns of the row.
        annotate: Makes further columns from the token ids of the response, or a reason to leave the record out; raises
            a DataError for a record that cannot be used.
    """

    prompt: Prompt
    judged_prompt: Prompt | None
    response: str
    continuation: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    annotate: Callable[[list[int]], dict[str, Any] | str] | None = None


@dataclass(frozen=True)
class EncodedRecord:
    """One record as token ids."""

    prompt_ids: list[int]  # the prompt without the judgment, or the only prompt of a view
    judged_prompt_ids: list[int] | None  # the prompt with the judgment; None if there is only one context
    response_ids: list[int]  # end-of-turn token included
    extra: dict[str, Any] = field(default_factory=dict)  # further columns of the row
    is_truncated: bool = False  # whether a prompt was truncated


# Selects the training data of a record or of an object with a record, such as token scores; a string is the reason why
# it is left out.
View = Callable[[Any, Encoder], RenderedRecord | str]


def get_record(item: Any) -> JudgedRecord:
    """The record of an object that has one, or the record itself."""
    return item if isinstance(item, JudgedRecord) else item.record


def encode_rendered(rendered: Sequence[RenderedRecord], encoder: Encoder) -> list[EncodedRecord]:
    """Encode the texts of records as one batch, without what `RenderedRecord.annotate` adds."""
    prompts = [prompt for one in rendered for prompt in (one.prompt, one.judged_prompt) if prompt is not None]
    texts = [text for one in rendered for text in (one.response, one.continuation) if text is not None]
    prompt_ids, response_ids = iter(encoder.encode_prompts(prompts)), iter(encoder.encode_responses(texts))
    encoded = []
    for one in rendered:
        plain_ids = next(prompt_ids)
        judged_ids = None if one.judged_prompt is None else next(prompt_ids)
        ids = next(response_ids)
        if one.continuation is not None:
            further = next(response_ids)
            ids = ids + further[encoder.count_template_tokens(further) :]
        encoded.append(EncodedRecord(plain_ids, judged_ids, ids, one.extra))
    return encoded


@dataclass
class EncodedBatch:
    """The rows of a batch of records, and the records left out; see `cutlm.prompting.rows.EncodedRecords`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # for each row, the index of its record in the batch
    num_satisfactory: int = 0
    num_truncated: int = 0
    left_out: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)  # location and sentence, of what cannot be encoded


def view_both_contexts(record: JudgedRecord, encoder: Encoder) -> RenderedRecord:
    """The response without the judgment and, if it is unsatisfactory, with it: the training data of CUT."""
    conversation = record.conversation
    return RenderedRecord(
        encoder.render(conversation),
        None if record.is_satisfactory else encoder.render(conversation, record.judgment),
        encoder.render_response(record.output),
    )


def _describe_too_long(record: JudgedRecord, max_length: int) -> str:
    what = "the response alone fills" if record.messages is None else "the last turn of the conversation exceeds"
    return f"{what} max_length {max_length}"


def encode_batch(
    records: Sequence[Any], locations: Sequence[str], encoder: Encoder, max_length: int, view: View
) -> EncodedBatch:
    """Encode one batch of records; see `cutlm.prompting.rows.encode_records`.

    Prompts that do not fit are truncated, those of conversations by whole turns, so that their system prompts stay.
    """
    batch = EncodedBatch()
    rows: dict[int, EncodedRecord | None] = {}
    skipped: dict[int, str] = {}
    problems: dict[int, list[str]] = {}
    pending = dict(enumerate(records))
    while pending:
        rendered: dict[int, RenderedRecord] = {}
        for index, item in pending.items():
            try:
                if item is records[index]:
                    encoder.check_conversation(get_record(item).conversation, get_record(item).output)
                viewed = view(item, encoder)
            except RenderError as error:
                problems[index] = error.problems
                continue
            if isinstance(viewed, str):
                skipped[index] = viewed
            else:
                rendered[index] = viewed
        shortened = {}
        for index, row in zip(rendered, encode_rendered([*rendered.values()], encoder), strict=True):
            item, fitted = pending[index], encoder.fit(row, max_length)
            if get_record(item).messages is None or (fitted is not None and not fitted.is_truncated):
                is_shortened = item is not records[index]
                rows[index] = replace(fitted, is_truncated=True) if fitted is not None and is_shortened else fitted
            elif (shorter := item.drop_oldest_turn()) is None:
                rows[index] = None
            else:
                shortened[index] = shorter
                continue
            annotate = rendered[index].annotate
            try:
                extra = annotate(row.response_ids) if annotate else {}
            except DataError as error:
                problems[index] = error.problems
                continue
            if isinstance(extra, str):
                skipped[index] = extra
                del rows[index]
            elif (found := rows[index]) is not None:
                rows[index] = replace(found, extra=found.extra | extra)
        pending = shortened
    batch.problems = [(locations[index], problem) for index in sorted(problems) for problem in problems[index]]
    batch.skipped.update(skipped[index] for index in sorted(skipped))
    for index in sorted(rows):
        record, location, fitted = get_record(records[index]), locations[index], rows[index]
        if fitted is None:
            batch.left_out.append(f"{location}: {_describe_too_long(record, max_length)}; left out")
            continue
        batch.num_truncated += fitted.is_truncated
        batch.num_satisfactory += record.is_satisfactory
        batch.indices.append(index)
        columns: dict[str, Any] = {"prompt_ids": fitted.prompt_ids, "judged_prompt_ids": fitted.judged_prompt_ids}
        columns |= {"response_ids": fitted.response_ids, "location": location}
        columns["is_satisfactory"] = record.is_satisfactory
        if num_template_tokens := encoder.count_template_tokens(fitted.response_ids):
            columns["num_template_tokens"] = num_template_tokens
        batch.rows.append(columns | fitted.extra)
    return batch
