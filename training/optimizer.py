"""Muon for the matrices of a network, AdamW for everything else.

Method: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable
for LLM Training", arXiv:2502.16982, whose scale lets both share a learning rate and a weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MOMENTUM = 0.95
SCALE = 0.2  # root mean square of an update, about that of AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
WEIGHT_DECAY = 0.01


class Optimizer:
    """One step for all parameters, which a CUDA graph can record.

    Parameters
    ----------
    named
        Parameters and their names, on one device.
    muon
        Whether to use Muon at all, or AdamW for the matrices, too.
    """

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], muon: bool):
        matrices, hidden, rest = [], [], []
        for name, parameter in named:
            if parameter.ndim < 2:
                rest.append(parameter)
            elif muon and not _is_an_end(name):
                hidden.append(parameter)
            else:
                matrices.append(parameter)
        device = rest[0].device
        self._rate = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self._rate,
            betas=(0.9, 0.99),
            fused=on_gpu,
            capturable=on_gpu,
            foreach=False if not on_gpu else None,
        )
        self._muon = [_Alike(some) for some in _by_shape(hidden)]

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        self._rate.fill_(rate)

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self._adamw.zero_grad(set_to_none=True)
        for alike in self._muon:
            for parameter in alike.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients."""
        self._adamw.step()
        for alike in self._muon:
            alike.step(self._rate)


def _is_an_end(name: str) -> bool:
    """Whether a parameter belongs to the input or the output layer: embeddings and the outer convolutions."""
    return "embeddings" in name or "conv_in." in name or "conv_out." in name


def _by_shape(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())


class _Alike:
    """Muon for parameters of one shape, all at once; a convolution is a matrix with a row for each filter."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        rows, columns = parameters[0].flatten(1).shape
        self._buffer = torch.zeros(len(parameters), rows, columns, device=parameters[0].device)
        self._scale = SCALE * max(rows, columns) ** 0.5

    def step(self, rate: torch.Tensor) -> None:
        gradients = torch.stack([parameter.grad.flatten(1) for parameter in self.parameters])
        self._buffer.lerp_(gradients, 1 - MOMENTUM)
        update = orthogonalise(gradients.lerp(self._buffer, MOMENTUM)) * self._scale
        for parameter, change in zip(self.parameters, update, strict=True):
            parameter.mul_(1 - rate * WEIGHT_DECAY).sub_(rate * change.view_as(parameter))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices ``(n, rows, columns)`` close to 1, by Newton-Schulz iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
