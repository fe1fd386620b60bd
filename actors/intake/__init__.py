"""The intake: put scored chunks in order, take steps from them, send them to the learner's ranks.

What is taken is decided in `opd_async/scheduling/`.
"""
