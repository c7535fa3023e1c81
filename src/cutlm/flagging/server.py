"""Log-probabilities of responses from a server that returns those of a prompt's own tokens, as vLLM does.

Each context is sent as one prompt of token ids, the response included, with `prompt_logprobs: 0`.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from cutlm.errors import UserError
from cutlm.flagging.scoring import Scored, count_tokens
from cutlm.servers.client import NOT_SENT, Client, RequestFailed

_ADVICE = "if the prompt is too long for the server, set a smaller --max_length"


def score_rows_by_server(
    client: Client, rows: Sequence[Mapping[str, Any]], *, done: Collection[int] = (), show_progress: bool = True
) -> Generator[list[Scored], None, None]:
    """Score the responses of encoded rows, several at a time, the longest first.

    Each row has a `location` as well. The indices in `done` are left out. Yield one row at a time, when it is
    finished.

    Raises:
        UserError: The server refuses every request or does not return log-probs, or some rows failed after all
            retries; the others are yielded before.
    """
    order = sorted(set(range(len(rows))) - set(done), key=lambda index: (-count_tokens(rows[index]), index))

    def ask(number: int) -> Scored:
        row = rows[order[number]]
        response_ids, judged_ids = row["response_ids"], row["judged_prompt_ids"]
        without = _score(client, row["prompt_ids"], response_ids)
        return Scored(order[number], without, None if judged_ids is None else _score(client, judged_ids, response_ids))

    failed: dict[int, RequestFailed] = {}
    locations = [rows[index]["location"] for index in order]
    options: Any = {} if show_progress else {"disable": True}  # an explicit False would override TQDM_DISABLE
    with tqdm(total=len(rows), initial=len(done), desc="blaming", unit="record", **options) as progress:
        for number, result in client.request_many(ask, locations, advice=_ADVICE):
            if isinstance(result, RequestFailed):
                failed[order[number]] = result
            else:
                progress.update()
                yield [result]
    if failed:
        tried = {index: error for index, error in failed.items() if error.kind != NOT_SENT}
        num_unsent = len(failed) - len(tried)
        rest = f", and {num_unsent} more were not sent" if num_unsent else ""
        first = min(tried)
        raise UserError(
            f"{len(tried)} of {len(order)} records failed{rest}; the first is {rows[first]['location']}:"
            f" {tried[first]}; finished records are kept: start again with the same options to resume"
        )


def _score(client: Client, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
    ids = [*prompt_ids, *response_ids]
    # `prompt_logprobs: 0` is for the prompt's own tokens and no others; one new token is the least to ask for.
    body = client.server.make_body(ids, prompt_logprobs=0, max_tokens=1, temperature=0)
    answer = client.request("/completions", body)
    return torch.tensor(read_prompt_logprobs(answer, ids, len(prompt_ids), client.server.url), dtype=torch.float64)


def read_prompt_logprobs(answer: Any, ids: Sequence[int], start: int, url: str) -> list[float]:
    """Read the log-probs of a prompt's tokens `ids` from index `start` on, at least 1, from a server's answer.

    `choices[0].prompt_logprobs` is null for the first token, and for each other one an object that maps the token's id
    to an object with its `logprob`. Raise a `UserError` for answers of another form.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if entries is None:
        raise UserError(
            f"{url}: expected prompt_logprobs in the server's answer, got none; use a server that returns them, such"
            " as vLLM"
        )
    if not isinstance(entries, list) or len(entries) != len(ids):
        got = len(entries) if isinstance(entries, list) else "no list"
        raise UserError(
            f"{url}: expected prompt_logprobs of {len(ids)} tokens, got {got}; use a server that takes a prompt of"
            " token ids unchanged"
        )
    logps = []
    for index in range(start, len(ids)):
        entry = entries[index]
        own = entry.get(str(ids[index])) if isinstance(entry, dict) else None
        logp = own.get("logprob") if isinstance(own, dict) else None
        # Slightly above 0 is rounding. The comparison also fails for NaN.
        if not isinstance(logp, int | float) or isinstance(logp, bool) or not -float("inf") < logp <= 1e-3:
            raise UserError(
                f"{url}: expected the log-prob of token {ids[index]} at index {index} of prompt_logprobs, got none or a"
                " value that is not one; use a server that returns them, such as vLLM"
            )
        logps.append(min(0.0, float(logp)))
    return logps
