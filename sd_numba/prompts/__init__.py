"""From text to vectors: tokenizer, syntax, encoding."""
