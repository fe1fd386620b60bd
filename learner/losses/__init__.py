"""From the rows of a micro-batch to a loss: sampled, top-k and full-vocabulary divergences, surrogates.

Formulas with their sources; no optimizer, no file.
"""
