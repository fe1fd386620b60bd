"""One measuring script for each claim."""
