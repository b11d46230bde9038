"""DeepCache: most of the UNet is computed only in every n-th call; the calls in between reuse the result.

Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free" (arXiv:2312.00858). From one step to the next the
feature maps deep in a UNet change little. In the calls between, only the shallowest of its branches is computed: the
first convolution, and the last residual block (and transformer) on the way up, which reads the result of the first
convolution and the map of features that is kept here. This is branch 0 of the authors' ``DeepCacheSDHelper``, the one
that diffusers documents; in their first code, branch 0 had one more layer on the way down and on the way up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..checks import check_whole

MAX_INTERVAL = 1000


@dataclass
class FeatureCache:
    """Features that the UNet keeps from one call to the next, for one group of pictures in one run.

    Parameters
    ----------
    interval : int
        Every ``interval``-th call, beginning with the first, computes the whole network; 1 means every call.

    Attributes
    ----------
    features : ndarray or None
        Float32 ``(b, h, w, c)`` of the last whole call. These and `calls` are all that a resumed run needs.
    calls : int
        Number of calls so far.

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
        """Return the features for the next call, or None if it has to compute the whole network.

        It also has to if the features have another shape, as when guidance starts or ends during a run.
        """
        found = self.features
        return None if self.calls % self.interval == 0 or found is None or found.shape != shape else found

    def keep(self, features: np.ndarray) -> None:
        """Count a call and keep its features; they are copied unless `recall` returned them."""
        if features is not self.features:
            self.features = features.copy()
        self.calls += 1
