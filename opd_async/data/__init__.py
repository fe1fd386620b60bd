"""What a user brings: prompts, given responses, tokenizers and the config of model folders.

Reading only; nothing here knows of a run.
"""
