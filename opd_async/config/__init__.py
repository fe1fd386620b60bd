"""What a user may write: the topology's sections, their defaults, and the reading of its file.

Only values and their bounds. What needs files, devices or another process to be judged belongs to `checks/`.
"""
