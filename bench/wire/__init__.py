"""What a token costs on its way: the whole data plane with null engines and a null learner.

`python -m bench.wire`.
"""
