"""The rollout actor: generate with the student and stream partial samples.

`actor.py` is the process; the rest are its parts.
"""
