"""Measures a model: AlpacaEval, benchmarks by lm-eval, ROUGE, and the detection of wrong tokens.

Each measure is a module of pure functions; the command line (`cutlm.cli.eval`) makes what they are given, such as a
model's responses, and `cutlm.evaluation.folder` keeps all of it.
"""
