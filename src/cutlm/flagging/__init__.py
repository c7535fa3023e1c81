"""Flag tokens (eq. 5): which tokens of a response a judgment objects to, by a model that is not being trained.

Read in this order:

- `scoring`: log-probabilities of encoded responses from a local model, without and with the judgment.
- `server`: the same from a server that returns prompt log-probabilities.
- `sensitivity`: whether the flags depend on the content of the judgments.
- `contrast`: other baselines for the judged context, and a threshold calibrated on foreign judgments.
- `report`: the report next to a file of token scores.
- `detector`: flags and weights from these log-probabilities; scoring whole files with resume.
- `live`: scores of one response under changing judgments, on a KV cache.
- `token_scores`: the JSON Lines format of the result.
"""
