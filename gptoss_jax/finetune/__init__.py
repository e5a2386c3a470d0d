"""Fine-tuning: conversations to batches, and batches to weights."""
