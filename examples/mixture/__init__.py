"""Train on two real data sets in one recipe."""
