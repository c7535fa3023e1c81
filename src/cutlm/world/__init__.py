"""The tiny world: a testbed for alignment with judgments, small enough to study on a CPU in minutes.

It has instructions with known answers (`tasks`), an oracle that judges responses (`judge`), and a base model with known
bad habits (`corpus` is what it reads, `base` builds and loads it, `measure` tests it). `demo` runs all of cutlm on it.
Read the modules in this order. The base model is good for nothing else.
"""
