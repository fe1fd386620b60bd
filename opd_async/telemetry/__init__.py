"""Show a run to a person: metrics, logs, the terminal, the report and its pictures.

Nothing here decides anything.
"""
