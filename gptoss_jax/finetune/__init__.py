"""Fine-tuning: LoRA on experts that stay packed, all weights in bfloat16, or all weights trained to be MXFP4."""
