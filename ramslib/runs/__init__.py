"""The folder of a run: its files, and what a finished one is good for."""
