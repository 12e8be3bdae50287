"""Helpers that several packages share: files, images, templates, messages."""
