"""A machine with one instruction, and a transformer that runs it."""
