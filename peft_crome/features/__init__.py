"""Compute image features once and read them again."""
