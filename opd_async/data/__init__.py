"""Read what a user brings: prompts, given responses, tokenizers and the config of model folders.

Nothing here writes a user's file or knows of a run.
"""
