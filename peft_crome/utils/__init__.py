"""What several rooms need and no room owns."""
