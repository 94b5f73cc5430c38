"""Merge fine-tuned experts into one model that a preference vector steers."""
