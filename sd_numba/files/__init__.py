"""Bytes on disk: safetensors and GGUF files, tensors in them, hashes, writing, and the Hugging Face hub."""
