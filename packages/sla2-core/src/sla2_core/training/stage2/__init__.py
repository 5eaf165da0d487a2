"""Stage 2: the model end to end."""
