"""Scores of an evaluation and their uncertainty, with NumPy, SciPy and scikit-learn: no torch."""
