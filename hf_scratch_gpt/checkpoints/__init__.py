"""GPT-2s of every dress in, transformers' GPT-2 out, and their verification."""
