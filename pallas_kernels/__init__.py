"""Kernels for gpt-oss: the MXFP4 format, the expert layer and attention over pages.

Depends on jax alone. Every function sees local arrays: call it inside `jax.shard_map` when a mesh is in use.
"""
