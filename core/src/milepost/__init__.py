"""Checkpoints for JAX."""
