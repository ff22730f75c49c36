"""The oracle: TRIO on transformers' own model, with autograd."""
