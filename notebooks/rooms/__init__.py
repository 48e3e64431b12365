"""What single notebooks need: a folder for each subject, imported as `rooms` from notebooks/."""
