"""Texts as an encoder represents them, in the place of gradients."""

from gradstore.adapters.encoder.adapter import OUTPUT, Represents, TextEncoder

__all__ = ["OUTPUT", "Represents", "TextEncoder"]
