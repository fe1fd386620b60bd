"""What is learnt, by method and by staleness: whole runs of the launcher on written-out addition, seed by seed."""
