"""`trio check`: a bundle against the oracle."""
