"""Which process runs where, on which ports, with which command: the plan that every role reads.

Only this is called a plan; what a topology would cost is a forecast (`forecast/`), what a step trains is a policy
(`scheduling/step_policy.py`).
"""
