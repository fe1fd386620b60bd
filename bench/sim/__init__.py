"""The scheduling state machines of the project on a virtual clock, with devices replaced by a cost model."""
