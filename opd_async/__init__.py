"""opd_async: the torch-free core that every role shares."""
