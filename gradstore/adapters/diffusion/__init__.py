"""Diffusion models of images: a UNet that a user's own function makes, or one that diffusers saved."""

from gradstore.adapters.diffusion.adapter import Diffusion

__all__ = ["Diffusion"]
