"""The oracle: TRIO on transformers' own model, with autograd. Needs the `reference` extra."""
