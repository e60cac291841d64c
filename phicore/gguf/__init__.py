"""GGUF files: reading them safely, and what their quantized blocks mean."""
