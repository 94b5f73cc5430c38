"""Layers of any network seen as least-squares problems: their order, inputs and statistics."""
