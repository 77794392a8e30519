"""Reads the moving averages in a training, and decides what to say of them."""
