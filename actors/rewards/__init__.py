"""Judge responses by rule, in processes of their own, within a deadline.

The rollout actor asks `pool.py`; nobody else is called.
"""
