"""An adapter's files: weights, provenance, card."""
