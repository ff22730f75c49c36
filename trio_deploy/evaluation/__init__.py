"""How right: questions, scorers and statistics."""
