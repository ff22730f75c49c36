"""What is shipped: the exported folder, its manifest and its weights."""
