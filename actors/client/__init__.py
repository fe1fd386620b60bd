"""An engine's HTTP API as the actors use it: requests, streams, checks of every answer, circuit breaker.

Knows nothing of samples or leases.
"""
