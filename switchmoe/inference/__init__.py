"""Using a model: text from a trained one. To add a way of decoding: a function of parameters and token ids."""
