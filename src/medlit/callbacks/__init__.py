"""What happens beside training: files, figures and when to stop."""
