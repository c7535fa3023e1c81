"""Judges: a server, a local model, rules or a person say in words what is wrong with a response.

Read in this order:

1. `responses`: `Response`, `Outcome` and their files; every judge turns responses into an outcome.
2. `prompt`: the question for a language model; `answers`: the reading of its answer.
3. `server`, `local`, `rules`, `human`: the judges.
4. `paired`, `comparison`: responses under a teacher's prompt against plain ones.
5. `evaluation`: how well a trained judge agrees with held-out judgments.
"""

from cutlm.judges.responses import Failure, Outcome, Response

__all__ = ["Failure", "Outcome", "Response"]
