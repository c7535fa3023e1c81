"""Generation of responses. Read `local` (sampling and batches on a local model), `server` (the same by a server), then
`files` (files of prompts and of records to refine, resumed after a stop).
"""
