"""What the rest knows of an inference server: its command line, whether it answers, what it says of itself.

Requests for tokens and scores are in `actors/client/`.
"""
