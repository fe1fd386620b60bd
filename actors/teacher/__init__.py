"""The teacher actor: score chunks in batches on engines that may fail or lie.

`actor.py` is the process; a `lane.py` is one of its engines.
"""
