"""Pure state machines that decide: who generates what, what is scored together, what a step trains.

No socket, no task, no clock of its own: time is a parameter or an injected function.
"""
