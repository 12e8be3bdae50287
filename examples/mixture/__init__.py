"""Two real data sets and rows without pictures in one recipe."""
