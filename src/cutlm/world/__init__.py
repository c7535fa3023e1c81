"""The tiny world: instructions with verifiable answers, an oracle that judges, and a base model with known flaws.

It exists to study alignment by judgments honestly and quickly. Nothing here is of use for a model of one's own.
"""
