"""Batch norms' statistics, estimated anew for weights that have changed faster than a running average follows.

Right after a prune, and in very sparse networks whose features seldom fire, the running averages are not those of the network:
evaluation may then fail where training is well (docs/lab-notebook.md has both, measured).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gap_hf import GaPTrainer


class RecalibratedTrainer(GaPTrainer):
    """GaPTrainer that evaluates, predicts and in the end keeps a model whose batch norms are estimated anew.

    Attributes:
        recalibrate: On so many batches of training data; 0 leaves what training has averaged.
    """

    recalibrate: int = 0

    @abstractmethod
    def plain_batch(self, indices: np.ndarray) -> Mapping[str, Tensor]:
        """A batch of the training data, not augmented: the model's arguments."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.finished_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self.finished_weights():
            return super().predict(*args, **kwargs)

    @contextmanager
    def finished_weights(self) -> Iterator[None]:
        """In it the model is what would be saved at the end."""
        assert self.model is not None
        if not self.differs_when_finished():
            yield
            return
        # While replicas are apart (P-GaP) it is their merge that is finished, and not one of them.
        with self._gap_merged():
            before = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            try:
                self.finish()
                yield
            finally:
                self.model.load_state_dict(before)

    def keep_finished_weights(self) -> None:
        """At the end of training: what `finished_weights` gives, for good."""
        self.finish()
        self.recalibrate = 0

    def differs_when_finished(self) -> bool:
        """True if `finish` would change anything."""
        return self.recalibrate > 0

    def finish(self) -> None:
        """Turn the model into what is evaluated and saved."""
        assert self.model is not None
        if self.recalibrate and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            update_bn(self._plain_batches(), _Named(self.model))

    def _plain_batches(self) -> Iterator[Any]:
        """Drawn by the seed alone: equal on every rank and at every call."""
        data: Any = self.train_dataset
        order = np.random.default_rng(self.args.seed).permutation(len(data))
        size = min(self.args.per_device_train_batch_size, len(order))
        for start in range(0, min(self.recalibrate * size, len(order) - size + 1), size):
            batch = self.plain_batch(order[start : start + size])
            yield [{name: value.to(self.args.device) for name, value in batch.items()}]


class _Named(nn.Module):
    """A model that takes all its arguments as one mapping, for `update_bn`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        return self.model(**batch)
