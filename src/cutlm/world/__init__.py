"""The tiny world: a testbed for alignment with judgments, small enough to study on a CPU in minutes.

It has instructions with known answers (`tasks`), an oracle that judges responses (`judge`), and a base model with known
bad habits (`base`). `demo` runs all of cutlm on it and `demo_report` shows the results. Read the modules in this order.
The base model, built by `experiments/build_base.py`, is good for nothing else.
"""
