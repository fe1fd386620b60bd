"""One run: its lifecycle, the dispatcher of messages and leases, the script of its steps, its books.

The launcher's side only; roles are in `actors/` and `learner/`.
"""
