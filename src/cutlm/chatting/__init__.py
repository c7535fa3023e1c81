"""Talking to a model: what was said (`conversation`), the commands (`session`), how lines are read (`lines`), and who
answers (`local`, `server`)."""
