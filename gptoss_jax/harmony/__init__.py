"""Conversations to token ids and back, in the harmony format; imports no JAX."""
