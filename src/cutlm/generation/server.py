"""Generate responses by a model on an OpenAI-compatible server, each written to a journal when it arrives.

A prompt is an instruction, which the server puts into the model's own chat template (a merged model has that of its
training), or token ids. The model's reasoning is separated from its answer, by the server or here.
"""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from cutlm.data.conversations import Conversation
from cutlm.data.journal import Journal
from cutlm.generation.local import Generated, Sampling, find_malformed_text
from cutlm.prompting.reasoning import split_reasoning
from cutlm.prompting.templates import convert_arguments
from cutlm.servers.client import INCOMPLETE, Answer, Client, RequestFailed, Server

_ADVICE = "if the prompt is too long for the model, set a smaller --max_new_tokens"
_TOKENS_ADVICE = "; if the server does not accept token ids, leave out --template"


def generate_by_server(
    server: Server, prompts: Sequence[Conversation | list[int]], sampling: Sampling, journal: Journal, opening: str = ""
) -> Generated:
    """Generate the responses that a journal does not hold yet and append each to it.

    Each prompt has its own seed, for servers that support one. `sampling.batch_size` is not used. `opening` is the
    markup by which prompts of token ids begin the model's thoughts. Answers that are neither complete nor stopped at
    `max_new_tokens`, and those whose thoughts cannot be separated, are failures.

    Raises:
        UserError: The server refuses every request. Earlier responses are in the journal.
    """
    client, generated = Client(server), Generated.resume(journal)
    generated.num_resumed -= len(_drop_thoughts(generated))
    missing = [index for index in range(len(prompts)) if index not in generated.responses]

    def ask(number: int) -> tuple[Answer, str, str | None]:
        index = missing[number]
        prompt = prompts[index]
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        options |= {"max_tokens": sampling.max_new_tokens, "seed": (sampling.seed + index) % 2**31}
        if isinstance(prompt, Conversation) and prompt.tools:
            options["tools"] = list(prompt.tools)
        content: Any = prompt
        if isinstance(prompt, Conversation):  # the interface has arguments as JSON text
            content = [convert_arguments(message, str) for message in prompt.messages]
        answer = client.complete(server.make_body(content, **options))
        return answer, *read_response(answer, sampling.max_new_tokens, opening)

    progress = tqdm(total=len(prompts), initial=generated.num_resumed, desc="generating", unit="response")
    advice = _ADVICE + _TOKENS_ADVICE * any(not isinstance(prompt, Conversation) for prompt in prompts)
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
            answer, output, reasoning = result
            line = {"index": index, "output": output, "is_unfinished": answer.is_truncated}
            line |= {"is_redacted": answer.is_redacted} | ({} if reasoning is None else {"reasoning": reasoning})
            journal.append([line])
            generated.add(line)
            progress.update()
    generated.failures |= dict.fromkeys(_drop_thoughts(generated), _describe_unfinished(sampling.max_new_tokens))
    return generated


def _drop_thoughts(generated: Generated) -> set[int]:
    """Drop the responses that were stopped, perhaps within thoughts, if others have thoughts; return their indices.

    The server's template may begin the thoughts, so that only their end distinguishes them from an answer.
    """
    dropped = generated.unfinished - generated.reasoning.keys() if generated.reasoning else set()
    for index in dropped:
        del generated.responses[index]
    generated.unfinished -= dropped
    return dropped


def read_response(answer: Answer, max_new_tokens: int, opening: str = "") -> tuple[str, str | None]:
    """Return the final answer, and the model's thoughts before it or None; raise `RequestFailed` without an answer."""
    split = split_reasoning(opening + (answer.text or ""))
    reasoning = "\n\n".join(filter(None, (answer.reasoning, split.reasoning))) or None
    if split.problem is None and (problem := find_malformed_text(split.output)):
        raise RequestFailed(INCOMPLETE, problem, answer.text or "")
    if split.problem is None and (split.output.strip() or reasoning is None):
        # vLLM's parsers of reasoning leave the line breaks after it to the answer.
        return split.output if reasoning is None else split.output.strip(), reasoning
    problem = split.problem or "the model reasons and gives no answer"
    if answer.is_truncated:
        problem = _describe_unfinished(max_new_tokens)
    raise RequestFailed(INCOMPLETE, problem, answer.text or "")


def _describe_unfinished(max_new_tokens: int) -> str:
    return f"stopped at {max_new_tokens} tokens, before the final answer; set a larger --max_new_tokens"
