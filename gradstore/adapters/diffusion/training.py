"""What training a diffusion model brings down: the error of the noise that it sees, at one random timestep for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradstore.adapters.images.splits import CLASS, IMAGE
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

    # The predicted noise of images [n, C, H, W] at timesteps [n], of classes [n].
    Predict = Callable[[Tensor, np.ndarray, np.ndarray | None], Tensor]


def denoising_losses(predict: Predict, examples: Sequence[Example], levels: np.ndarray, like: Tensor) -> Tensor:
    r"""Return, for each image, the mean squared error of its predicted noise [B], differentiable (arXiv 2006.11239, eq. 14).

    .. math:: \lVert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon, t) \rVert^2 / (C H W)

    Timesteps and noises are torch's next random numbers.

    Parameters
    ----------
    predict
        The model.
    examples
        The images.
    levels
        :math:`\bar\alpha_t` of every timestep.
    like
        A tensor of the model's, whose device and type the images take.
    """
    import torch

    images = torch.from_numpy(np.stack([example.inputs[IMAGE] for example in examples])).to(like) / 127.5 - 1
    times = torch.randint(len(levels), (len(examples),)).numpy()
    noise = torch.randn(images.shape).to(like)
    of_images = levels[times].reshape(-1, 1, 1, 1)
    kept, added = (torch.from_numpy(np.sqrt(share)).to(like) for share in (of_images, 1 - of_images))
    classes = classes_of(examples)
    predicted = predict(kept * images + added * noise, times, None if classes is None else np.array(classes))
    errors: Tensor = (noise - predicted).square().flatten(1).mean(1)
    return errors


def classes_of(examples: Sequence[Example]) -> list[int] | None:
    """The numbers of the classes of some images; None where they have none."""
    return [int(example.inputs[CLASS]) for example in examples] if CLASS in examples[0].inputs else None
