"""A user's own adapter: a function makes an object of three methods, and what gradstore asks besides is added here."""

from gradstore.adapters.own.adapter import OwnAdapter

__all__ = ["OwnAdapter"]
