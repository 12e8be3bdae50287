"""Read and write an adapter's files: weights, provenance, card."""
