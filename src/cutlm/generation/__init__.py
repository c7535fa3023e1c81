"""Generation of responses. Read `local` (sampling and answers of a local model), `continuous` (its batches), `server`
(the same by a server), then `files` (files of prompts and of records to refine, resumed after a stop).
"""
