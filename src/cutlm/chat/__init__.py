"""Chat with a model in the terminal, judge its answers and save them as records.

Read `session` first (the commands, and the `Engine` protocol that a model implements), then `conversation` (turns, and
the records made from them), then the two engines: `local` (a model in this process) and `server` (an OpenAI-compatible
server).
"""
