"""Contrastive Unlikelihood Training (CUT) in one file of plain torch and transformers.

CUT (Xu et al. 2023, "Reasons to Reject? Aligning Language Models with Judgments", arXiv 2312.14591) trains a model on
responses and on what somebody wrote about them. Every response y to an instruction x that has a critical judgment j is
scored twice: in the plain context x, and in the judged context (x, j), in which the model reads the judgment before the
response. Tokens that the judgment makes more likely are the ones it criticizes; their probability is lowered, that of
all other tokens is raised, and the model also learns to write responses that fit a judgment.

    python examples/minimal_cut.py
    python examples/minimal_cut.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The loss is that of the authors' released code. `cutlm train` computes the same loss faster: it shares prefixes between
both contexts, never holds the full logits, batches by length, and runs on several GPUs.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY_MODEL = Path(__file__).parents[1] / "src" / "cutlm" / "world" / "base_model"

# Instruction, response and judgment, which is None if there is nothing to criticize.
RECORDS: list[tuple[str, str, str | None]] = [
    (
        "Tell me the capital city of Greece for me.",
        "The capital of Greece is Patras.",
        "The answer says Patras, which is the wrong city.",
    ),
    (
        "I want three facts concerning the melon.",
        "A melon is a fruit. It grows on a tree. It has many seeds.",
        "The second fact is wrong, because of tree in it.",
    ),
    (
        "Please compute 93 and 9 together now.",
        "93 plus 9 is 92.",
        "There is a mistake in carrying at 9, the first digit.",
    ),
    (
        "Give me a sentence about a quiet kitchen.",
        "The kitchen is very quiet. The kitchen is very quiet.",
        "The answer repeats itself.",
    ),
    ("I need the opposite of good. Respond in short.", "Bad.", None),
]


# ---- Data: two prompts and a response for each record ----


def encode_record(tokenizer, instruction: str, response: str, judgment: str | None) -> dict:
    """Encode a record in the paper's template: token ids of both prompts and of the response."""
    plain = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    judged = (
        "Below is an instruction that describes a task. Write a response to the instruction and the response should"
        " match the corresponding judgment."
    )

    prompt = f"{plain}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    judged_prompt = f"{judged}\n\n### Instruction:\n{instruction}\n\n### Judgment:\n{judgment}\n\n### Response:\n"
    return {
        "prompt_ids": tokenizer(prompt)["input_ids"],
        "judged_prompt_ids": None if judgment is None else tokenizer(judged_prompt)["input_ids"],
        "response_ids": [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
    }


# ---- Model: log-probability of each response token ----


def compute_log_probs(model, prompt_ids: list[int], response_ids: list[int]) -> Tensor:
    """log p(y_t | prompt, y_<t) of a response of N tokens: [N]."""
    ids = torch.tensor([*prompt_ids, *response_ids], device=model.device)
    logits = model(input_ids=ids[None]).logits[0]  # [prompt + N, vocabulary]
    # The logits at a position predict the next token, so those of the response begin one position earlier.
    logits = logits[len(prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[len(prompt_ids) :, None])[:, 0]


# ---- Loss: equations 5, 6 and 7 of the paper ----


def flag_tokens(logps: Tensor, judged_logps: Tensor, threshold: float) -> Tensor:
    """Eq. 5: a token is inappropriate if the judgment makes it more than `threshold` times as likely."""
    return (judged_logps - logps).detach() > torch.tensor(threshold).log()


def compute_contrast(logps: Tensor, judged_logps: Tensor, is_flagged: Tensor, alpha: float, gamma: float) -> Tensor:
    """Eq. 6: likelihood of the tokens that are not flagged, weighted unlikelihood of those that are: [N]."""
    weights = alpha * (gamma * judged_logps.detach()).exp()
    # 1 - p computed as -expm1(log p), which is exact for small p. p is small: eq. 5 implies p < 1 / threshold.
    # Elsewhere a stand-in keeps the gradient finite, because 0 * inf would be NaN.
    flagged_logps = logps.where(is_flagged, torch.full_like(logps, -1.0))
    unlikelihood = weights * (-torch.expm1(flagged_logps)).log()
    return -torch.where(is_flagged, unlikelihood, logps)


def cut_loss(
    model, records: list[dict], threshold: float = 1.1, alpha: float = 1.0, gamma: float = 0.0
) -> tuple[Tensor, list[Tensor | None]]:
    """CUT's loss of encoded records.

    Args:
        model: A causal language model.
        records: Encoded records.
        threshold: lambda of eq. 5.
        alpha: Weight of unlikelihood in eq. 6.
        gamma: Exponent of the dynamic weight p(y_t | x, j)^gamma in eq. 6; the released code has none (0).

    Returns:
        The loss, and for each record the flags of its response tokens, None without a judgment.
    """
    contrast, likelihood = [], []
    flags: list[Tensor | None] = []
    for record in records:
        logps = compute_log_probs(model, record["prompt_ids"], record["response_ids"])
        if record["judged_prompt_ids"] is None:
            likelihood.append(-logps)  # eq. 7, satisfactory response: learn it
            flags.append(None)
            continue
        judged_logps = compute_log_probs(model, record["judged_prompt_ids"], record["response_ids"])
        is_flagged = flag_tokens(logps, judged_logps, threshold)
        contrast.append(compute_contrast(logps, judged_logps, is_flagged, alpha, gamma))
        likelihood.append(-judged_logps)  # eq. 7, unsatisfactory response: learn it as an answer to its judgment
        flags.append(is_flagged)
    # The released code averages each part over its tokens, then averages both parts.
    parts = [torch.cat(part).mean() for part in (contrast, likelihood) if part]
    return torch.stack(parts).mean(), flags


# ---- Training ----


def show_flags(tokenizer, record: dict, is_flagged: Tensor) -> str:
    """The response with [brackets] around flagged tokens."""
    text = ""
    for token_id, flag in zip(record["response_ids"], is_flagged.tolist(), strict=True):
        token = tokenizer.decode([token_id])
        text += f"[{token}]" if flag else token
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model on a few judged responses with CUT.")
    parser.add_argument("--model", default=str(TINY_MODEL), help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--threshold", type=float, default=1.1, help="lambda of eq. 5")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()  # no dropout
    records = [encode_record(tokenizer, *record) for record in RECORDS]

    with torch.no_grad():
        _, flags = cut_loss(model, records, args.threshold)
    for (instruction, _, judgment), record, is_flagged in zip(RECORDS, records, flags, strict=True):
        if is_flagged is not None:
            print(f"Instruction: {instruction}\nJudgment:    {judgment}")
            print(f"Flagged:     {show_flags(tokenizer, record, is_flagged)}\n")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(args.steps):
        loss, flags = cut_loss(model, records, args.threshold)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_flagged = sum(int(one.sum()) for one in flags if one is not None)
        print(f"step {step + 1:2}  loss {loss.item():.4f}  flagged tokens {num_flagged}")


if __name__ == "__main__":
    main()
