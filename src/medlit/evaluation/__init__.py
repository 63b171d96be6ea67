"""What a set of answers is worth and how sure one may be of that: NumPy, SciPy and scikit-learn, no torch, no files."""
