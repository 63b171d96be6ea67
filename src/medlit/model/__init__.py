"""The language model: its weights, its loss, its answers and what they are worth."""
