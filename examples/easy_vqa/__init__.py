"""Teach easy-VQA to a small vision-language model with real weights, on a laptop."""
