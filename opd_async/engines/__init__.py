"""Start inference servers and ask about them: their command line, whether they answer, what they say of themselves.

Requests for tokens and scores are in `actors/client/`.
"""
