"""Tokenizer, corpora, preparation, packing and the resumable loader."""
