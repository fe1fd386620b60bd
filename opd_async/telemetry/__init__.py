"""What a person sees: metrics, logs, the terminal, the report and its pictures.

Nothing here decides anything.
"""
