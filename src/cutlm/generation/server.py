"""Responses to a list of instructions, by a model on an OpenAI-compatible server, written down as they come.

The prompt is an instruction as a message, which the server puts into the model's own chat template (a merged model
carries that of training), or token ids of a prompt made here. A local model answers by `cutlm.generation.local`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cutlm.data.journal import Journal
from cutlm.errors import UserError
from cutlm.generation.local import Counts, Sampling
from cutlm.servers.http import Refused, Unreachable, hide_key, post_json, read_key
from cutlm.servers.requests import GivenUp, RefusedAlone, Server, ask_all, explain_refusal

# A message, or token ids.
Prompt = str | list[int]


@dataclass(frozen=True)
class _Answer:
    text: str
    is_unfinished: bool
    is_redacted: bool


class _Malformed(Exception):
    """JSON that is no completion."""


def generate_by_server(
    server: Server, prompts: Sequence[Prompt], sampling: Sampling, journal: Journal, *, show_progress: bool = True
) -> tuple[Counts, dict[int, str], int]:
    """Generates what a journal does not hold yet, and writes each response there as it comes.

    Args:
        server: Whom to ask.
        prompts: Each is asked for once.
        sampling: How to draw; each prompt has a seed of its own, for servers that heed it. `batch_size` is of no use.
        journal: Of this run or of one that was stopped.
        show_progress: Whether to show a progress bar.

    Returns:
        Counts and responses; why there is none, by the index of the prompt; and in how many the key was hidden.

    Raises:
        UserError: The server refuses all that it is asked. What was had before is in the journal.
    """
    key = read_key()
    counts, failures = Counts(), dict[int, str]()
    counts.take_over(journal)
    num_redacted = sum(line.get("is_redacted", False) for line in journal.lines)
    missing = [index for index in range(len(prompts)) if index not in counts.responses]

    def ask_one(place: int, stop: threading.Event) -> _Answer:
        return _ask(server, prompts[missing[place]], sampling, missing[place], key, stop)

    progress = tqdm(
        total=len(prompts),
        initial=counts.num_resumed,
        desc="generating",
        unit="response",
        disable=not show_progress,
    )
    with journal, progress:
        for place, result in ask_all(len(missing), ask_one, server.concurrency, is_answering=bool(counts.num_resumed)):
            index = missing[place]
            if isinstance(result, Refused):
                raise UserError(_explain_refusal(server, prompts[index], result, index))
            if isinstance(result, Unreachable | RefusedAlone | GivenUp | _Malformed):
                failures[index] = str(result)
                progress.set_postfix(failed=len(failures), refresh=False)
                continue
            if isinstance(result, BaseException):
                raise result
            flags = {"is_unfinished": result.is_unfinished, "is_redacted": result.is_redacted}
            journal.append([{"index": index, "output": result.text} | flags])
            num_redacted += result.is_redacted
            counts.responses[index] = result.text
            if result.is_unfinished:
                counts.unfinished.add(index)
            progress.update()
    return counts, failures, num_redacted


def _ask(
    server: Server, prompt: Prompt, sampling: Sampling, index: int, key: str | None, stop: threading.Event
) -> _Answer:
    request: dict[str, Any] = {
        "model": server.model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": (sampling.seed + index) % 2**31,
    }
    request |= {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else {"prompt": prompt}
    answer = post_json(
        _find_endpoint(server, prompt),
        request,
        key=key,
        timeout=server.timeout,
        max_retries=server.max_retries,
        stop=stop,
    )
    return _read_answer(answer, key)


def _find_endpoint(server: Server, prompt: Prompt) -> str:
    return f"{server.root}/chat/completions" if isinstance(prompt, str) else server.endpoint


def _explain_refusal(server: Server, prompt: Prompt, error: Refused, index: int) -> str:
    advice = "if the prompt is too long for the model, give a smaller --max_new_tokens"
    if not isinstance(prompt, str):
        advice += "; if the server takes no token ids, leave --template to it"
    return explain_refusal(server, _find_endpoint(server, prompt), error, f"prompt {index + 1}", advice)


def _read_answer(value: Any, key: str | None) -> _Answer:
    """Reads what is needed of a completion: no server keeps to all of its shape."""
    try:
        choice = value["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Malformed("expected choices[0] with a message or text in the server's answer, got none") from None
    if not isinstance(text, str | None):
        raise _Malformed("expected text in the server's answer, got something else")
    text = text or ""  # a model may say nothing
    shown = hide_key(text, key, is_content=True)
    return _Answer(shown, finish_reason == "length", is_redacted=shown != text)
