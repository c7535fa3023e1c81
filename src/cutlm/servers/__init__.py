"""Requests to OpenAI-compatible servers. Read `client` (one request, many requests), then `cache` (answers and budget).

Judging, generation, blame by prompt log-probabilities, the chat and the AlpacaEval annotator all use this one client.
"""
