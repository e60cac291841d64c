"""Phi-3 from quantized GGUF files on any tensor library."""
