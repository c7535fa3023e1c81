"""A chat engine for a model on an OpenAI-compatible server, which streams its answers.

The conversation is sent as messages, which the server puts into the model's own chat template, or as token ids of a
prompt encoded here.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from cutlm.chat.local import encode_texts
from cutlm.chat.session import remark
from cutlm.data.records import JudgedRecord
from cutlm.errors import UserError
from cutlm.flagging.detector import FlagSettings, blame_record
from cutlm.flagging.server import score_rows_by_server
from cutlm.flagging.token_scores import TokenScores
from cutlm.generation.local import NUM_TAIL_TOKENS, Sampling
from cutlm.prompting.encoding import Encoder, choose_template
from cutlm.prompting.reasoning import find_open_thoughts
from cutlm.prompting.templates import JudgmentRole, TemplateName, make_messages
from cutlm.servers.client import Client, Refused, RequestFailed, Server


class ServerEngine:
    """An `Engine` for a model on a server."""

    def __init__(
        self,
        server: Server,
        tokenizer: Any,  # the model's, needed to encode prompts here and to flag tokens; None for neither
        template: TemplateName | None,  # encodes prompts here; None leaves that to the server
        sampling: Sampling,
        settings: FlagSettings,
        judgment_role: JudgmentRole = "user",
    ) -> None:
        self._judgment_role = judgment_role
        self._client, self._tokenizer, self._sampling, self._settings = Client(server), tokenizer, sampling, settings
        self.max_new_tokens = sampling.max_new_tokens
        self.template: TemplateName | None = None
        self._encoder: Encoder | None = None
        if template is not None:
            self.set_template(template)
        elif tokenizer is not None:
            self._encoder = Encoder(tokenizer, choose_template(tokenizer), judgment_role=judgment_role)

    def set_template(self, name: TemplateName) -> None:
        if self._tokenizer is None:
            raise UserError(
                "/template: the server uses the model's own template; start with --tokenizer MODEL to encode prompts"
                " here"
            )
        self._encoder = Encoder(self._tokenizer, name, judgment_role=self._judgment_role)
        self.template = name

    def prepare(self, texts: Sequence[str]) -> tuple[list[dict[str, str]] | list[int], int]:
        """Never drops turns, because the length of the context is not known."""
        if self.template is not None:
            assert self._encoder is not None
            return encode_texts(self._encoder, texts), 0
        return make_messages(texts), 0

    def answer(self, prompt: list[dict[str, str]] | list[int], seed_offset: int, show: Callable[[str], None]) -> bool:
        client, sampling = self._client, self._sampling
        has_reasoning = has_text = is_truncated = False
        if self._tokenizer is not None and self.template is not None:
            show(find_open_thoughts(str(self._tokenizer.decode(prompt[-NUM_TAIL_TOKENS:]))))
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        body = client.server.make_body(prompt, **options, seed=(sampling.seed + seed_offset) % 2**31)
        try:
            with closing(client.stream(body)) as pieces:
                for piece in pieces:
                    is_truncated = piece.is_truncated
                    if piece.reasoning and not has_reasoning:
                        has_reasoning = True
                        remark("the model reasons before it answers")
                    # vLLM's parsers of reasoning leave the line breaks after it to the answer.
                    text = piece.text.lstrip() if has_reasoning and not has_text else piece.text
                    if text:
                        has_text = True
                        show(text)
        except Refused as error:
            advice = "if the conversation is too long for the model, start a new one by /reset"
            if self.template is not None:
                advice += "; if the server does not accept token ids, start without --template"
            raise client.explain_refusal(error, "the message", advice) from None
        except RequestFailed as error:
            raise UserError(f"{client.server.url}: {error}; send the message again") from None
        if has_reasoning and not has_text and not is_truncated:
            raise UserError(f"{client.server.url}: the model reasons and gives no answer; send the message again")
        return not is_truncated

    def blame(self, record: JudgedRecord) -> tuple[TokenScores, bool]:
        if self._encoder is None:
            raise UserError("blaming needs the model's tokenizer; start with --tokenizer MODEL")

        def score(rows: Any, done: Any) -> Any:
            return score_rows_by_server(self._client, rows, done=done, show_progress=False)

        return blame_record(record, self._encoder, score, self._settings, self._client.server.url)
