"""From readings of the moving averages in training to what is said of them."""
