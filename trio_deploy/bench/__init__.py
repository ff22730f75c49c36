"""How fast: time and memory beside other pipelines."""
