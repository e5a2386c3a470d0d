"""`gptoss-jax bench`: how fast a model decodes and prefills here, against what this card could do at best.

Measures and reports; it changes nothing in the model and decides nothing for it.
"""
