"""The configuration of a run: typed dataclasses, one documented field each.

Names follow TorchTitan (``trainer.*``) and vLLM (``generator.engine.*``, ``rollout.sampling.*``), so that their
documentation applies. A field's rules stand at it: the values it takes, whether a run may be resumed with another one
(``FREE``; ``ROUNDING``: yes, but the last bit may move), whether it names a file; see ``fields``. docs/configuration.md
is made from this file (``make configuration``). Nothing here imports torch: a dry run must answer in well under a
second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forge_hpc.config.fields import (
    BELOW_ONE,
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    ROUNDING,
    SHARE,
    UP_TO_ONE,
    Range,
    setting,
)
from forge_hpc.config.registry import (
    ADVANTAGES,
    DTYPES,
    ENVIRONMENTS,
    KL_ESTIMATORS,
    LORA_TARGETS,
    LOSSES,
    MISMATCH_LEVELS,
    NORMALIZATIONS,
    REWARDS,
)

# vLLM takes what is below 0.01 for 0.01, and refuses what is above 2.
TEMPERATURE = Range("from 0.01 to 2, or 0 (greedy)", lambda v: v == 0 or 0.01 <= v <= 2)
PORT = Range("from 1 to 65535", lambda v: 1 <= v <= 65535)
ALL_OR_POSITIVE = Range("-1 (all) or greater than 0", lambda v: v == -1 or v > 0)
REST_OR_POSITIVE = Range("-1 or greater than 0", lambda v: v == -1 or v > 0)
TOKEN_IDS = Range("token ids, 0 or more", lambda v: v >= 0)
SLEEP_LEVEL = Range("0, 1 or 2", lambda v: v in (0, 1, 2))
SEED = Range("0 or more, and less than 2**63", lambda v: 0 <= v < 2**63)


@dataclass
class ModelConfig:
    path: str = setting("builtin:qwen3-tiny", path=True)
    """A Hugging Face model: hub name (``OWNER/NAME``, ``OWNER/NAME@REVISION``), directory, ``builtin:qwen3-tiny``,
    ``-tiny-chat`` or ``-small`` (random weights from the seed), or ``warmstart`` for the export of the run in
    RUN_DIR/warmstart (made first from ``warmstart.config``)."""
    dtype: str = setting("bfloat16", choices=DTYPES)
    """dtype of the generator's weights and of the export: float32 or bfloat16."""
    head_dtype: str = setting("float32", choices=DTYPES)
    """dtype of the logits, on GPUs, of generators and trainers: float32 keeps them as the matrix product sums them;
    bfloat16 rounds them to 8 bits."""
    batch_invariant: bool = setting(False, resume=ROUNDING)
    """Generators and trainers compute with the same kernels, which add up alike whatever else is in a batch: their
    log-probabilities are equal to the last bit where the weights are. Slower. Dense models in bfloat16 on GPUs of
    compute capability 9 (H100, H200), a whole model on each, sampled from whole distributions: no tensor parallelism,
    no LoRA, nothing compiled."""


@dataclass
class SourceConfig:
    """One source of a mixture. What is null is as in ``data``, but for ``name``."""

    path: str = setting("", path=True)
    """As ``data.path``."""
    weight: float = setting(1.0, POSITIVE)
    """Share of the prompts, relative to the weights of the other sources."""
    name: str | None = None
    """The dataset's configuration name, where it has several."""
    split: str | None = None
    """Split to train on."""
    prompt_field: str | None = None
    """Field that holds the prompt."""
    target_field: str | None = None
    """Field that holds the reference answer."""
    system_prompt: str | None = None
    """System message put before each prompt."""


@dataclass
class CurriculumConfig:
    """RL only: prompts that teach nothing at the moment are left out for a while."""

    enable: bool = False
    """Leave a prompt out whose last group was too hard or too easy."""
    low: float = 0.05
    """Too hard: the mean reward of the group was below this."""
    high: float = 0.95
    """Too easy: it was above this."""
    rest_epochs: int = setting(2, POSITIVE)
    """For so many epochs the prompt is left out; then it is tried again."""
    bounds: list[float] = field(default_factory=list)
    """In place of ``low`` and ``high``: buckets of difficulty, cut at these mean rewards, hardest first. A prompt is in
    one by the mean of its groups, each half as important as the one after it."""
    rests: list[int] = setting(range=NOT_NEGATIVE, factory=list)
    """Epochs that a prompt rests after each draw, by bucket, one more than there are bounds: with 0, 1 and 3 they are
    drawn in every, every second and every fourth epoch."""


@dataclass
class DataConfig:
    path: str = setting("builtin:addition", path=True)
    """``builtin:addition``, ``builtin:calculator``, a JSONL, Parquet or CSV file, or a dataset of the hub
    (``openai/gsm8k``, ``openai/gsm8k@REVISION``)."""
    name: str | None = None
    """The dataset's configuration name, where it has several (gsm8k: main)."""
    split: str = "train"
    """Split to train on. A file is its own split."""
    eval_split: str = "test"
    """Held-out split for evaluation."""
    eval_path: str | None = setting(None, path=True)
    """Where the held-out prompts come from, if not from ``path``."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture to train on, in place of ``path``, ``name`` and ``split``; held-out prompts come from ``eval_path``."""
    prompt_field: str = "question"
    """Field that holds the prompt: text, or the messages of a chat, each with ``role`` and ``content``."""
    target_field: str | None = "answer"
    """Field that holds the reference answer; SFT learns it, rewards compare with it. null: there is none, and SFT
    learns the assistant's turns of the chat in ``prompt_field``."""
    tools_field: str | None = "tools"
    """Field that holds the tools that an example may call, which the chat template is told: a list of JSON schemas, or
    its JSON text. Examples without it have none; null: all have none."""
    system_prompt: str | None = None
    """System message put before each prompt that has none; needs a tokenizer with a chat template."""
    chat_template: bool = True
    """Render prompts through the tokenizer's chat template; false feeds the raw text."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the chat template (Qwen3: ``enable_thinking: false``)."""
    template_date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which writes today's date (Llama 3.2). null: the day on which
    the run is submitted first; ``config.yaml`` keeps it for all its nodes and starts."""
    shuffle: bool = True
    """Draw examples in a seeded order, a new one every epoch."""
    streaming: bool = False
    """Read the data as they are needed, for data too large to hold."""
    shuffle_buffer: int = setting(10000, POSITIVE)
    """Streaming: examples are read in blocks of so many, and shuffled within a block."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)


@dataclass
class RewardConfig:
    name: str = setting("exact", choices=REWARDS, code=True)
    """A built-in reward (docs/rewards.md), or ``package.module:name`` / ``file.py:name`` of a function or class."""
    weight: float = 1.0
    """Factor in the weighted sum of all rewards."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward: of each call of a function, of a class's ``__init__``."""
    path: str | None = setting(None, path=True)
    """Of the reward ``model``: the export of a run of ``recipe: reward_model``, as ``model.path`` names a model."""
    timeout_s: float | None = setting(None, POSITIVE, resume=FREE)
    """A call that takes longer is given up; its episode is counted and left out. By default what the reward's class
    says (``math``: 10, ``code``: 120, ``llm_judge``: 720), else learned: 5 times (async: ``concurrency`` times) the
    slowest of the last 1000 calls, from 1 to 10."""
    workers: int | None = setting(None, POSITIVE, resume=FREE)
    """Processes that compute this reward, over all nodes. By default 1 for an async reward (on each node for ``code``),
    else on each node as many as cores, from 4 to 8."""
    concurrency: int | None = setting(None, POSITIVE, resume=FREE)
    """Calls that run at the same time in each process of an async reward. By default 64, or what its class says."""
    memory_gib: float | None = setting(None, POSITIVE, resume=FREE)
    """Address space of each of its processes; an allocation beyond it raises MemoryError. Unlimited by default."""


@dataclass
class MismatchConfig:
    """Importance weights w = pi_trainer / pi_generator for the sampled tokens; off while all is as by default. With it
    the loss's own ratio is taken against the trainer's log-probabilities, not the generator's."""

    cap: float | None = setting(None, POSITIVE)
    """Truncated importance sampling: w is at most this (usual: 2)."""
    token_bounds: list[float] | None = None
    """[low, high]: tokens whose w is outside are left out."""
    sequence_bounds: list[float] | None = None
    """[low, high]: sequences whose w, in the geometric mean over their tokens, is outside are left out."""
    level: str = setting("token", choices=MISMATCH_LEVELS)
    """What a token is weighted by, and ``cap`` bounds: its own w (token), or the product over its sequence."""
    product_bounds: list[float] | None = None
    """[low, high]: sequences whose w, as a product over their tokens, is outside are left out."""
    veto: float | None = setting(None, POSITIVE)
    """Sequences with any token whose w is below this are left out (usual: 1e-4)."""


@dataclass
class EnvironmentConfig:
    name: str | None = setting(None, choices=ENVIRONMENTS, code=True)
    """What the policy talks with over several turns: a built-in one, or your own class as ``package.module:Class`` /
    ``file.py:Class`` (docs/environments.md), or an agent, as ``file.py:function`` (docs/agents.md); null is one
    completion a prompt."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments handed to the class, or to each call of an agent."""
    venv: str | None = setting(None, path=True, resume=FREE)
    """Virtual environment whose ``bin/python`` runs the environment's processes, for packages that do not go together
    with the run's (Python 3.11 or newer, with numpy and psutil); null is the run's own."""
    max_turns: int = setting(8, POSITIVE)
    """An episode ends after this many responses of the policy at the latest."""
    max_turn_tokens: int | None = setting(None, POSITIVE)
    """A single response ends here at the latest; by default only ``rollout.max_response_tokens`` bounds it, which holds
    for a whole episode: all responses and observations together."""
    timeout_s: float = setting(60.0, POSITIVE, resume=FREE)
    """Seconds that the environment may take over an episode, all its calls together, generation not counted; an episode
    that takes longer is given up, counted and left out."""
    max_open_episodes: int | None = setting(None, POSITIVE, resume=FREE)
    """So many episodes are open at once, those of evaluation included; the others wait. By default as many as the class
    or its server says it has room for, else all that are due."""
    endpoint_host: str = "127.0.0.1"
    """Agents: the address of the first node at which the policy answers them (0.0.0.0: all of its addresses). On any
    other than this one it speaks TLS, with the job's certificate."""


@dataclass
class RunSourceConfig:
    """One of several sources of a run's prompts. What it leaves out is as in ``data``, ``environment`` and ``reward``;
    with an ``environment`` of its own it has no ``reward`` unless it names one."""

    name: str = ""
    """What it is called in metrics, rollouts and evaluations."""
    share: float = setting(1.0, POSITIVE)
    """Share of the prompts, relative to the other sources': held exactly, by counting, in every step that the shares
    divide, and over all steps to within one prompt."""
    data: DataConfig = field(default_factory=DataConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    reward: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    """Its rewards."""


@dataclass
class SFTMixConfig:
    """SFT beside RL: every step of the policy also learns answers of examples (docs/losses.md)."""

    coef: float = setting(0.0, NOT_NEGATIVE)
    """Weight of their loss, the mean negative log-probability of their trained tokens, beside the policy loss; 0: none
    are learned."""
    documents: int = setting(16, POSITIVE)
    """Documents of them in a step."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Where they come from, as ``data.sources``; empty: the run's own data, with their reference answers."""


@dataclass
class AlgorithmConfig:
    loss: str = setting("grpo", choices=LOSSES, code=True)
    """Policy loss: a built-in one (docs/losses.md), or your own: ``file.py:name`` / ``package.module:name``."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the loss that have no key here: sapo's ``tau_pos`` and ``tau_neg``, those of your own."""
    advantage: str | None = setting(None, choices=ADVANTAGES)
    """How rewards become advantages (docs/losses.md); null is the one that belongs to the loss."""
    clip_low: float | None = setting(None, SHARE)
    """The ratio is clipped from below at 1 - clip_low; null is the loss's own default."""
    clip_high: float | None = setting(None, NOT_NEGATIVE)
    """The ratio is clipped from above at 1 + clip_high; null is the loss's own default."""
    kl_coef: float | None = setting(None, NOT_NEGATIVE)
    """Weight of the KL penalty against the reference model (above 0 needs ``reference.enable``); null is the loss's own
    default (simple_grpo: 0.1, other built-in ones: 0)."""
    kl_estimator: str | None = setting(None, choices=KL_ESTIMATORS)
    """Estimator of the KL (k1, k2, k3); without a reference model nothing is estimated. null is the loss's own default
    (k3)."""
    kl_weighted: bool = False
    """Weight the KL of each token by the ratio of the policy to the one that sampled it: its gradient is then that of
    the KL, also where samples are old (docs/losses.md)."""
    old_kl_coef: float | None = setting(None, NOT_NEGATIVE)
    """Weight of a penalty on the distance to the policy that sampled, (log ratio)^2 / 2 a token, beside a clip or in
    its place; null is the loss's own default (0)."""
    entropy_coef: float | None = setting(None, NOT_NEGATIVE)
    """Weight of the entropy bonus; null is the loss's own default (0)."""
    normalization: str | None = setting(None, choices=NORMALIZATIONS)
    """What the loss is a mean over: token, sequence, or constant (sums of sequences over rollout.max_response_tokens);
    null is the loss's own default."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Correction for the mismatch between generator and trainer."""
    sft: SFTMixConfig = field(default_factory=SFTMixConfig)
    """Examples learned beside what the policy samples."""
    routing_replay: bool = False
    """Of a model with experts: the trainer takes those that the generator took for each token (R3, arXiv 2510.11370),
    weighs them itself, and so differs less from it (docs/models.md)."""
    off_policy_mask_threshold: float | None = setting(None, NOT_NEGATIVE)
    """Leave out sequences with a negative advantage of which the policy has moved away from the generator by more than
    this, in nats a token on average, optimizer steps within the step counted; null leaves none out."""
    top_entropy_quantile: float = setting(1.0, UP_TO_ONE)
    """The policy's term is that of this share of the step's tokens alone, those of the largest entropy (usual: 0.2), by
    one more forward pass a step (docs/losses.md); 1 is all."""
    minibatches: int = setting(1, POSITIVE)
    """Several optimizer steps a batch: a step's documents are cut into so many minibatches, whole groups in each, drawn
    from the seed, and each is an optimizer step (docs/losses.md)."""
    epochs: int = setting(1, POSITIVE)
    """A step goes through its documents so many times, each time in other minibatches."""
    drop_zero_signal_groups: bool = True
    """Leave groups whose advantages are all zero (their rewards are equal) out of training. A step that has no others
    counts and leaves weights and moments as they are."""
    drop_truncated: bool = False
    """Leave answers that a limit on tokens cut off out of training; their rewards are compared with all the same
    (``recipe: grpo``)."""
    dynamic_sampling: bool = False
    """Draw further prompts in their place, as DAPO does: every step trains on rollout.prompts_per_step groups whose
    rewards differ. Without it a step trains on the fewer that are left."""
    max_steps_without_signal: int = setting(20, POSITIVE, resume=FREE)
    """Fail after this many consecutive steps in which no group carried a signal; with dynamic_sampling, when a step has
    drawn this many times rollout.prompts_per_step prompts without one and is not complete."""


@dataclass
class SamplingConfig:
    """How tokens are drawn. What is left of the distribution by temperature, min_p, top_k and top_p (in this order) is
    the policy: the trainer's log-probabilities are renormalised over the same tokens."""

    temperature: float = setting(1.0, TEMPERATURE)
    """Sampling temperature, from 0.01 to 2; 0 is greedy (not in training)."""
    top_p: float = setting(1.0, UP_TO_ONE)
    """Nucleus sampling: the fewest tokens that have this probability together; 1 is all. The trainer sorts the
    vocabulary for it; top_k as well makes that cheap."""
    top_k: int = setting(-1, ALL_OR_POSITIVE)
    """Sample among the k most likely tokens; -1 is all."""
    min_p: float = setting(0.0, SHARE)
    """Leave out tokens that are less likely than this share of the most likely one; 0 is all."""
    repetition_penalty: float = setting(1.0, POSITIVE)
    """Makes tokens that have been less likely (above 1). Not in training: the trainer knows no such policy."""
    stop: list[str] = field(default_factory=list)
    """A response ends with any of these strings, at the token that completes it; text and trained tokens hold both."""
    stop_token_ids: list[int] = setting(range=TOKEN_IDS, factory=list)
    """A response ends with any of these tokens, as with the end of sequence, which always ends it."""


@dataclass
class RolloutConfig:
    group_size: int = setting(8, POSITIVE)
    """Completions sampled for each prompt."""
    prompts_per_step: int = setting(32, POSITIVE)
    """Prompts (groups) that one step trains on."""
    max_prompt_tokens: int = setting(512, POSITIVE)
    """Prompts longer than this are left out and counted (in SFT: those of the evaluation)."""
    max_response_tokens: int = setting(1024, POSITIVE)
    """Completions end here at the latest; with an environment, whole episodes, observations included."""
    max_staleness: int = setting(0, NOT_NEGATIVE)
    """Largest number of steps between the policy that began an episode and the one that trains on it.
    0 is synchronous and repeats exactly under one seed."""
    window: int = setting(1, POSITIVE)
    """1: steps take their prompts strictly in order. Above it, at most ``max_staleness`` + 1, a step need not wait for
    a group that is late: those of up to so many steps less one overtake it. Every prompt is trained on once."""
    sync_interval: int = setting(1, POSITIVE)
    """Publish new weights to the generators every so many steps."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class EngineConfig:
    tensor_parallel_size: int = setting(1, POSITIVE, resume=ROUNDING)
    """GPUs of one generator replica."""
    max_model_len: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Longest sequence; by default prompt and response limits together."""
    max_num_seqs: int = setting(256, POSITIVE, resume=ROUNDING)
    """Sequences decoded at once."""
    gpu_memory_utilization: float = setting(0.85, UP_TO_ONE, resume=ROUNDING)
    """Share of a GPU's memory that vLLM takes."""
    enforce_eager: bool = setting(False, resume=ROUNDING)
    """No CUDA graphs. Always the case on the CPU."""
    kv_cache_memory_gib: float = setting(1.0, POSITIVE, resume=ROUNDING)
    """Size of the KV cache on the CPU, in GiB; on CUDA gpu_memory_utilization decides."""
    enable_prefix_caching: bool = setting(True, resume=ROUNDING)
    """Share the prompt's KV cache in a group."""
    sleep_level: int = setting(2, SLEEP_LEVEL, resume=ROUNDING)
    """With ``cluster.colocate``, in a synchronous run: what becomes of an engine's weights while the trainers compute.
    2 drops them: new ones come anyway; 1 moves them to host memory; both drop its KV cache. 0: it stays awake, where a
    GPU has memory for both."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``vllm.EngineArgs``."""


@dataclass
class GeneratorConfig:
    replicas: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Independent vLLM engines; by default as many as the rollout nodes' GPUs hold (one a node on the CPU)."""
    timeout_s: float = setting(1800.0, POSITIVE, resume=FREE)
    """A request that takes longer than this has a stuck generator."""
    verify_weights: bool = setting(False, resume=FREE)
    """Compare a checksum of the weights on both sides at every delivery; at the first it is done always."""
    weight_transport: str = setting("tls", choices=("tls", "nccl"), resume=FREE)
    """How weights reach generators of other hosts. ``tls``: encrypted streams through the hosts' memory. ``nccl``: from
    GPU to GPU over the network that NCCL finds; it neither encrypts nor authenticates, so it is for networks that you
    trust. A generator's GPU then holds the weights twice. Where NCCL does not work the streams serve."""
    send_changes: bool = setting(False, resume=FREE)
    """Between hosts send what has changed since the version before, where that is less; the result is the same to the
    last bit. Worth it on a slow network at a small learning rate (1e-6 in bfloat16 changes a few percent of the
    weights a step). A trainer rank then keeps two copies of its weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class ServedConfig:
    """A frozen model that the run serves beside itself, such as a judge, for its rewards, environments and agents
    (docs/rewards.md#a-judge-that-the-run-starts)."""

    name: str = ""
    """What requests call it, in small letters."""
    path: str = setting("", path=True)
    """Its weights, as ``model.path`` names them: a hub name, a directory, or a built-in one."""
    dtype: str | None = setting(None, choices=DTYPES)
    """dtype of its weights; by default ``model.dtype``."""
    nodes: int = setting(0, NOT_NEGATIVE, resume=ROUNDING)
    """Nodes that hold nothing but this model; 0: it is on the only node of the run, and takes its last GPUs."""
    replicas: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Its vLLM engines; by default as many as the GPUs of its nodes hold (one a node on the CPU), and 1 where it has no
    nodes of its own."""
    max_tokens: int = setting(4096, POSITIVE)
    """A conversation with it has at most so many tokens, the response included."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of its chat template (Qwen3: ``enable_thinking: false``)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Options of its engines; the longest sequence is ``max_tokens``."""


@dataclass
class OptimizerConfig:
    name: str = setting("AdamW", choices=("AdamW", "Adam"))
    """AdamW or Adam."""
    lr: float = setting(1e-6, POSITIVE)
    """Peak learning rate."""
    beta1: float = setting(0.9, BELOW_ONE)
    """Adam's first moment decay."""
    beta2: float = setting(0.95, BELOW_ONE)
    """Adam's second moment decay."""
    eps: float = setting(1e-8, POSITIVE)
    """Adam's epsilon."""
    weight_decay: float = setting(0.0, NOT_NEGATIVE)
    """Decoupled weight decay."""


@dataclass
class LRSchedulerConfig:
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    """Linear warm-up over this many steps; all optimizer steps of a step have one rate."""
    decay_ratio: float | None = setting(None, SHARE)
    """Share of all steps over which the rate decays at the end; null keeps it constant after warm-up."""
    decay_type: str = setting("linear", choices=("linear", "sqrt", "cosine"))
    """linear, sqrt or cosine."""
    min_lr_factor: float = setting(0.0, SHARE)
    """The rate ends at this share of the peak."""


@dataclass
class TrainingConfig:
    steps: int = setting(100, POSITIVE, resume=FREE)
    """Steps of the whole run, each an optimizer step unless ``algorithm.minibatches`` or ``epochs`` say otherwise."""
    seq_len: int = setting(2048, POSITIVE)
    """Slots of a packed row; at least prompt and response limits together."""
    local_batch_size: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Rows of one microbatch on each data-parallel rank; gradients accumulate over the microbatches of a step. By
    default as many as keep a GPU busy and fit its memory (``trainer-0.log`` says how many), 1 on the CPU."""
    global_batch_size: int = setting(32, POSITIVE)
    """Recipes on examples (SFT, DPO): examples of one optimizer step (GRPO takes rollout.prompts_per_step *
    rollout.group_size episodes)."""
    max_norm: float = setting(1.0, POSITIVE)
    """Gradients are clipped to this global norm."""
    dtype: str = setting("float32", choices=DTYPES)
    """dtype of the master weights and the optimizer's state."""
    mixed_precision_param: str = setting("bfloat16", choices=DTYPES)
    """dtype of the forward and backward pass; float32 on the CPU."""


@dataclass
class ParallelismConfig:
    data_parallel_replicate_degree: int = setting(1, POSITIVE, resume=ROUNDING)
    """Replicas of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = setting(-1, REST_OR_POSITIVE, resume=ROUNDING)
    """Ranks that share one copy of the model (FSDP); -1 takes all that the other degrees leave."""
    tensor_parallel_degree: int = setting(1, POSITIVE, resume=ROUNDING)
    """Ranks that share each matrix."""
    context_parallel_degree: int = setting(1, POSITIVE, resume=ROUNDING)
    """Ranks that share each row, for rows that are longer than one GPU holds (docs/long-rows.md)."""
    expert_parallel_degree: int = setting(1, POSITIVE, resume=ROUNDING)
    """Ranks that share the experts of an MoE model: of those that share its one copy (shard times tensor degree)."""


@dataclass
class ActivationCheckpointConfig:
    mode: str = setting("auto", choices=("auto", "none", "selective", "full"), resume=ROUNDING)
    """What is computed again in the backward pass instead of kept: none, selective or full; auto is the least of it
    that fits the GPU's memory, and none on the CPU."""


@dataclass
class CompileConfig:
    enable: bool | None = setting(None, resume=ROUNDING)
    """torch.compile each transformer block; by default on CUDA."""


@dataclass
class LoRAConfig:
    enable: bool = False
    """Train low-rank adapters beside the frozen weights. Exported weights have them merged in."""
    rank: int = setting(16, POSITIVE)
    """Rank of the adapters."""
    alpha: float = setting(32.0, POSITIVE)
    """Adapters are scaled by alpha / rank."""
    target_modules: list[str] = setting(factory=lambda: list(LORA_TARGETS), choices=LORA_TARGETS)
    """Linear layers with an adapter, by TorchTitan's names: attention wq, wkv (keys and values), wo; feed-forward w1
    (gate), w2 (down), w3 (up)."""
    publish: str = setting("merged", choices=("merged", "adapters"), resume=ROUNDING)
    """What generators get of a new policy: all weights with the adapters merged in, or the adapters alone, which vLLM
    then applies beside the base model: some MB a version, and some work more for each token."""
    sweep: list[str] = setting(factory=list)
    """Several adapters at once on one base: an item for each, with what it varies, such as ``seed=1
    trainer.optimizer.lr=1e-5``. Each is a run of its own in RUN_DIR/adapters (docs/one-base.md)."""

    @property
    def sends_adapters(self) -> bool:
        """Whether generators get adapters, not weights."""
        return self.enable and self.publish == "adapters"


@dataclass
class TrainerConfig:
    processes_per_node: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Trainer ranks on each trainer node; by default its GPUs, one on the CPU."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    timeout_s: float = setting(1800.0, POSITIVE, resume=FREE)
    """A training step that takes longer than this has a stuck rank."""


@dataclass
class ReferenceConfig:
    enable: bool = False
    """Hold a frozen copy of the initial model for the KL penalty, in the compute dtype; with LoRA the trained model
    without its adapters serves, and nothing is copied."""
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), resume=ROUNDING)
    """Where its weights are kept: auto or cuda (with the trainers' own) or cpu: in host memory, from where a layer at a
    time visits the GPU. It computes where the trainers do."""


@dataclass
class CheckpointConfig:
    interval: int = setting(50, NOT_NEGATIVE)
    """Save every so many optimizer steps; the last step is always saved, 0 saves it alone."""
    keep: int = setting(2, POSITIVE)
    """Newest checkpoints to keep; older ones are deleted."""
    best: str | None = None
    """Also keep the checkpoint that was best by this figure of the evaluations: ``accuracy``, ``pass@4``, ``reward``,
    or ``loss``, of which less is better. Every evaluation that is better saves; ``forge-hpc export --step best`` takes
    it."""
    export_best: bool = False
    """RUN_DIR/export holds the model of that checkpoint at the end, in place of the last step's."""
    async_save: bool = True
    """Write beside the training instead of blocking it: from a copy in the node's memory, which each rank keeps for it
    (12 bytes for each parameter of its shard in float32; `forge-hpc plan`). false needs none of it."""
    export_interval: int = setting(0, NOT_NEGATIVE)
    """Also write the weights in Hugging Face format every so many optimizer steps, to RUN_DIR/exports/step-N, which
    nobody deletes; 0 writes those of the last step alone, to RUN_DIR/export. See also ``forge-hpc export``."""


@dataclass
class HeldOutConfig:
    """One of several held-out sets. What is null is as in ``data``, but for ``name``."""

    label: str = ""
    """What its figures are called: ``label/accuracy``."""
    path: str = setting("", path=True)
    """As ``data.path``."""
    name: str | None = None
    """The dataset's configuration name, where it has several."""
    split: str | None = None
    """By default ``data.eval_split``."""
    prompt_field: str | None = None
    """Field that holds the prompt."""
    target_field: str | None = None
    """Field that holds the reference answer."""
    system_prompt: str | None = None
    """System message put before each prompt."""
    num_prompts: int | None = setting(None, POSITIVE)
    """Its first so many prompts; by default ``evaluation.num_prompts``."""
    reward: list[RewardConfig] = field(default_factory=list)
    """Rewards that grade its answers, in place of the run's."""


@dataclass
class EvaluationConfig:
    interval: int = setting(0, NOT_NEGATIVE)
    """Evaluate every so many steps, besides before the first and after the last one: by answers to held-out prompts, in
    SFT by the loss on held-out documents; 0 evaluates only then (SFT: only at the end)."""
    num_prompts: int = setting(0, NOT_NEGATIVE)
    """Held-out prompts (SFT: documents) of an evaluation, the first of ``data.eval_split``; 0 switches it off."""
    sets: list[HeldOutConfig] = field(default_factory=list)
    """Several held-out sets in place of ``data.eval_split``, an accuracy each; ``accuracy`` is then that of all their
    prompts together."""
    patience: int | None = setting(None, POSITIVE)
    """Stop early: training ends after so many evaluations in a row whose ``checkpoint.best`` is no better than the best
    before them; null trains all steps."""
    samples: int = setting(0, NOT_NEGATIVE)
    """Answers sampled for each prompt, for pass@k, maj@k and best@k; 0 is greedy decoding alone."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k for each of these, each at most ``samples``; above 1 maj@k and best@k too."""
    temperature: float | None = setting(None, TEMPERATURE)
    """Temperature of the sampled answers; by default rollout.sampling's, as are top_p and top_k."""


@dataclass
class WarmstartConfig:
    config: str | None = setting(None, path=True)
    """SFT configuration (file, relative to this one) run first, in RUN_DIR/warmstart, where its export is missing."""
    overrides: list[str] = field(default_factory=list)
    """key=value overrides of it."""


@dataclass
class ClusterConfig:
    nodes: int = setting(1, POSITIVE, resume=ROUNDING)
    """Nodes of the allocation; more than 1 means Slurm."""
    rollout_nodes: int | None = setting(None, resume=ROUNDING)
    """Nodes for generators; by default what trainer_nodes leaves, else rollout_ratio decides."""
    trainer_nodes: int | None = setting(None, resume=ROUNDING)
    """Nodes for trainers; by default what rollout_nodes leaves."""
    rollout_ratio: float = setting(0.5, SHARE, resume=ROUNDING)
    """Share of the nodes (of the GPUs on one node) that generate, where no number is given."""
    colocate: bool = setting(False, resume=ROUNDING)
    """Every GPU has a trainer and a generator. With ``rollout.max_staleness=0`` they take turns: the engines sleep
    while the trainers compute (not with ``generator.engine.sleep_level=0``); above it both compute at once, and share
    the memory (docs/colocate.md)."""
    frozen_nodes: int = setting(0, NOT_NEGATIVE, resume=ROUNDING)
    """Nodes that hold nothing but the recipe's frozen models (a teacher, a reference), which are too large to stand
    beside the policy. 0: they stand beside it, in the trainers."""
    frozen_processes: int | None = setting(None, POSITIVE, resume=ROUNDING)
    """Processes for the frozen models on a node, a GPU each; by default one for each GPU of their nodes, and 1 on the
    CPU. On a single node this is what takes them out of the trainers."""
    spare_nodes: int = setting(0, NOT_NEGATIVE)
    """Nodes kept to replace lost rollout nodes. With any, the job outlives a node that dies (--no-kill)."""
    max_restarts: int = setting(3, NOT_NEGATIVE)
    """How often something that failed (a generator, the trainers, the whole run) is started again without progress in
    between; being preempted is no failure."""
    workers_on: str = setting("all", choices=("all", "first"))
    """Nodes on which processes compute rewards and environments: all, or the first alone, as for what they reach by an
    address of that node."""
    gpus_per_node: int | None = setting(None, NOT_NEGATIVE, resume=ROUNDING)
    """GPUs used on each node; 0 is the CPU; by default what the node has."""
    gpu_memory_gib: float | None = setting(None, POSITIVE)
    """Memory of a GPU, for the memory plan of `forge-hpc submit`; by default that of the GPU's type in Slurm, and of a
    run on this machine what its driver says."""
    offline: bool = False
    """Nodes reach no model hub: what the cache lacks keeps the job from being queued, and is fetched before, by
    ``forge-hpc fetch`` (docs/offline.md). false: it is a warning."""
    start_timeout_s: float = setting(600.0, POSITIVE)
    """All nodes must have joined, and all actors be ready, in this time."""
    slow_node_factor: float = setting(3.0, NOT_NEGATIVE)
    """A node whose matrix product at the start takes so many times as long as the others' (their median) is left out
    (docs/gate.md); 0 has none left out, as for nodes of several kinds."""


@dataclass
class ContainerConfig:
    """A container that the run is in on its nodes; best in the site profile. See docs/containers.md."""

    runtime: str | None = setting(None, choices=("apptainer", "pyxis"))
    """apptainer, pyxis (enroot, by srun's options), or null: no container."""
    image: str | None = setting(None, path=True)
    """A file or folder that all nodes see, or what else the runtime takes (``docker://…``)."""
    mounts: list[str] = field(default_factory=list)
    """Further files and folders seen inside, each SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, where ``$NAME`` is the
    environment's. Seen at their places without being named: the run, the project, the working directory, the files
    that the configuration names, /tmp, the home directory, and caches that the environment names."""
    python: str = "python3"
    """The image's Python that has the packages of a run."""


@dataclass
class SlurmConfig:
    partition: str | None = None
    """Partition, or several by commas; where it is null $SBATCH_PARTITION, or the cluster's default."""
    account: str | None = None
    """Account to charge; where it is null $SBATCH_ACCOUNT."""
    qos: str | None = None
    """Quality of service; where it is null $SBATCH_QOS."""
    time: str = "24:00:00"
    """Walltime limit, in Slurm's notation."""
    constraint: str | None = None
    """Node features asked for."""
    exclusive: bool = True
    """Whole nodes. Sharing a node with other users opens ports that TLS cannot cover (see the README); then
    ``cpus_per_task`` and ``mem`` say how much of it."""
    cpus_per_task: int | None = setting(None, POSITIVE)
    """CPU cores on each node; with exclusive, all of them."""
    mem: str | None = None
    """Memory on each node; 0 is all of it, as is null with exclusive. `forge-hpc plan` shows what a run keeps there."""
    signal_lead_s: int | None = setting(None, NOT_NEGATIVE)
    """Seconds before the walltime at which the run saves and leaves. By default it follows from the step and save times
    that the run has measured: 300 before that, and never more than half of ``time``."""
    requeue: str = setting("auto", choices=("auto", "successor", "never"), formerly={"true": "auto", "false": "never"})
    """How a run goes on that was preempted, came to its walltime, lost a node or crashed: auto has Slurm start the job
    again (--requeue), and queues a successor where Slurm refuses; successor queues another job (--no-requeue: for sites
    that forbid requeueing); never stays down until it is resumed by hand."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on each node first (module load …)."""
    stage_environment: str | None = None
    """A folder on each node's own disk (``/tmp``, ``$SCRATCH/local``), to which the environment is brought and from
    which the run then imports (docs/staging.md): for many nodes, and environments on a network's disk. null: it is
    used where it is."""
    gres: str | None = None
    """GPUs in the notation of ``--gres`` (``gpu:h100:8``), for sites that do not take ``--gpus-per-node``."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options, name: value. Numbers keep their text; true gives an option without a value."""
    srun: list[str] = field(default_factory=list)
    """Further srun options, as they are: ``[--mpi=none]``."""
    script: str | None = setting(None, path=True)
    """The site's own job script: a file in which ``@OPTIONS@`` stands for the #SBATCH lines, and ``@COMMAND@`` for what
    starts the run."""
    container: ContainerConfig = field(default_factory=ContainerConfig)


@dataclass
class SandboxLimits:
    """What one sandboxed program may take, all its processes together. Passing any of them ends it."""

    wall_s: float = setting(10.0, POSITIVE)
    """Seconds from its start; with several tests, of all of them together."""
    cpu_s: float = setting(10.0, POSITIVE)
    """CPU seconds, likewise."""
    memory_mb: int = setting(512, POSITIVE)
    """MiB of resident memory; a single allocation beyond it fails before that."""
    processes: int = setting(32, POSITIVE)
    """Processes and threads at once."""
    output_kb: int = setting(64, POSITIVE)
    """KiB kept of the standard output, and of the standard error."""
    disk_mb: int = setting(64, POSITIVE)
    """MiB in /tmp, and as much in /dev/shm; both are memory of the node and go with the sandbox."""


@dataclass
class SandboxConfig:
    """Where model-written code runs. It is never run outside a sandbox."""

    runtime: str = setting("auto", choices=("auto", "bubblewrap", "apptainer", "enroot"))
    """auto is bubblewrap; or apptainer, enroot. None of them stands in for another."""
    image: str | None = None
    """Image (apptainer: file or directory; enroot: file or container name) with Python 3.10 or newer."""
    python: str | None = None
    """Interpreter of the programs; the packages of its (virtual) environment can be imported. By default the one that
    runs forge_hpc, with the standard library alone; in an image, its python3."""
    parallel: int | None = setting(None, POSITIVE, resume=FREE)
    """Programs at once, over all episodes of the environment ``code``, and in each process of a reward ``code``; by
    default as many as forge_hpc may use cores."""
    limits: SandboxLimits = field(default_factory=SandboxLimits)


@dataclass
class LoggingConfig:
    console: str = setting("auto", choices=("auto", "lines", "none"))
    """auto (progress bar on a terminal, one line a step elsewhere), lines, or none."""
    tensorboard: bool = True
    """Write event files to RUN_DIR/tensorboard."""
    wandb: bool = False
    """Send the metrics to Weights & Biases as well (offline where WANDB_MODE says so)."""
    mlflow: bool = False
    """Send them to MLflow as well (to the server that MLFLOW_TRACKING_URI names)."""
    prometheus_port: int | None = setting(None, PORT)
    """Serve the newest value of every figure on this port of the first node, at /metrics, for Prometheus to scrape;
    null serves nothing."""
    prometheus_host: str = "127.0.0.1"
    """Address on which that is served. On any other than this one, whoever reaches the node can read the figures."""
    num_rollouts_per_step: int = setting(2, NOT_NEGATIVE)
    """Rollouts of each step kept in rollouts.jsonl: the first one of each of the first groups."""
    num_groups_per_step: int = setting(0, NOT_NEGATIVE)
    """So many of the first groups of each step are kept there whole: all samples that have a reward."""
    num_answers_per_evaluation: int = setting(1000, NOT_NEGATIVE)
    """Answers of each evaluation kept in RUN_DIR/evaluations, all those to the first prompts; 0 keeps none."""


@dataclass
class ProfileConfig:
    steps: list[int] = field(default_factory=list)
    """Optimizer steps of which trainers, generators and controller write traces, one file a process, into
    ``profile-step-N`` beside their logs; see docs/performance.md. Such a step is slower than others."""


@dataclass
class Config:
    """A whole run. ``key=value`` overrides use these names: ``trainer.optimizer.lr=1e-6``."""

    recipe: str = setting("grpo", code=True)
    """The algorithm: grpo, sft, eval (generators alone), or your own as ``file.py:Class`` or
    ``package.module:Class``."""
    recipe_args: dict[str, Any] = field(default_factory=dict)
    """Options of the recipe's own; `forge-hpc submit` refuses those that it does not have."""
    name: str = "grpo"
    """Name of the run; a part of the default run directory and the Slurm job's name."""
    seed: int = setting(42, SEED)
    """Everything random follows from this."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    """Rewards, each added with its weight; with an environment to what that gives, and none unless it is named here."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    served: list[ServedConfig] = field(default_factory=list)
    """Frozen models that the run serves beside itself, each at an OpenAI-compatible address."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    checkpoint: CheckpointConfig = setting(factory=CheckpointConfig, resume=FREE)
    evaluation: EvaluationConfig = setting(factory=EvaluationConfig, resume=FREE)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    cluster: ClusterConfig = setting(factory=ClusterConfig, resume=FREE)
    slurm: SlurmConfig = setting(factory=SlurmConfig, resume=FREE)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    logging: LoggingConfig = setting(factory=LoggingConfig, resume=FREE)
    profile: ProfileConfig = setting(factory=ProfileConfig, resume=FREE)
    sources: list[RunSourceConfig] = field(default_factory=list)
    """Several environments and data in one run, each with its reward, its share of the prompts, its metrics and its
    held-out accuracy (docs/environments.md)."""
