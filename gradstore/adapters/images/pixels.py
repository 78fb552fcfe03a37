"""One image: from what a source holds to uint8 [C, H, W] of the shape that the model takes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradstore.errors import DataError, SpecError

FORMATS: Final = ("PNG", "JPEG")
GRAY, COLOUR = 1, 3
# Gray of red, green and blue (ITU-R BT.601), in units of 2^-16 as Pillow has them.
_LUMA: Final = np.array([19595, 38470, 7471], np.uint32)
_ROUNDING: Final = 2**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What is done to every image before it is kept.

    Attributes
    ----------
    size
        (height, width) that every image is resized to, bilinear with antialiasing, whatever its aspect; None leaves it.
    channels
        1 (gray) or 3 (red, green, blue) that every image is converted to; None leaves it.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None

    def __call__(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """Return uint8 [C, H, W] of an image [H, W], [H, W, C] or [C, H, W], in memory of its own.

        Raises
        ------
        DataError
            If it is no image of 8 bits and 1 or 3 channels.
        """
        image = channels_first(pixels, where)
        if self.channels is not None and self.channels != image.shape[0]:
            image = np.repeat(image, COLOUR, 0) if self.channels == COLOUR else _gray(image)
        if self.size is not None and self.size != image.shape[1:]:
            image = _resized(image, self.size)
        # A view would keep all of the source's array.
        return np.array(image, order="C", copy=True)


def resolve_preparation(size: int | list[int] | None, channels: int | None) -> Preparation:
    """Return what model.options says of ``size``, one number or [height, width], and ``channels``.

    Raises
    ------
    SpecError
        If they are none.
    """
    sides = [size, size] if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise SpecError(f"model.options.size: found {size!r}; accepted: one number, or [height, width].")
    if channels not in (None, GRAY, COLOUR):
        raise SpecError(f"model.options.channels: found {channels!r}; accepted: {GRAY} or {COLOUR}.")
    return Preparation(size=None if sides is None else (sides[0], sides[1]), channels=channels)


def decode(content: bytes, where: str) -> np.ndarray:
    """Return the pixels of a PNG or JPEG file: uint8 [H, W] of a gray image, [H, W, 3] of any other.

    Transparency is dropped and palettes are resolved. A photograph's orientation tag is not followed, as in torchvision.

    Raises
    ------
    SpecError
        If Pillow is not installed.
    DataError
        If the content is no such image, is damaged, or has more than 8 bits a channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SpecError(f"{where}: image files are decoded with: pip install 'gradstore[images]'.") from error
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            mode = opened.mode
            if mode[0] not in "IF":
                pixels = np.asarray(opened.convert("L" if mode in ("1", "L", "LA", "La") else "RGB"))
    except MemoryError:
        raise
    # A damaged file makes decoders fail in any way: OSError, SyntaxError, struct.error, ValueError and others.
    except Exception as error:
        raise DataError(
            f"{where} is no {' or '.join(FORMATS)} image that can be read: {error}. Mend or remove it."
        ) from error
    if mode[0] in "IF":
        raise DataError(f"{where} has more than 8 bits a channel (mode {mode}). Convert it to 8 bits.")
    return pixels


def channels_first(pixels: np.ndarray, where: str) -> np.ndarray:
    """Return a view [C, H, W] of an image; see `Preparation`."""
    if pixels.dtype != np.uint8:
        raise DataError(f"{where} holds {pixels.dtype}; images are uint8, from 0 to 255. Convert them.")
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim == 3:
        first, last = (pixels.shape[axis] in (GRAY, COLOUR) for axis in (0, 2))
        if first and last:
            raise DataError(
                f"{where} has shape {list(pixels.shape)}, whose channels may be the first or the last. "
                "Leave out the dimension of one channel, or use a larger image."
            )
        if first or last:
            return pixels if first else pixels.transpose(2, 0, 1)
    raise DataError(
        f"{where} has shape {list(pixels.shape)}; an image is [H, W], [H, W, C] or [C, H, W] with 1 or 3 channels."
    )


def _gray(image: np.ndarray) -> np.ndarray:
    weighted = np.tensordot(_LUMA, image.astype(np.uint32), 1)
    return ((weighted + _ROUNDING) >> 16).astype(np.uint8)[None]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    values = torch.from_numpy(image.astype(np.float32))[None]
    resized = torch.nn.functional.interpolate(values, size, mode="bilinear", antialias=True)
    found: np.ndarray = resized[0].round().clamp(0, 255).to(torch.uint8).numpy()
    return found
