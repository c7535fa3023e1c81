"""Measures a model: AlpacaEval win rate, lm-eval benchmarks, ROUGE, and detection of wrong tokens.

`shared` has what all measures share, above all the folder that a result goes to and from which a stopped evaluation
resumes. Then each measure is on its own: `detection`, `rouge`, `harness`, and `annotator` with `alpaca_eval`. `paper`
has the paper's numbers, which reports show below ours. The command line (`cutlm.cli.eval`) makes the inputs, such as a
model's responses.
"""
