"""Published safetensors to sharded Orbax: convert, inspect and verify checkpoints, and make synthetic ones."""
