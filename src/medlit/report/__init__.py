"""The report of a test: its scores, their uncertainty, and every other system tested on the same notes."""
