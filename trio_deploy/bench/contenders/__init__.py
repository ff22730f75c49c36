"""What answers while it is measured: the bundle, and the baselines."""
