"""The training engine: one rank's share of a TorchTitan model in training, its optimizer and its checkpoints.

A step takes documents, the same on every rank: each data-parallel rank takes its rows a microbatch at a time, and
gradients accumulate. The loss is divided by the step's global count of trained tokens (or sequences, or groups, as the
loss says) and gradients are summed, so neither rows, microbatches nor ranks change what is learned. Ranks that share
rows (context parallelism) each have the loss of whole rows and the gradient of their slots.

As ``algorithm.minibatches`` and ``algorithm.epochs`` say, a step takes several optimizer steps, each on a part of its
documents. All of M minibatches are divided by the same number, the step's count over M: every token of the step counts
the same, and the mean of the minibatches' gradients is the gradient of the whole. It is one step for all the rest: of
the schedule, of the policy version, of checkpoints, of staleness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import utils as dist_utils

from forge_hpc.checkpoint import FileRecord
from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import POLICY, ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import AlgorithmConfig, Config, SamplingConfig
from forge_hpc.data.packing import FIELDS, PackedBatch
from forge_hpc.data.types import Document
from forge_hpc.losses import SFTLoss, ValueLoss, add_effective_sample_size, build_loss, step_normalizer
from forge_hpc.losses.base import accepted, columns_of
from forge_hpc.losses.build import LossFn
from forge_hpc.losses.top_entropy import entropy_threshold
from forge_hpc.training.accumulation import accumulation
from forge_hpc.training.checkpointer import TrainerCheckpointer
from forge_hpc.training.export import PeftAdapter, export_model
from forge_hpc.training.flops import step_flops
from forge_hpc.training.lora import Bench, init_adapters, merge_adapters
from forge_hpc.training.minibatches import minibatches
from forge_hpc.training.shard import ModelShard

MISMATCH = "mismatch/logprob_abs_mean"


@dataclass(frozen=True, slots=True)
class Work:
    """What a step had to do, on all ranks together."""

    num_tokens: int = 0
    """In the rows, prompts included."""
    flops: float = 0.0
    """That the model needs for them (``flops.step_flops``)."""


class TrainEngine(ModelShard, Stateful):
    """A model in training. Build it after ``init_distributed``; every method is a collective call of all ranks.

    Args:
        need: which of the run's models it is; None: its policy.
        available_bytes: as ``ModelShard``.
        base: an engine beside which it trains adapters of its own, of the same shapes, on the same frozen weights. Both
            have to be told when their turn begins (``take_turn``).

    Example:
        >>> init_distributed(store_path, rank=0, world_size=1, local_rank=0)
        >>> engine = TrainEngine(cfg, model_dir)
        >>> engine.train_step(documents)["loss"]

    Raises:
        UserError: a model that cannot be trained here, a loss that cannot be built, or degrees that do not fit the
            number of ranks.
    """

    def __init__(
        self,
        cfg: Config,
        model_dir: Path,
        need: ModelNeed | None = None,
        available_bytes: int | None = None,
        base: TrainEngine | None = None,
    ) -> None:
        need = needs_of(cfg).models[POLICY] if need is None else need
        super().__init__(cfg, model_dir, need, sampling_of(cfg, need), available_bytes, base)
        self._bench: Bench = Bench(self.model) if base is None else base._bench
        self.take_turn()
        self.step = 0
        """Steps done."""
        self.num_optimizer_steps = 0
        """Optimizer steps taken, since the optimizer's state began."""
        self.work = Work()
        """Of the last step."""
        init_adapters(self.model, cfg.seed)
        self.optimizers = _build_optimizers(cfg, self.model, need.lr)
        self.lr_schedulers = _build_lr_schedulers(cfg, self.optimizers)
        self.loss_fn = build_model_loss(cfg, need)
        self._columns = columns_of(self.loss_fn, need.head)
        self._top_entropy = self._top_entropy_quantile()
        if self.temperature <= 0:
            raise UserError(
                "rollout.sampling.temperature is 0: greedy samples carry no gradient", "set it above 0, usually to 1"
            )
        self._checkpointer = TrainerCheckpointer(
            self.model,
            self.optimizers,
            self.lr_schedulers,
            {"train_state": self},
            async_save=cfg.checkpoint.async_save,
        )

    def _top_entropy_quantile(self) -> float:
        """The share of the tokens that its loss is on. Raises UserError where that loss cannot be on some of them."""
        a = self.cfg.algorithm
        if self.need.loss is not None or not self.spec.has_logprobs or a.top_entropy_quantile == 1:
            return 1.0
        if not accepted(self.loss_fn, {"weights": None}):
            raise UserError(
                f"algorithm.top_entropy_quantile is not used by algorithm.loss={a.loss}, which takes no weights",
                "leave it at 1, or give the loss a parameter `weights` and have it multiply each token's policy term",
            )
        return a.top_entropy_quantile

    def take_turn(self) -> None:
        """Put its own adapters into the model, where another engine's are."""
        if self.cfg.trainer.lora.enable:
            self._bench.place(self, self.cfg.trainer.lora)

    # ---- training

    def train_step(
        self, documents: Sequence[Document], *, update: bool = True, max_mismatch: float = math.inf
    ) -> dict[str, float]:
        """One step on the documents: an optimizer step on all of them, or several on parts of them.

        Without ``update``, or where the gradient is exactly zero, the step counts and the schedule goes on, and weights
        and moments stay as they are to the last bit: momentum and weight decay are no signal.

        Several: ``algorithm.epochs`` times ``algorithm.minibatches``, see ``minibatches``. What the loss takes its
        ratio against is from before the first of them: the generator's log-probabilities, or where it wants the
        trainer's (``old_logprobs_from``) those of one more forward pass.

        Args:
            update: False only measures.
            max_mismatch: largest ``mismatch/logprob_abs_mean``, nats, with which the step is taken.

        Returns:
            The step's metrics, the same on every rank: ``loss``, ``grad_norm`` (before clipping), ``lr``,
            ``entropy/mean`` (nats), ``kl/mean``, ``tokens/trained``, ``tokens/fill``, ``optimizer_steps``, those of the
            loss, and with generator log-probabilities ``mismatch/logprob_abs_mean``: the mean absolute difference
            between them and the log-probabilities under the weights that the step begins with. Without an update
            ``grad_norm`` and ``tokens/trained`` are 0. Of several optimizer steps they are means; the mismatch is that
            of the first, and ``tokens/trained`` counts a token once an epoch.

        Raises:
            ValueError: documents that cannot be packed; an input of the loss that is not finite.
            UserError: a column that the loss asks for and the documents do not have; a group longer than a row.
            RuntimeError: a loss or gradient norm that is not finite, or a mismatch above the largest; that optimizer
                step is then not taken, and with a mismatch none of the step's.
        """
        self._seed_step()
        batch = self._pack(documents)
        num_trained = batch.num_trained_tokens
        if num_trained == 0:
            raise ValueError("no token of the documents is trained: every loss mask is empty")
        self._check_columns(batch)
        if self._replays_routes and batch.routes is None:
            raise UserError(
                "algorithm.routing_replay, and the documents have no routes",
                "have the recipe make them of completions, by forge_hpc.rollouts.documents",
            )
        counts = (num_trained, batch.num_trained_sequences, batch.num_trained_groups)
        normalizer = step_normalizer(self.loss_fn, *counts)
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        num_minibatches, num_epochs = self.cfg.algorithm.minibatches, self.cfg.algorithm.epochs
        is_several = update and num_minibatches * num_epochs > 1
        documents, figures = self._as_the_step_begins(documents, is_several)
        if not is_several:
            self.work = self._work_of(documents, num_trained)
            batch = self._pack(documents) if figures else batch
            metrics = self._optimizer_step(batch, num_trained, normalizer, update, max_mismatch)
        else:
            self.work = self._work_of(documents, num_trained, num_epochs)
            parts = minibatches(documents, num_minibatches, num_epochs, (self.cfg.seed, self.step))
            share = num_epochs / len(parts)
            done: list[dict[str, float]] = []
            for part in map(self._pack, parts):
                largest = math.inf if done else max_mismatch
                shares = (num_trained * share, normalizer * share)
                done.append(self._optimizer_step(part, *shares, update, largest, 1 / share))
            metrics = _over_optimizer_steps(done)
        self.lr_schedulers.step()
        self.step += 1
        metrics = add_effective_sample_size(metrics) | figures
        return metrics | {"lr": lr, "optimizer_steps": self.num_optimizer_steps}

    def _optimizer_step(
        self,
        batch: PackedBatch,
        num_trained: float,
        normalizer: float,
        update: bool,
        max_mismatch: float,
        sft_scale: float = 1.0,
    ) -> dict[str, float]:
        """An optimizer step on a batch, unless its gradient is zero; its metrics.

        Args:
            num_trained, normalizer: what is divided by, for figures per token and for the loss.
            sft_scale: of the column ``sft``, which has the weights of a whole step.
        """
        self.optimizers.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        num_left = len(self._row_starts(batch))
        plan = self.microbatch
        accumulating = accumulation(
            self.model,
            gathers_once=update and plan.gathers_once,
            sums_once=plan.sums_once,
            is_sharded=self.parallel_dims.fsdp_enabled,
        )
        with torch.set_grad_enabled(update), accumulating as begin:
            for microbatch in self._microbatches(batch):
                num_left -= 1
                begin(num_left == 0)
                for name, value in self._forward_backward(microbatch, num_trained, normalizer, sft_scale).items():
                    sums[name] = sums[name] + value if name in sums else value
        metrics = ({"kl/mean": 0.0} if self.spec.has_logprobs else {}) | self._sum_over_ranks(sums)
        if not math.isfinite(metrics["loss"]):
            raise RuntimeError(f"the loss of step {self.step + 1} is {metrics['loss']}")
        if MISMATCH in metrics:
            metrics[MISMATCH] *= num_trained / max(1, batch.num_trained_tokens)  # a mean over these tokens
        self._check_mismatch(metrics, max_mismatch)
        grad_norm = self._clip_gradients() if update else 0.0
        if is_taken := grad_norm > 0:
            self.optimizers.step()
            self.num_optimizer_steps += 1
        trained = batch.num_trained_tokens if is_taken else 0
        return metrics | {"grad_norm": grad_norm, "tokens/trained": trained, "tokens/fill": batch.fill}

    def _as_the_step_begins(
        self, documents: Sequence[Document], is_several: bool
    ) -> tuple[Sequence[Document], dict[str, float]]:
        """The documents with what is to be known of the weights as they are, by one more forward pass where anything
        is; and its figures.

        That is what the ratio of several optimizer steps is taken against, where the generator's log-probabilities are
        not it; and which tokens have the largest entropies, as factors of their policy terms, of 1 and 0.
        """
        needs_old = is_several and self.spec.has_logprobs
        needs_old = needs_old and (self._is_corrected or documents[0].generator_logprobs is None)
        if not needs_old and self._top_entropy == 1:
            return documents, {}
        logprobs, entropies = self._per_token(documents)
        if needs_old:
            documents = [replace(document, old_logprobs=own) for document, own in zip(documents, logprobs, strict=True)]
        if self._top_entropy == 1:
            return documents, {}
        threshold = entropy_threshold(entropies, [document.loss_mask for document in documents], self._top_entropy)
        weights = [
            document.columns.get("weights", 1.0) * (own >= threshold)
            for document, own in zip(documents, entropies, strict=True)
        ]
        documents = [
            replace(document, columns={**document.columns, "weights": own})
            for document, own in zip(documents, weights, strict=True)
        ]
        return documents, {"entropy/threshold": threshold}

    @property
    def _is_corrected(self) -> bool:
        """Whether the loss corrects for the generator itself, and takes its ratio against the trainer."""
        return getattr(self.loss_fn, "old_logprobs_from", "generator") == "trainer"

    def _work_of(self, documents: Sequence[Document], num_trained: int, num_epochs: int = 1) -> Work:
        lengths = [len(document.token_ids) - 1 for document in documents]
        outputs = None if self.spec.has_logprobs else 1
        lora = self.cfg.trainer.lora.enable
        flops = step_flops(self.spec.hf_config, lengths, num_trained, vocab_size=outputs, lora=lora)
        return Work(num_epochs * sum(lengths), num_epochs * flops)

    def _check_mismatch(self, metrics: dict[str, float], largest: float) -> None:
        mismatch = metrics.get(MISMATCH, 0.0)
        if mismatch > largest:
            raise RuntimeError(
                f"step {self.step + 1}: generator and trainer differ by {mismatch:.2g} nats in the mean "
                f"log-probability of the sampled tokens, and rounding and staleness explain at most {largest:.2g}: the "
                "generators' weights are stale or wrong, their engine computes another model (generator.engine), or "
                "the policy moves too far in a step (trainer.optimizer.lr). The step was not taken"
            )

    def _clip_gradients(self) -> float:
        """Clip to ``max_norm``; the global norm before. Raises RuntimeError where it is not finite."""
        norm = dist_utils.clip_grad_norm_(
            self.model.parameters(),
            self.cfg.trainer.training.max_norm,
            foreach=True,
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        if not math.isfinite(grad_norm := float(norm)):
            raise RuntimeError(f"the gradient norm of step {self.step + 1} is {grad_norm}")
        return grad_norm

    def _seed_step(self) -> None:
        """Random numbers of a step follow from seed, step and rank alone: there is no generator's state to save."""
        seed = np.random.SeedSequence([self.cfg.seed, self.step, dist.get_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0] >> 1))

    def _check_columns(self, batch: PackedBatch) -> None:
        """Raises UserError where the loss asks for a column that the documents do not have."""
        missing = [name for name in self._columns if name not in batch.columns]
        if missing:
            has = ", ".join(name for name in batch.columns if name != "advantages") or "none but advantages"
            raise UserError(
                f"the loss of this model takes the column {missing[0]!r}, and the documents do not have it ({has})",
                f"have the recipe fill document.columns[{missing[0]!r}], or give the loss an option of that name",
            )

    def _forward_backward(
        self, microbatch: dict[str, Any], num_trained: float, normalizer: float, sft_scale: float
    ) -> dict[str, torch.Tensor]:
        """Add the microbatch's gradients, where they are enabled; return its share of the step's metrics."""
        outputs = self._forward(microbatch)
        given = {name: microbatch[name] for name in ("mask", "segment_ids", "group_ids", "advantages")}
        given |= {name: microbatch.get(name) for name in (*FIELDS, "weights")}
        given |= {name: microbatch[name] for name in self._columns}
        given |= self._own_inputs(given, *outputs) if self.spec.has_logprobs else {"values": outputs[0]}
        try:
            output = self.loss_fn(**accepted(self.loss_fn, given | {"normalizer": normalizer}))
        except (TimeoutError, ConnectionError) as error:  # as such it would say that this process is lost
            raise RuntimeError(f"the loss has raised {type(error).__name__}: {error}") from error
        shares = {}
        if (weights := microbatch.get("sft")) is not None:  # examples beside the episodes (``rollouts.sft``)
            sft = -torch.where(weights != 0, sft_scale * weights * outputs[0], 0).sum()
            output.loss = output.loss + sft
            shares["sft/loss"] = sft.detach() / self.cfg.algorithm.sft.coef
        if torch.is_grad_enabled():
            output.loss.backward()
        shares["loss"] = output.loss.detach()
        if self.spec.has_logprobs:
            shares |= _token_metrics(given, num_trained)
        return shares | output.metrics

    def _own_inputs(
        self, given: dict[str, torch.Tensor | None], logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the loss of a language model gets of it.

        The policy that sampled the tokens is the one that clipping holds the new policy close to, unless the loss
        corrects for it itself: then it is the policy before this step.
        """
        old = given["old_logprobs"] if self._is_corrected else given["generator_logprobs"]
        if old is None:
            old = given["old_logprobs"]
        old = logprobs.detach() if old is None else old
        return {"logprobs": logprobs, "old_logprobs": old, "entropy": entropy}

    def _sum_over_ranks(self, shares: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([value.float() for value in shares.values()])
        mesh = self.parallel_dims.get_optional_mesh("batch")  # ranks that share rows know the same of them
        if mesh is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return dict(zip(shares, values.tolist(), strict=True))

    # ---- weights and checkpoints

    def hf_state_dict(self, *, cast: bool = True) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face name in ``model.dtype``: tensors, or DTensors where the model is sharded.
        Without ``cast`` they are in the training dtype.

        In the training dtype they are views of the weights, which the next step changes, or with LoRA copies of those
        that an adapter was merged into. With tied embeddings
        ``lm_head.weight`` is there too, the same tensor: vLLM's head on the CPU stays stale without it.
        """
        dtype = TORCH_DTYPE_MAP[self.cfg.model.dtype]
        state = {name: tensor.detach() for name, tensor in self._to_hf().items()}
        if cast:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        if self.spec.is_tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def published(self, *, cast: bool = True) -> dict[str, torch.Tensor]:
        """What generators get of the policy: ``hf_state_dict``, or with ``trainer.lora.publish=adapters`` the adapters,
        by PEFT's names; without ``cast`` they are views of the parameters."""
        if not self.cfg.trainer.lora.sends_adapters:
            return self.hf_state_dict(cast=cast)
        tensors = PeftAdapter(self.model.state_dict(), self.spec, self.cfg.trainer.lora, "").tensors()
        dtype = TORCH_DTYPE_MAP[self.cfg.model.dtype]
        return {name: tensor.to(dtype) if cast else tensor for name, tensor in tensors.items()}

    def export(self, directory: Path, ends: Sequence[int] = ()) -> None:
        """Write the model in Hugging Face format in ``model.dtype``, atomically, with the tokenizer it came with.

        ``ends`` are tokens that it has learned to end an answer with.
        """
        export_model(self.model.state_dict(), self.spec, self.cfg, self.model_dir, directory, ends)

    def save(self, directory: Path) -> None:
        """Save weights, optimizer, schedule and step into a directory that does not exist yet.

        With ``checkpoint.async_save`` it returns once the state is staged in memory; ``wait_for_save`` tells when it is
        written.

        Raises:
            CheckpointError: this save failed or, where saving is asynchronous, the one before; told once.
        """
        self._materialize_optimizer_state()
        self._checkpointer.save_to(directory)

    def prepare_to_save(self) -> None:
        """See that the first save is held up no longer than the others: where saves are staged in host memory, it is
        taken beside what comes next, and the optimizer gets its state, as if no step had been taken. Cheap to repeat.
        """
        if self._checkpointer.stages:
            self._materialize_optimizer_state()
            self._checkpointer.reserve()

    def wait_for_save(self) -> dict[str, FileRecord]:
        """Return when the last save is on disk: the files that this rank wrote, as ``CheckpointStore.commit`` wants
        them. Not a collective call; it may run in another thread, beside the training.

        Raises:
            CheckpointError: it failed, on this rank or another; told once, and the next save may work.
        """
        return self._checkpointer.saved()

    def load(self, directory: Path) -> None:
        """Continue from a save of this model, made on any number of ranks.

        Raises:
            FileNotFoundError: no such directory.
            CheckpointError: it cannot be read or belongs to another model.
        """
        self._materialize_optimizer_state()
        self._checkpointer.load_from(directory)
        for scheduler in self.lr_schedulers:  # a rate edited since the save counts from the first step on
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
        self.num_optimizer_steps = self._optimizer_steps_of_state()

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds beside weights, optimizer and schedule."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.step = state_dict["step"]

    def _optimizer_steps_of_state(self) -> int:
        """As Adam counts them, the same for all parameters."""
        steps = [state["step"] for optimizer in self.optimizers for state in optimizer.state.values()]
        first = steps[0]
        return int(first.full_tensor() if isinstance(first, DTensor) else first)

    def _to_hf(self) -> dict[str, torch.Tensor]:
        return self.spec.adapter.to_hf(merge_adapters(self.model.state_dict(), self.cfg.trainer.lora))

    def _materialize_optimizer_state(self) -> None:
        """Create Adam's state before the first step as if no step had been taken.

        torchtitan 0.3.0 does so by a step with zero gradients, which counts as one: a run saved at step 0 would go on
        with another bias correction than one that was not.
        """
        for optimizer in self.optimizers:
            if not optimizer.state:
                optimizer.zero_grad()
                init_optim_state(optimizer)
                for state in optimizer.state.values():
                    state["step"].zero_()


def sampling_of(cfg: Config, policy: ModelNeed) -> SamplingConfig:
    """The distribution that log-probabilities are of: the one that is sampled from; where examples are learned the
    model's own."""
    learns_examples = policy.loss == "sft" or needs_of(cfg).learns_from == "examples"
    return SamplingConfig() if learns_examples else cfg.rollout.sampling


def build_model_loss(cfg: Config, need: ModelNeed) -> LossFn:
    """What a model is trained with. Raises UserError: a loss that cannot be built."""
    if need.loss == "sft":
        return SFTLoss()
    if need.loss is None and need.head == "value":
        return ValueLoss()
    own = AlgorithmConfig(loss_args=dict(need.loss_args))
    name, options = (cfg.algorithm.loss, cfg.algorithm) if need.loss is None else (need.loss, own)
    return build_loss(name, options, cfg.rollout.max_response_tokens)


def _over_optimizer_steps(done: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its optimizer steps: means, which are those over all its tokens in all
    epochs, but for the mismatch, which is to be known of the weights that the step begins with."""
    names = dict.fromkeys(name for metrics in done for name in metrics)
    means = {name: math.fsum(metrics.get(name, 0.0) for metrics in done) / len(done) for name in names}
    means["tokens/trained"] = sum(metrics["tokens/trained"] for metrics in done)
    return means | {name: done[0][name] for name in (MISMATCH,) if name in means}


def _token_metrics(given: dict[str, Any], num_trained: float) -> dict[str, torch.Tensor]:
    mask = given["mask"]
    shares = {"entropy/mean": torch.where(mask, given["entropy"].detach(), 0).sum() / num_trained}
    if given["generator_logprobs"] is not None:
        difference = (given["logprobs"].detach() - given["generator_logprobs"]).abs()
        shares[MISMATCH] = torch.where(mask, difference, 0).sum() / num_trained
    return shares


def _build_optimizers(cfg: Config, model: torch.nn.Module, lr: float | None = None) -> OptimizersContainer:
    optimizer = cfg.trainer.optimizer
    group = ParamGroupConfig(
        pattern=".*",
        optimizer_name=optimizer.name,
        optimizer_kwargs={
            "lr": optimizer.lr if lr is None else lr,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
    )
    return OptimizersContainer.Config(param_groups=[group]).build(model_parts=[model])


def _build_lr_schedulers(cfg: Config, optimizers: OptimizersContainer) -> LRSchedulersContainer:
    scheduler, steps = cfg.trainer.lr_scheduler, cfg.trainer.training.steps
    is_constant = scheduler.decay_ratio is None
    return LRSchedulersContainer.Config(
        warmup_steps=min(scheduler.warmup_steps, steps),
        # torchtitan takes None for a decay from the end of the warm-up; ours is a constant rate, without an end.
        total_steps=2**31 if is_constant else steps,
        decay_ratio=0.0 if is_constant else scheduler.decay_ratio,
        decay_type=scheduler.decay_type,
        min_lr_factor=scheduler.min_lr_factor,
    ).build(optimizers=optimizers, training_steps=steps)
