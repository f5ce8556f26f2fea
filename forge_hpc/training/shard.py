"""One rank's share of a model, trained or frozen, and what it says of documents.

Documents are the same on every rank: they are packed into rows, and each data-parallel rank takes its rows a microbatch
at a time. Context-parallel ranks take the same rows, and each computes its share of the slots; what comes of it is put
together again, so that all that is said of rows and sequences is said of whole ones, on each of these ranks alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from forge_hpc.config.errors import UserError
from forge_hpc.config.models import check_invariant
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.schema import Config, SamplingConfig
from forge_hpc.data.packing import PackedBatch, pack, unpack
from forge_hpc.data.types import Document
from forge_hpc.invariance import prepare_invariance
from forge_hpc.models import flash3
from forge_hpc.models.attention import attention_inputs
from forge_hpc.models.context import shared_rows
from forge_hpc.models.device import local_device, to_device
from forge_hpc.models.experts import replay_routes
from forge_hpc.models.head import Truncation
from forge_hpc.models.spec import ModelSpec, load_hf_weights, read_hf_config
from forge_hpc.sizing.microbatch import MicrobatchPlan
from forge_hpc.training.build import Shape

logger = logging.getLogger(__name__)


class ModelShard:
    """A model with the weights of a directory. Every method is a collective call of all ranks.

    Args:
        need: what it is.
        available_bytes: GPU memory for its activations (``Shape.activation_bytes``); None: what it leaves alone.
        base: one whose model this is too.

    Raises:
        UserError: a model that cannot be trained here, or degrees that do not fit the number of ranks.
    """

    def __init__(
        self,
        cfg: Config,
        model_dir: Path,
        need: ModelNeed,
        sampling: SamplingConfig,
        available_bytes: int | None = None,
        base: ModelShard | None = None,
    ) -> None:
        self.cfg = cfg
        self.model_dir = model_dir
        self.need = need
        self.device = local_device()
        if cfg.model.batch_invariant:
            check_invariant(read_hf_config(model_dir), f"the model in {model_dir}")
            prepare_invariance("a trainer" if need.trained else "a frozen model")
            flash3.activate()
        self.shape = Shape.of(cfg)
        self.parallel_dims = self.shape.dims
        self.temperature = sampling.temperature
        self.truncation = Truncation(sampling.min_p, sampling.top_k, sampling.top_p)
        self.microbatch: MicrobatchPlan
        self.spec: ModelSpec
        self.model: Any
        if base is not None:
            self.microbatch, self.spec, self.model = base.microbatch, base.spec, base.model
        else:
            spec = self.shape.spec(model_dir)
            if available_bytes is None:
                available_bytes = self.shape.activation_bytes({"": (model_dir, need)})
            self.microbatch = self.shape.plan(spec, available_bytes, trained=need.trained)
            self.spec = self.shape.with_parts(spec, need)
            self.model = self.shape.build(self.spec, need, self.microbatch.mode if need.trained else "none")
            load_hf_weights(self.model, self.spec, model_dir, needs_head=not need.trained)
        # Other models than the policy choose for themselves: the generator's experts are not theirs.
        self._replays_routes = cfg.algorithm.routing_replay and need.trained and self.spec.has_logprobs
        if self._replays_routes and not self.spec.is_moe:
            raise UserError(f"algorithm.routing_replay, and the model in {model_dir} has no experts", "leave it off")

    def logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Log-probabilities of the documents' tokens under the current weights, at the training temperature.

        Returns:
            On every rank, [L] float32 for each document, as ``Document.ref_logprobs`` wants it: at the tokens of its
            loss mask, 0 elsewhere.

        Raises:
            UserError: the model has a value head.
        """
        if not self.spec.has_logprobs:
            raise UserError("a model with a value head has no log-probabilities", "ask for its values()")
        return self._per_token(documents)[0]

    def values(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """What a model with a value head says, [L] float32 for each document: at a token of the loss mask the value of
        what stands before it, 0 elsewhere.

        Raises:
            UserError: the model has none.
        """
        if self.spec.has_logprobs:
            raise UserError("a model without a value head has no values", 'give it one: ModelNeed(head="value")')
        return self._per_token(documents)[0]

    def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean negative log-likelihood (nats) of the documents' trained tokens; no step is taken."""
        num_trained = sum(int(np.count_nonzero(document.loss_mask[1:])) for document in documents)
        return -sum(float(values.sum(dtype=np.float64)) for values in self.logprobs(documents)) / num_trained

    def warm_up(self) -> None:
        """Compile what a step needs, and load its libraries, on a microbatch of no meaning: nothing of the model
        changes. A collective call.

        There are two: full rows, and then shorter ones of two documents each, at which what was compiled for the first
        is compiled anew for rows and documents of any length, as it would be at a second step.

        Nothing is done where full rows may not fit the GPU, for a model that only visits it, and with experts, which
        count the tokens that they get.
        """
        if self.spec.is_moe or self.need.offload or not self.microbatch.fits:
            return
        longest, num_rows = self.cfg.trainer.training.seq_len, self._data_parallel_degree * self.microbatch.num_rows
        shorter = max(1, (longest - self.shape.row_len_multiple) // 2)
        for num_slots, num_documents in ((longest, 1), (shorter, 2)):
            document = Document(np.zeros(num_slots + 1, np.int32), np.ones(num_slots + 1, bool))
            batch = self._pack([document] * num_rows * num_documents)
            with torch.set_grad_enabled(self.need.trained):
                outputs = self._forward(next(self._microbatches(batch)))
                if self.need.trained:
                    torch.stack([output.sum() for output in outputs]).sum().backward()
        self.model.zero_grad()

    def _per_token(self, documents: Sequence[Document]) -> list[list[np.ndarray]]:
        """Each of the outputs of ``_forward`` as ``logprobs`` gives them."""
        batch = self._pack(documents)
        shape = (2 if self.spec.has_logprobs else 1, batch.num_rows, batch.row_len)
        outputs = torch.zeros(shape, device=self.device)
        size = self.microbatch.num_rows
        with torch.no_grad():
            for start in self._row_starts(batch):
                microbatch = self._to_device(batch.rows(start, start + size))
                for values, output in zip(outputs, self._forward(microbatch), strict=True):
                    values[start : start + size] = output * microbatch["mask"]
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            dist.all_reduce(outputs, group=mesh.get_group())
        return [unpack(values, batch, documents) for values in outputs.cpu().numpy()]

    def _pack(self, documents: Sequence[Document]) -> PackedBatch:
        return pack(
            documents,
            self.cfg.trainer.training.seq_len,
            num_rows_multiple=self._data_parallel_degree * self.microbatch.num_rows,
            row_len_multiple=self.shape.row_len_multiple,
            num_ranks=self._data_parallel_degree,
        )

    @property
    def _data_parallel_degree(self) -> int:
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def _row_starts(self, batch: PackedBatch) -> range:
        """First rows of this rank's microbatches; all ranks have equally many."""
        size = self.microbatch.num_rows
        mesh = self.parallel_dims.get_optional_mesh("batch")
        first = 0 if mesh is None else mesh.get_local_rank() * size
        return range(first, batch.num_rows, size * self._data_parallel_degree)

    def _microbatches(self, batch: PackedBatch) -> Iterator[dict[str, Any]]:
        size = self.microbatch.num_rows
        for start in self._row_starts(batch):
            yield self._to_device(batch.rows(start, start + size))

    def _to_device(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        """The rows, and what the model takes of them: of shared rows this rank's slots alone."""
        positions, shared = rows["positions"], None
        if self.parallel_dims.cp_enabled:
            shared = shared_rows(positions, self.parallel_dims.get_mesh("cp").get_group(), self.device)
            rows = rows | {name: shared.own(rows[name]) for name in ("input_ids", "labels", "positions")}
        microbatch: dict[str, Any] = {name: to_device(array, self.device) for name, array in rows.items()}
        # A GPU has the head compute what is trained, and something on a rank that has nothing to train. On the CPU all
        # of it: heads are small there, and sums of other terms would be others in the last bit.
        trained = rows["mask"] | (rows["sft"] != 0) if "sft" in rows else rows["mask"]
        trained = trained if shared is None else shared.own(trained)
        slots = np.flatnonzero(trained) if self.device.type == "cuda" else np.arange(trained.size)
        microbatch["slots"] = to_device(slots if len(slots) else np.zeros(1, int), self.device)
        microbatch["attention"] = attention_inputs(self.spec.inner_attention, positions, self.device, shared)
        microbatch["shared"] = shared
        return microbatch

    def _forward(self, microbatch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities and entropies of the labels, or values: [R, T] float32 each, of the trained ones at least,
        else 0."""
        if self._replays_routes:
            replay_routes(self.model, microbatch.get("routes"))
        hidden = self.model(
            microbatch["input_ids"], positions=microbatch["positions"], attention_masks=microbatch["attention"]
        )
        labels, slots = microbatch["labels"], microbatch["slots"]
        if self.spec.has_logprobs:
            outputs = self.model.lm_head(hidden, labels.flatten()[slots], slots, self.temperature, self.truncation)
        else:
            outputs = (self.model.lm_head(hidden, slots),)
        none = torch.zeros(labels.numel(), device=self.device)
        own = (none.index_copy(0, slots, output) for output in outputs)
        shared = microbatch["shared"]
        return tuple((x if shared is None else shared.whole(x)).view(len(labels), -1) for x in own)
