"""What it takes: operations, memory, plans."""
