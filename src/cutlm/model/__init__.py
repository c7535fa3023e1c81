"""Models: load them, run them over micro-batches, and merge adapters.

Read `loading` (models, tokenizers, adapters), `collator` (the micro-batch), `forward` (its log-probabilities) and
`logprobs` (the output head). The commands `merge` and `estimate` use `merge` and `memory`.
"""
