"""The Switch Transformer and the mixture-of-experts work around it, in JAX."""

__version__ = "0.1.0"
