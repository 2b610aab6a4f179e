"""The Lightning module that trains any of the models, all by the same rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from h2rec.data import CoOccurrence, EvalBatches, SequenceBatch, Split, TrainBatches
from h2rec.data.raw_ids import first_few
from h2rec.models import SequentialModel
from h2rec.optim import RowwiseAdagrad
from h2rec.training.config import PATHS, TrainConfig
from h2rec.training.evaluation import Ranker, eval_batches, hits_and_gains
from h2rec.training.losses import (
    SHARED_NEGATIVES,
    binary_cross_entropy,
    full_softmax,
    resolve_loss,
    sampled_softmax,
    target_smoothing,
)
from h2rec.training.related_items import RelatedItems
from h2rec.training.shared_negatives import SharedNegatives
from h2rec.training.tiled_ranks import sweep_progress

MONITOR = "valid_NDCG@10"

# Drawn for each target where the vectors of the whole catalog are at hand; elsewhere one.
_RELATED_ITEMS = 8

_CONFIG_KEY = "h2rec_config"
_MODEL_KEY = "h2rec_model"
# On a GPU, looking at a loss waits for it.
_CHECK_EVERY = {"cpu": 1, "cuda": 50}


def check_origin(checkpoint: dict[str, Any], name: str, config: TrainConfig) -> None:
    """Refuses a checkpoint of another model or config with a ValueError that names what differs."""
    saved_name = checkpoint.get(_MODEL_KEY)
    if saved_name != name:
        raise ValueError(f"checkpoint: expected one of model {name!r}, got one of {saved_name!r}")
    saved = TrainConfig.from_json(checkpoint[_CONFIG_KEY])
    # A run may have moved, and its files with it.
    saved = dataclasses.replace(saved, **{path: getattr(config, path) for path in PATHS})
    if config.difference(saved):
        raise ValueError(f"checkpoint: of another config: {config.describe_difference(saved)}")


def train_batches(config: TrainConfig, split: Split, *, rank: int = 0, world_size: int = 1) -> TrainBatches:
    """The batches of a config, for one of its processes; `TrainBatches` says what is refused."""
    needs_negatives = resolve_loss(config.loss, split.num_items) == "bce"
    return TrainBatches(
        split,
        batch_size=config.batch_size,
        max_length=config.max_length,
        num_negatives=(config.num_negatives or 1) if needs_negatives else 0,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )


class Recommender(lightning.LightningModule):
    """Trains a model on `h2rec.data.TrainBatches`; after each epoch the trainer may validate it, by the full ranking.

    An epoch starts its random generators from (seed, epoch, rank), so that a run which goes on from the end of an epoch
    repeats the undisturbed one.

    Args:
        name: of the model, for messages and checkpoints.
        model: what is trained.
        config: how; its ``devices`` are the processes.
        split: its training part is trained on, its validation part validated on.
        related_items: who shares the weight of the targets, given if and only if the config smooths them.
        co_occurrence: from the training part, for the models that align items.
        eval_users: those who are ranked in validation, see `Ranker`.

    Raises:
        FloatingPointError: the loss is not finite; the message names the model, epoch, step, and items or users. On a
            GPU every 50th loss is looked at, so the step may be a later one.
        ValueError: ``related_items`` does not fit the config, or a checkpoint is of another model or config; the
            message names what differs.
    """

    def __init__(
        self,
        name: str,
        model: SequentialModel,
        config: TrainConfig,
        split: Split,
        *,
        related_items: RelatedItems | None = None,
        co_occurrence: CoOccurrence | None = None,
        eval_users: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        share = config.smoothing_of(name)
        if (share > 0) != (related_items is not None):
            raise ValueError(
                f"related_items: expected {'RelatedItems' if share else 'None'} for model {name!r} with "
                f"target_smoothing {share}, got {type(related_items).__name__}"
            )
        self.name = name
        self.model = model
        self.config = config
        self.split = split
        self.related_items = related_items
        self.co_occurrence = co_occurrence
        self.eval_users = eval_users
        self.loss_name = resolve_loss(config.loss, model.num_items)
        self._train_batches: TrainBatches | None = None
        self._shared_negatives: SharedNegatives | None = None
        self._ranker: Ranker | None = None
        self._sparse_tables = [
            layer.weight
            for layer in model.modules()
            if isinstance(layer, torch.nn.Embedding) and layer.sparse
        ]
        self.automatic_optimization = not self._sparse_tables  # Lightning's takes one optimizer

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        tables = set(self._sparse_tables)
        dense = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter not in tables],
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        if not tables:
            return [dense]
        # Not in backward: several processes average the gradient first.
        return [
            dense,
            RowwiseAdagrad(self._sparse_tables, lr=self.config.table_learning_rate, in_backward=False),
        ]

    def train_dataloader(self) -> TrainBatches:
        self._train_batches = train_batches(
            self.config, self.split, rank=self.global_rank, world_size=self.trainer.world_size
        )
        return self._train_batches

    def val_dataloader(self) -> EvalBatches:
        return eval_batches(
            self.split,
            "valid",
            self.model,
            users=self.eval_users,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )

    def on_train_start(self) -> None:
        if self.loss_name == "sampled_softmax":
            count = self.config.num_negatives or SHARED_NEGATIVES
            self._shared_negatives = SharedNegatives(self.split, count, self.device)
        if self.related_items is not None:
            self.related_items.to(self.device)

    def on_train_epoch_start(self) -> None:
        self._train_batches.set_epoch(self.current_epoch)
        sequence = np.random.SeedSequence([self.config.seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        users, auxiliary = self.model.training_outputs(batch, self.co_occurrence)
        next_item = self._next_item_losses(users, batch)
        if self.trainer.world_size > 1:
            share = self._share(batch)
            next_item = {name: loss * share for name, loss in next_item.items()}
        parts = {**next_item, **auxiliary}
        loss = sum(parts.values())
        if batch_idx % _CHECK_EVERY.get(loss.device.type, 1) == 0:
            self._check_finite(parts, batch_idx, batch, users)
        if not self.automatic_optimization:
            self._step(loss)
        size = len(batch.lengths)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        for name, value in ("loss", loss), *parts.items():
            self.log(
                f"train_{name}", value.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True
            )
        return loss

    def _step(self, loss: Tensor) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def _share(self, batch: SequenceBatch) -> Tensor:
        """Own positions per mean positions of a process: what processes average is the mean over all positions."""
        own = (batch.targets != self.model.padding_idx).sum()
        total = own.clone()
        torch.distributed.all_reduce(total)
        return own * self.trainer.world_size / total

    def _next_item_losses(self, users: Tensor, batch: SequenceBatch) -> dict[str, Tensor]:
        is_position = batch.targets != self.model.padding_idx  # [B, T]
        users, targets = users[is_position], batch.targets[is_position]  # [M, C], [M]
        catalog = self.model.item_vectors() if self.loss_name == "full_softmax" else None  # [N, C]
        if self.related_items is None:
            return {"next_item": self._next_item_loss(users, targets, batch, is_position, catalog)}
        related = self.related_items.draw(targets, 1 if catalog is None else _RELATED_ITEMS)
        ids = torch.cat([targets[:, None], related], dim=1)  # [M, 1 + n]
        vectors = self.model.item_vectors(ids) if catalog is None else F.embedding(ids, catalog)
        # One split, whose gradient is one concatenation; slices would each fill a gradient of their own with zeros.
        of_targets, of_related = vectors.split((1, related.shape[1]), dim=1)  # [M, 1, C], [M, n, C]
        return {
            "next_item": self._next_item_loss(
                users, targets, batch, is_position, catalog, (of_related[:, 0], related[:, 0] == targets)
            ),
            "smoothing": target_smoothing(
                users,
                of_targets.squeeze(1),
                of_related,
                self.related_items.shares(targets),
                logistic=self.loss_name == "bce",
            ),
        }

    def _next_item_loss(
        self,
        users: Tensor,
        targets: Tensor,
        batch: SequenceBatch,
        is_position: Tensor,
        catalog: Tensor | None,
        related: Sequence[Tensor] = (),
    ) -> Tensor:
        if catalog is not None:
            return full_softmax(users, catalog, targets)
        if self.loss_name == "bce":
            negatives = batch.negatives[is_position]  # [M, n]
            vectors = self.model.item_vectors(torch.cat([targets[:, None], negatives], dim=1))
            return binary_cross_entropy(users, vectors[:, 0], vectors[:, 1:])
        drawn = self._shared_negatives.draw(batch.user_ids)
        vectors = self.model.item_vectors(torch.cat([targets, drawn.items]))
        target_vectors, negative_vectors = vectors.tensor_split((len(targets),))
        own = drawn.is_own[is_position.nonzero()[:, 0]]  # [M, n]
        return sampled_softmax(users, target_vectors, negative_vectors, drawn.log_expected, own, *related)

    def _check_finite(self, parts: dict[str, Tensor], step: int, batch: SequenceBatch, users: Tensor) -> None:
        for name, value in parts.items():
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"model {self.name!r}: the {name} loss is {value.item()} in epoch {self.current_epoch}, "
                    f"step {step}, with {self._suspects(batch, users)}; a lower learning_rate often helps"
                )

    @torch.no_grad()
    def _suspects(self, batch: SequenceBatch, users: Tensor) -> str:
        """The items of a batch whose vectors are not finite; else such users; else all users."""
        items = torch.cat([batch.item_ids, batch.targets], dim=1).unique()
        items = items[items != self.model.padding_idx]
        items = items[~self.model.item_vectors(items).isfinite().all(1)]
        if len(items):
            return "items " + first_few(self.split.log.catalog.ids[items.cpu().numpy()])
        is_finite = users.isfinite().all(2) | (batch.targets == self.model.padding_idx)  # [B, T]
        bad = batch.user_ids[~is_finite.all(1)]
        user_ids = bad if len(bad) else batch.user_ids
        return "users " + first_few(self.split.log.users[user_ids.cpu().numpy()])

    def on_validation_epoch_start(self) -> None:
        self._ranker = Ranker(
            self.model,
            self.split,
            "valid",
            mask_history=self.config.mask_history,
            users=self.eval_users,
            progress=sweep_progress(self.name, self.model.num_items),
        )

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._ranker.add(batch)

    def on_validation_epoch_end(self) -> None:
        ranks = self._ranker.ranks(self.trainer.world_size)
        self._ranker = None
        values = hits_and_gains(ranks.full)
        for name in ("NDCG@10", "HR@10"):
            # Every process has the ranks of all users, so there is nothing left to reduce.
            self.log(f"valid_{name}", values[name].mean(), prog_bar=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_MODEL_KEY] = self.name
        checkpoint[_CONFIG_KEY] = self.config.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_origin(checkpoint, self.name, self.config)
