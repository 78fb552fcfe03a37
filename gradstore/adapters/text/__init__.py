"""Texts: from the documents of a source to rows of tokens, and the examples of the splits."""
