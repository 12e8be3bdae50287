"""Test tiny random language models of each architecture in transformers' mappings for causal and seq2seq models."""
