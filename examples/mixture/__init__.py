"""Two real data sets in one recipe."""
