"""The online loop (section 5.2 of the paper): sample, generate, judge, blame, train, merge, evaluate, and repeat.

Every stage runs as a separate process (mostly another `cutlm` command) and leaves files, so a run that was killed
resumes with the first stage that is not complete. Reading order:

- `settings`: the user's settings, all checked before anything runs
- `stages`: what each stage runs, the files it leaves and the metrics read from them
- `loop`: which stage is next, and the manifest of complete stages with checksums of their files
- `processes`: commands, servers and signals
- `report`: metrics of all iterations as a table and curves
"""
