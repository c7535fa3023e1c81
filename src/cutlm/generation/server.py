"""Generate responses by a model on an OpenAI-compatible server, each written to a journal when it arrives.

A prompt is an instruction, which the server puts into the model's own chat template (a merged model has that of its
training), or token ids.
"""

from collections.abc import Sequence

from tqdm import tqdm

from cutlm.data.journal import Journal
from cutlm.generation.local import Generated, Sampling
from cutlm.servers.client import Answer, Client, RequestFailed, Server

_ADVICE = "if the prompt is too long for the model, set a smaller --max_new_tokens"
_TOKENS_ADVICE = "; if the server does not accept token ids, leave out --template"


def generate_by_server(
    server: Server, prompts: Sequence[str | list[int]], sampling: Sampling, journal: Journal
) -> Generated:
    """Generate the responses that a journal does not hold yet and append each to it.

    Each prompt has its own seed, for servers that support one. `sampling.batch_size` is not used.

    Raises:
        UserError: The server refuses every request. Earlier responses are in the journal.
    """
    client, generated = Client(server), Generated.resume(journal)
    missing = [index for index in range(len(prompts)) if index not in generated.responses]

    def ask(number: int) -> Answer:
        index = missing[number]
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        return client.complete(server.make_body(prompts[index], seed=(sampling.seed + index) % 2**31, **options))

    progress = tqdm(total=len(prompts), initial=generated.num_resumed, desc="generating", unit="response")
    advice = _ADVICE + _TOKENS_ADVICE * any(not isinstance(prompt, str) for prompt in prompts)
    locations = [f"prompt {index + 1}" for index in missing]
    with journal, progress:
        for number, result in client.request_many(
            ask, locations, advice=advice, is_answering=bool(generated.num_resumed)
        ):
            index = missing[number]
            if isinstance(result, RequestFailed):
                generated.failures[index] = str(result)
                progress.set_postfix(failed=len(generated.failures), refresh=False)
                continue
            text, is_unfinished = result.text or "", result.is_truncated
            flags = {"is_unfinished": is_unfinished, "is_redacted": result.is_redacted}
            journal.append([{"index": index, "output": text} | flags])
            generated.responses[index] = text
            generated.num_redacted += result.is_redacted
            if is_unfinished:
                generated.unfinished.add(index)
            progress.update()
    return generated
