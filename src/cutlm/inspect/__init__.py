"""What was found, to be looked at: token scores as a page or in a terminal, and curves as pictures.

Nothing is measured here; every figure is handed in. No model and no torch is needed.
"""
