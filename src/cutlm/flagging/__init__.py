"""Flag tokens (eq. 5): which tokens of a response a judgment objects to, by a model that is not being trained.

Read in this order:

- `scoring`: log-probabilities of encoded responses from a local model, without and with the judgment.
- `server`: the same from a server that returns prompt log-probabilities.
- `sensitivity`: whether the flags depend on what the judgments say.
- `contrast`: what else the judged context can be compared with, and a threshold that foreign judgments calibrate.
- `report`: what is written about a file of token scores.
- `detector`: flags and weights from these log-probabilities; scoring whole files with resume.
- `live`: scores of one response under changing judgments, on a KV cache.
- `token_scores`: the JSON Lines format of the result.
"""
