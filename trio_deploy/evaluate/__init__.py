"""Accuracy retained: scenes, questions, comparison of pruning methods."""
