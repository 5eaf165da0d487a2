"""Stage 1: the router and alpha against full attention's output."""
