"""Scripts that turn GPT-2 checkpoints into saved models; run them from a clone."""
