"""Everything that is refused before a start, each finding with the key and what to write.

A check reads; it starts and writes nothing that lasts.
"""
