"""The language model and the programs that run it."""
