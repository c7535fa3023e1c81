"""Generation of responses. Read `local` (sampling and answers of a local model), `continuous` (its batches), `vllm` and
`server` (the same by vLLM in this process and by a server), then `files` (files of prompts and of records to refine,
resumed after a stop).
"""
