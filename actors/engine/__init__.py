"""The embedded engine: a small server that speaks the part of the SGLang HTTP API that the actors use."""
