"""The student's weights on their way to engines: broadcast, handles or files, and the proof of arrival.

Knows engines by their URLs alone.
"""
