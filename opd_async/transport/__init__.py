"""What crosses a process border: messages, their bytes, the sockets, and the waits for answers.

No decision about a sample is taken here.
"""
