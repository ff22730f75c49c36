"""Where to prune: pruning points, budgets and the table of selection methods."""
