"""Verbs of medlit's own, beside Lightning's: each is a module with `run(args) -> exit code`."""
