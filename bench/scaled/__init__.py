"""Real roles in real time, with devices replaced by processes that take as long as a cost model says."""
