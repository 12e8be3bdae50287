"""Image features that are computed once and read again."""
