"""How weights are stored: whole, or as the parts of a quantisation scheme."""
