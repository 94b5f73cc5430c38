"""What AdaMerging is made of: task vectors, forward passes, samples, and what it learns."""
