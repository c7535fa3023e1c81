"""Log-probabilities computed the plain way, to compare with."""

from collections.abc import Sequence
from typing import Any

import torch


def score_response(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
    """log p of each token of a response: one sequence at a time, all logits at once, softmax in float64."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].double()
    model.train(training)
    predictions = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return predictions.gather(1, torch.tensor(response_ids)[:, None])[:, 0].tolist()
