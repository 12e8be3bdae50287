"""Runnable examples, each of which is also a test."""
