"""The online loop: sample instructions, generate, judge, blame, train, merge, evaluate, and again (paper, section 5.2).

Each stage is a command that a user could run, in a process of its own, and leaves files; `manifest` says which of them
are whole. `settings` reads what is asked for, `stages` makes commands of it, `processes` runs them, `loop` decides what
comes next, `report` shows what came of it.
"""
