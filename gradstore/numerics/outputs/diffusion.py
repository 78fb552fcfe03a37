"""The output functions of diffusion models.

Each is a mean over the S noised copies x_s of an example, at timesteps and with noises that are the same for every
example (arXiv 2506.05647, appendix C), of a sum over the pixels and channels of one copy.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def ddpm_simple(predicted: Float[Tensor, "B S *D"], noise: Float[Tensor, "B S *D"]) -> Float[Tensor, " B"]:
    r"""Squared error of the predicted noise: L_simple of DDPM (arXiv 2006.11239, eq. 14), which TracIn and TRAK take.

    .. math:: f(x) = \frac{1}{S} \sum_s \| \epsilon_s - \epsilon_\theta(x_s, t_s) \|^2

    It is a loss: training lowers it.

    Parameters
    ----------
    predicted
        The noise that the model sees in every noised copy of every example; D are channels, rows and columns.
    noise
        The noise that is in it.

    Returns
    -------
    Tensor
        [B], at least float32 whatever the precision of the predictions; NaN where a prediction is NaN.
    """
    return _mean_of_sums((_wide(predicted) - noise).square())


def square(predicted: Float[Tensor, "B S *D"]) -> Float[Tensor, " B"]:
    r"""Squared length of the predicted noise: the output function of D-TRAK (arXiv 2506.05647, eq. 13).

    .. math:: f(x) = \frac{1}{S} \sum_s \| \epsilon_\theta(x_s, t_s) \|^2

    It says nothing of how well the model does; that its gradients attribute better than those of the loss is an
    observation.

    Parameters
    ----------
    predicted
        The noise that the model sees in every noised copy of every example.

    Returns
    -------
    Tensor
        [B], at least float32.
    """
    return _mean_of_sums(_wide(predicted).square())


def das(predicted: Float[Tensor, "B S *D"]) -> Float[Tensor, " B"]:
    r"""Sum of the predicted noise: the output function of DAS (arXiv 2506.05647, eq. 16 to 18).

    .. math:: f(x) = \frac{1}{S} \sum_s \sum_d \epsilon_\theta(x_s, t_s)_d

    The paper writes the prediction itself, an image, and leaves open how its gradients become one; this is our reading.

    Parameters
    ----------
    predicted
        The noise that the model sees in every noised copy of every example.

    Returns
    -------
    Tensor
        [B], at least float32.
    """
    return _mean_of_sums(_wide(predicted))


def residual(predicted: Float[Tensor, "B S *D"], noise: Float[Tensor, "B S *D"]) -> Float[Tensor, " B"]:
    r"""Residual of the predicted noise: what DAS multiplies an example's gradient by (arXiv 2506.05647, eq. 18).

    .. math:: r(x) = \frac{1}{S} \sum_s \| \epsilon_\theta(x_s, t_s) - \epsilon_s \|^2

    It is the value of `ddpm_simple`, and nothing is differentiated through it.

    Parameters
    ----------
    predicted
        The noise that the model sees in every noised copy of every example.
    noise
        The noise that is in it.

    Returns
    -------
    Tensor
        [B], detached, at least float32.
    """
    return ddpm_simple(predicted.detach(), noise)


def _mean_of_sums(values: Float[Tensor, "B S *D"]) -> Float[Tensor, " B"]:
    return values.flatten(1).sum(1) / values.shape[1]


def _wide(values: Float[Tensor, "B S *D"]) -> Float[Tensor, "B S *D"]:
    return values.to(torch.promote_types(values.dtype, torch.float32))
