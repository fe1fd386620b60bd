"""What a GPU is asked before anything is claimed of it: one command, `python -m bench.gpu.all`.

Every script also runs on the CPU at a tiny size (`--tiny`).
"""
