"""Fine-tuning: LoRA on packed experts, or all parameters."""
