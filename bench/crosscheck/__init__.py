"""The virtual clock against real time: simulated devices under the real launcher and its real roles.

`python -m bench.crosscheck`.
"""
