"""From data to the moments of each BN layer's input."""
