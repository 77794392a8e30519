"""The Keras callbacks, one a module."""
