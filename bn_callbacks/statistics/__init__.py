"""The mathematics of batch statistics, in float64 NumPy: no Keras, no TensorFlow."""
