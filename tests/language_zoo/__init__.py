"""A tiny random language model of each architecture that transformers maps to causal or seq2seq language modeling."""
