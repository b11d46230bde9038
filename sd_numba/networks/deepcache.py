"""DeepCache: most of the UNet's work is done in every n-th call, and what came of it is used again in between.

Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free" (arXiv:2312.00858). From one step to the next the
feature maps deep in a UNet change little. In the calls between, only the shallowest of its branches is computed: the
first convolution, and the last residual block (and transformer) on the way up, which reads the result of the first
convolution and the map of features that is kept here. This is branch 0 of the authors' ``DeepCacheSDHelper``, the one
that diffusers documents; in their first code, branch 0 had one layer more on the way down and on the way up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..checks import check_whole

MAX_INTERVAL = 1000


@dataclass
class FeatureCache:
    """What the UNet keeps from one call to the next, for one group of pictures in one run.

    Parameters
    ----------
    interval : int
        Every so many calls compute the whole network, the first of them too; 1 means all.

    Attributes
    ----------
    features : ndarray or None
        Float32 ``(b, h, w, c)`` of the last whole call. With `calls`, all that must be kept to go on with a run.
    calls : int
        How many there have been.

    Raises
    ------
    InputError
        The interval is not a whole number from 1 to 1000.
    """

    interval: int
    features: np.ndarray | None = field(default=None, compare=False)
    calls: int = 0

    def __post_init__(self) -> None:
        check_whole("cache interval", self.interval, 1, MAX_INTERVAL)

    def recall(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Give the features for the next call, or None if it has to compute the whole network.

        It has to as well if they are of another shape, as when guidance starts or ends during a run.
        """
        found = self.features
        return None if self.calls % self.interval == 0 or found is None or found.shape != shape else found

    def keep(self, features: np.ndarray) -> None:
        """Count a call, which had these features; they are copied unless they are those of `recall`."""
        if features is not self.features:
            self.features = features.copy()
        self.calls += 1
