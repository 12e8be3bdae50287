"""Two real data sets and rows without images in one recipe."""
