"""Models: load them, run them over micro-batches, and merge adapters.

Read `loading` (models, tokenizers, adapters), `collator` (what a micro-batch is), `forward` (how it runs through the
model) and `logprobs` (the output head). `merge` and `memory` are the commands `merge` and `estimate`.
"""
