"""What differs between model families; one file per family."""
