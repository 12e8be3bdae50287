"""What several packages need: files, images, templates, messages."""
