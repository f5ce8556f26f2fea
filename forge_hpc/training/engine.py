"""The training engine: one rank's share of a TorchTitan model, its optimizer and its checkpoints.

A step takes documents, the same on every rank: they are packed into rows, each data-parallel rank takes its rows a
microbatch at a time, and gradients accumulate. The loss is divided by the step's global count of trained tokens (or
sequences, as the loss says) and gradients are summed, so neither rows, microbatches nor ranks change what is learned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.compile import apply_compile
from torchtitan.tools.utils import set_default_dtype

from forge_hpc.checkpoint import FileRecord
from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import POLICY
from forge_hpc.config.recipes import load_recipe
from forge_hpc.config.schema import Config, SamplingConfig
from forge_hpc.config.split import plan as placement
from forge_hpc.data.packing import PackedBatch, pack, unpack
from forge_hpc.data.types import Document
from forge_hpc.losses import SFTLoss, add_effective_sample_size, build_loss, step_normalizer
from forge_hpc.losses.registry import LossFn
from forge_hpc.models.attention import attention_inputs, inner_attention_config
from forge_hpc.models.device import device_type, local_device
from forge_hpc.models.head import Truncation
from forge_hpc.models.spec import ModelSpec, load_hf_weights, load_spec
from forge_hpc.training.checkpointer import TrainerCheckpointer
from forge_hpc.training.export import export_model
from forge_hpc.training.lora import add_adapters, init_adapters, merge_adapters
from forge_hpc.training.memory import RESERVE_BYTES, MicrobatchPlan, plan_microbatch

logger = logging.getLogger(__name__)


class TrainEngine(Stateful):
    """A model in training. Build it after ``init_distributed``; every method is a collective call of all ranks.

    Example:
        >>> init_distributed(store_path, rank=0, world_size=1, local_rank=0)
        >>> engine = TrainEngine(cfg, model_dir)
        >>> engine.train_step(documents)["loss"]

    Raises:
        UserError: a model that cannot be trained here, or degrees that do not fit the number of ranks.
    """

    def __init__(self, cfg: Config, model_dir: Path) -> None:
        self.cfg = cfg
        self.model_dir = model_dir
        self.device = local_device()
        self.step = 0
        """Optimizer steps taken."""
        training, parallelism = cfg.trainer.training, _parallelism_config(cfg)
        self.parallel_dims = _parallel_dims(parallelism)
        param_dtype = TORCH_DTYPE_MAP["float32" if device_type() == "cpu" else training.mixed_precision_param]
        # On a GPU few lengths of rows: each new one is another shape to compile, or to allocate, for.
        self._row_len_multiple = math.lcm(128 if device_type() == "cuda" else 8, self.parallel_dims.tp)
        self.spec = load_spec(
            model_dir,
            max_positions=_round_up(training.seq_len, self._row_len_multiple),
            inner_attention=inner_attention_config(param_dtype),
            parallelism=parallelism,
        )
        self.microbatch = _plan_microbatch(cfg, self.spec, self.parallel_dims)
        if cfg.trainer.lora.enable:
            self.spec = add_adapters(self.spec, cfg.trainer.lora)
        self.model = self._build_model(parallelism, param_dtype)
        load_hf_weights(self.model, self.spec, model_dir)
        init_adapters(self.model, cfg.seed)
        self.optimizers = _build_optimizers(cfg, self.model)
        self.lr_schedulers = _build_lr_schedulers(cfg, self.optimizers)
        is_sft = load_recipe(cfg).needs(cfg).models[POLICY].loss == "sft"
        self.loss_fn: LossFn = (
            SFTLoss() if is_sft else build_loss(cfg.algorithm.loss, cfg.algorithm, cfg.rollout.max_response_tokens)
        )
        sampling = SamplingConfig() if is_sft else cfg.rollout.sampling
        self.temperature = sampling.temperature
        self.truncation = Truncation(sampling.min_p, sampling.top_k, sampling.top_p)
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

    # ---- training

    def train_step(
        self, documents: Sequence[Document], *, update: bool = True, max_mismatch: float = math.inf
    ) -> dict[str, float]:
        """One optimizer step on all documents.

        Without ``update``, or where the gradient is exactly zero, the step counts and the schedule goes on, and weights
        and moments stay as they are to the last bit: momentum and weight decay are no signal.

        Args:
            update: False only measures.
            max_mismatch: largest ``mismatch/logprob_abs_mean``, nats, with which the step is taken.

        Returns:
            The step's metrics, the same on every rank: ``loss``, ``grad_norm`` (before clipping), ``lr``,
            ``entropy/mean`` (nats), ``kl/mean``, ``tokens/trained``, ``tokens/fill``, those of the loss, and with
            generator log-probabilities ``mismatch/logprob_abs_mean``: the mean absolute difference between them and
            the log-probabilities under the weights that the step begins with. Without an update ``grad_norm`` and
            ``tokens/trained`` are 0.

        Raises:
            ValueError: documents that cannot be packed; an input of the loss that is not finite.
            RuntimeError: a loss or gradient norm that is not finite, or a mismatch above the largest; weights and
                optimizer are then untouched.
        """
        self._seed_step()
        batch = self._pack(documents)
        num_trained = batch.num_trained_tokens
        if num_trained == 0:
            raise ValueError("no token of the documents is trained: every loss mask is empty")
        normalizer = step_normalizer(self.loss_fn, num_trained, batch.num_trained_sequences)
        self.optimizers.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        with torch.set_grad_enabled(update):
            for microbatch in self._microbatches(batch):
                for name, value in self._forward_backward(microbatch, num_trained, normalizer).items():
                    sums[name] = sums[name] + value if name in sums else value
        metrics = {"kl/mean": 0.0} | add_effective_sample_size(self._sum_over_ranks(sums))
        if not math.isfinite(metrics["loss"]):
            raise RuntimeError(f"the loss of step {self.step + 1} is {metrics['loss']}")
        self._check_mismatch(metrics, max_mismatch)
        grad_norm = self._clip_gradients() if update else 0.0
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        if grad_norm > 0:
            self.optimizers.step()
        else:
            num_trained = 0
        self.lr_schedulers.step()
        self.step += 1
        return metrics | {"grad_norm": grad_norm, "lr": lr, "tokens/trained": num_trained, "tokens/fill": batch.fill}

    def _check_mismatch(self, metrics: dict[str, float], largest: float) -> None:
        mismatch = metrics.get("mismatch/logprob_abs_mean", 0.0)
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

    def logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Log-probabilities of the documents' tokens under the current weights, at the training temperature.

        Returns:
            On every rank, [L] float32 for each document, as ``Document.ref_logprobs`` wants it: at the tokens of its
            loss mask, 0 elsewhere.
        """
        batch = self._pack(documents)
        values = torch.zeros(batch.labels.shape, device=self.device)
        size = self.microbatch.num_rows
        with torch.no_grad():
            for start in self._row_starts(batch):
                microbatch = self._to_device(batch.rows(start, start + size))
                logprobs, _ = self._forward(microbatch)
                values[start : start + size] = logprobs * microbatch["mask"]
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return unpack(values.cpu().numpy(), batch, documents)

    def _seed_step(self) -> None:
        """Random numbers of a step follow from seed, step and rank alone: there is no generator's state to save."""
        seed = np.random.SeedSequence([self.cfg.seed, self.step, dist.get_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0] >> 1))

    def eval_loss(self, documents: Sequence[Document]) -> float:
        """Mean negative log-likelihood (nats) of the documents' trained tokens; no step is taken."""
        num_trained = sum(int(np.count_nonzero(document.loss_mask[1:])) for document in documents)
        return -sum(float(values.sum(dtype=np.float64)) for values in self.logprobs(documents)) / num_trained

    def _pack(self, documents: Sequence[Document]) -> PackedBatch:
        training = self.cfg.trainer.training
        return pack(
            documents,
            training.seq_len,
            num_rows_multiple=self._data_parallel_degree * self.microbatch.num_rows,
            row_len_multiple=self._row_len_multiple,
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

    def _to_device(self, rows: dict[str, np.ndarray | None]) -> dict[str, Any]:
        microbatch: dict[str, Any] = {
            name: None if array is None else torch.from_numpy(array).to(self.device, non_blocking=True)
            for name, array in rows.items()
        }
        assert rows["positions"] is not None and rows["mask"] is not None
        # A GPU has the head compute what is trained, and something on a rank that has nothing to train. On the CPU all
        # of it: heads are small there, and sums of other terms would be others in the last bit.
        slots = np.flatnonzero(rows["mask"]) if self.device.type == "cuda" else np.arange(rows["mask"].size)
        microbatch["slots"] = torch.from_numpy(slots if len(slots) else np.zeros(1, int)).to(self.device)
        microbatch["attention"] = attention_inputs(self.spec.inner_attention, rows["positions"], self.device)
        return microbatch

    def _forward(self, microbatch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the labels: [R, T] float32 each, of the trained ones at least, else 0."""
        hidden = self.model(
            microbatch["input_ids"], positions=microbatch["positions"], attention_masks=microbatch["attention"]
        )
        labels, slots = microbatch["labels"], microbatch["slots"]
        values = self.model.lm_head(hidden, labels.flatten()[slots], slots, self.temperature, self.truncation)
        none = torch.zeros(labels.numel(), device=self.device)
        logprobs, entropies = (none.index_copy(0, slots, value).view_as(labels) for value in values)
        return logprobs, entropies

    def _forward_backward(
        self, microbatch: dict[str, Any], num_trained: int, normalizer: int
    ) -> dict[str, torch.Tensor]:
        """Add the microbatch's gradients, where they are enabled; return its share of the step's metrics."""
        logprobs, entropy = self._forward(microbatch)
        mask, generator_logprobs = microbatch["mask"], microbatch["generator_logprobs"]
        # The policy that sampled the tokens is the one that clipping holds the new policy close to, unless the loss
        # corrects for it itself: then it is the policy before this step.
        from_trainer = getattr(self.loss_fn, "old_logprobs_from", "generator") == "trainer"
        output = self.loss_fn(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if from_trainer or generator_logprobs is None else generator_logprobs,
            advantages=microbatch["advantages"],
            mask=mask,
            generator_logprobs=generator_logprobs,
            ref_logprobs=microbatch["ref_logprobs"],
            entropy=entropy,
            segment_ids=microbatch["segment_ids"],
            normalizer=normalizer,
        )
        if torch.is_grad_enabled():
            output.loss.backward()
        shares = {
            "loss": output.loss.detach(),
            "entropy/mean": torch.where(mask, entropy.detach(), 0).sum() / num_trained,
        }
        if generator_logprobs is not None:
            difference = (logprobs.detach() - generator_logprobs).abs()
            shares["mismatch/logprob_abs_mean"] = torch.where(mask, difference, 0).sum() / num_trained
        return shares | output.metrics

    def _sum_over_ranks(self, shares: dict[str, torch.Tensor]) -> dict[str, float]:
        values = torch.stack([value.float() for value in shares.values()])
        mesh = self.parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return dict(zip(shares, values.tolist(), strict=True))

    # ---- weights and checkpoints

    def hf_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face name in ``model.dtype``: tensors, or DTensors where the model is sharded.

        In the training dtype they are views of the weights, which the next step changes, or with LoRA copies of those
        that an adapter was merged into. With tied embeddings
        ``lm_head.weight`` is there too, the same tensor: vLLM's head on the CPU stays stale without it.
        """
        dtype = TORCH_DTYPE_MAP[self.cfg.model.dtype]
        state = {name: tensor.detach().to(dtype) for name, tensor in self._to_hf().items()}
        if self.spec.is_tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

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

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds beside weights, optimizer and schedule."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.step = state_dict["step"]

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

    # ---- building

    def _build_model(self, parallelism: ParallelismConfig, param_dtype: torch.dtype) -> Any:
        cfg, dims = self.cfg.trainer, self.parallel_dims
        master_dtype = TORCH_DTYPE_MAP[cfg.training.dtype]
        with torch.device("meta"), set_default_dtype(master_dtype):
            model: Any = self.spec.config.build()
        ac_config = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[self.microbatch.mode]
        compiles = device_type() == "cuda" if cfg.compile.enable is None else cfg.compile.enable
        compile_config = CompileConfig(enable=compiles, components=["model"])
        if dims.world_size == 1 and param_dtype == master_dtype:
            # Nothing to shard and nothing to cast: FSDP would only cost time.
            if ac_config is not None:
                ac_config.build(dump_folder="").apply(model)
            if compile_config.enable:
                apply_compile(model, compile_config=compile_config, parallel_dims=dims)
        else:
            model = self.spec.parallelize(
                model,
                parallel_dims=dims,
                training=TrainingConfig(
                    dtype=cfg.training.dtype, mixed_precision_param=str(param_dtype).removeprefix("torch.")
                ),
                parallelism=parallelism,
                compile_config=compile_config,
                ac_config=ac_config,
                dump_folder="",
            )
            if device_type() == "cpu":
                _use_plain_sums(model)
        model.to_empty(device=self.device)
        with torch.no_grad():
            model.init_weights()
        model._skip_lm_head = True  # the engine applies it, to what is trained
        model.train()
        return model


def _use_plain_sums(model: torch.nn.Module) -> None:
    """gloo knows no PREMUL_SUM, which FSDP of torch 2.13 takes for a gradient factor that is not the world size."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _parallelism_config(cfg: Config) -> ParallelismConfig:
    degrees = cfg.trainer.parallelism
    return ParallelismConfig(
        spmd_backend="partial_dtensor",  # the one that works with gloo on torch 2.13
        # One rank has nothing to gather: its parameters in the compute dtype stay until the backward pass.
        fsdp_reshard_after_forward="never" if dist.get_world_size() == 1 else "default",
        data_parallel_replicate_degree=degrees.data_parallel_replicate_degree,
        data_parallel_shard_degree=degrees.data_parallel_shard_degree,
        tensor_parallel_degree=degrees.tensor_parallel_degree,
        expert_parallel_degree=degrees.expert_parallel_degree,
    )


def _parallel_dims(parallelism: ParallelismConfig) -> ParallelDims:
    dist_utils.set_spmd_backend(parallelism.spmd_backend)
    try:
        dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    except AssertionError as error:
        raise UserError(
            f"trainer.parallelism does not fit {dist.get_world_size()} trainer ranks: {error}",
            "replicate * shard * tensor degree must be the number of ranks; a shard degree of -1 takes what is left",
        ) from error
    dims.build_mesh()
    return dims


def _plan_microbatch(cfg: Config, spec: ModelSpec, dims: ParallelDims) -> MicrobatchPlan:
    """What a microbatch is, the same on all ranks: the one with the least memory decides."""
    training, mode = cfg.trainer.training, cfg.trainer.activation_checkpoint.mode
    if device_type() == "cpu":
        return MicrobatchPlan(training.local_batch_size or 1, "none" if mode == "auto" else mode, 0, 0)
    with torch.device("meta"):
        num_params = sum(parameter.numel() for parameter in spec.config.build().parameters())
    free, total = torch.cuda.mem_get_info()
    gpus = cfg.cluster.gpus_per_node if cfg.cluster.gpus_per_node is not None else torch.cuda.device_count()
    if placement(cfg, gpus).shared_gpus:  # with a generator, which may not have taken its share yet
        free = min(free, int(total * (1 - cfg.generator.engine.gpu_memory_utilization)))
    # Weights, gradients and two moments in the training dtype, and weights in the compute dtype where one rank keeps
    # them; a reference has weights too.
    num_copies = (2 if cfg.trainer.lora.enable else 4) + cfg.reference.enable
    states = num_params * (num_copies * TORCH_DTYPE_MAP[training.dtype].itemsize + 2) // (dims.dp_shard * dims.tp)
    available = torch.tensor(free - states - RESERVE_BYTES, device=local_device())
    dist.all_reduce(available, dist.ReduceOp.MIN)
    plan = plan_microbatch(
        spec.hf_config,
        num_params,
        training.seq_len,
        int(available),
        num_rows=training.local_batch_size,
        mode=mode,
        tensor_parallel=dims.tp,
    )
    logger.info("%s", plan)
    return plan


def _build_optimizers(cfg: Config, model: torch.nn.Module) -> OptimizersContainer:
    optimizer = cfg.trainer.optimizer
    group = ParamGroupConfig(
        pattern=".*",
        optimizer_name=optimizer.name,
        optimizer_kwargs={
            "lr": optimizer.lr,
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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
