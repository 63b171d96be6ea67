"""Answers to notes as a table: its columns, the parts that it grows in, and its formats."""
