"""Lightning callbacks: files, figures, the progress bar, and when to stop."""
