"""A model on an OpenAI-compatible server that answers in a chat, by server-sent events.

The conversation goes as messages, which the server puts into the model's own chat template, or as token ids of a prompt
that is made here.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from cutlm.blame.detector import FlagSettings, blame_record
from cutlm.blame.server import score_rows_by_server
from cutlm.blame.token_scores import TokenScores
from cutlm.chat.local import encode_texts
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.generation.local import Sampling
from cutlm.prompting.encoding import Encoder, choose_template
from cutlm.prompting.templates import TemplateName
from cutlm.servers.http import Refused, Unreachable, post_for_events, read_key, shorten_message
from cutlm.servers.requests import Server, explain_refusal

_END = "[DONE]"


class ServerEngine:
    """Answers by a server.

    Args:
        server: Whom to ask; an answer is asked for once.
        tokenizer: The model's, for prompts that are made here and for what a judgment blames; None for neither.
        template: Makes the prompts here; None leaves them to the server.
        sampling: How to draw.
        settings: What flags are made by.

    Raises:
        UserError: The tokenizer has no such template, or the key is none.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: Any,
        template: TemplateName | None,
        sampling: Sampling,
        settings: FlagSettings,
    ) -> None:
        self._server, self._tokenizer, self._sampling, self._settings = server, tokenizer, sampling, settings
        self._key = read_key()
        self.max_new_tokens = sampling.max_new_tokens
        self.template: TemplateName | None = None
        self._encoder: Encoder | None = None
        if template is not None:
            self.set_template(template)
        elif tokenizer is not None:
            self._encoder = Encoder(tokenizer, choose_template(tokenizer))

    def set_template(self, name: TemplateName) -> None:
        """See `Engine`."""
        if self._tokenizer is None:
            raise UserError(
                "/template: the server prompts the model by its own template; start with --tokenizer MODEL to make"
                " prompts here"
            )
        self._encoder = Encoder(self._tokenizer, name)
        self.template = name

    def prepare(self, texts: Sequence[str]) -> tuple[list[dict[str, str]] | list[int], int]:
        """See `Engine`. How much fits is the server's affair."""
        if self.template is not None:
            assert self._encoder is not None
            return encode_texts(self._encoder, texts), 0
        roles = ("user", "assistant")
        return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)], 0

    def answer(self, prompt: list[dict[str, str]] | list[int], seed_offset: int, show: Callable[[str], None]) -> bool:
        """See `Engine`."""
        is_chat = self.template is None
        endpoint = f"{self._server.root}/chat/completions" if is_chat else self._server.endpoint
        request = {
            "model": self._server.model,
            "messages" if is_chat else "prompt": prompt,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": self._sampling.max_new_tokens,
            "seed": (self._sampling.seed + seed_offset) % 2**31,
            "stream": True,
        }
        events = post_for_events(endpoint, request, key=self._key, timeout=self._server.timeout)
        reason = None
        try:
            with closing(events):
                for event in events:
                    if event == _END:
                        # Some servers give no reason.
                        return reason != "length"
                    text, finish = self._read_event(event, endpoint)
                    reason = finish or reason
                    if text:
                        show(text)
        except Refused as error:
            advice = "if the conversation is too long for the model, begin anew by /reset"
            if not is_chat:
                advice += "; if the server takes no token ids, start without --template"
            raise UserError(explain_refusal(self._server, endpoint, error, "the message", advice)) from None
        except Unreachable as error:
            raise UserError(f"{endpoint}: {error}; send the message again") from None
        if reason is None:
            raise UserError(f"{endpoint}: the answer breaks off; send the message again")
        return reason != "length"

    def _read_event(self, event: str, endpoint: str) -> tuple[str, str | None]:
        """The text of an event, and why the answer ends with it, if it does."""
        try:
            value = json.loads(event)
            if isinstance(value, dict) and "error" in value:
                raise UserError(f"{endpoint}: the server breaks off ({shorten_message(event, self._key)})")
            choices = value["choices"]
            if not choices:  # counts of tokens
                return "", None
            delta = choices[0].get("delta")
            text = choices[0].get("text") if delta is None else delta.get("content")
            finish = choices[0].get("finish_reason")
        except UserError:
            raise
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            text, finish = 0, None
        if not isinstance(text, str | None):
            raise UserError(
                f"{endpoint}: expected pieces of a completion in the server's events, got something else; give the"
                " address of an OpenAI-compatible server by --base_url"
            )
        return text or "", finish

    def blame(self, record: JudgedRecord) -> tuple[TokenScores, bool]:
        """See `Engine`."""
        if self._encoder is None:
            raise UserError("the model's tokenizer is needed to score its answers; start with --tokenizer MODEL")

        def score(rows: Any, done: Any) -> Any:
            return score_rows_by_server(self._server, rows, done=done, show_progress=False)

        return blame_record(record, self._encoder, score, self._settings, f"{self._server.endpoint}")
