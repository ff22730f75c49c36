"""One file per dialect: the operators that a runtime reads."""
