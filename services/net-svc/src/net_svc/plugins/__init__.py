"""The plugins of a network: one module for each way to carry a plugin out."""
