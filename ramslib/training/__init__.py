"""Training that survives what happens to it, in one process or many."""
