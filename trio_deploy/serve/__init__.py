"""Answers for others: what every server needs."""
