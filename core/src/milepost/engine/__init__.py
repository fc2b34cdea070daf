"""The pipeline under every face of milepost: save, load, look, verify, sweep.

Only `saving`, `loading`, `pieces` and `placing` know JAX; looking at checkpoints needs none of it.
"""
