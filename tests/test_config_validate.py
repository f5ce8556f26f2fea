"""What cannot work is refused before anything is queued, in one line, with what to do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from forge_hpc.config import UserError, load_config, plan, validate, walltime_s
from forge_hpc.config.registry import ADVANTAGES, LOSSES

CONFIGS = Path(__file__).parent.parent / "configs"
ALL_CONFIGS = sorted(CONFIGS.rglob("*.yaml"))


def refused(*overrides: str) -> UserError:
    cfg = load_config(None, overrides)
    with pytest.raises(UserError) as caught:
        validate(cfg)
    assert "\n" not in caught.value.message
    return caught.value


MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory in Hugging Face format with 4 heads, 2 key-value heads and 4,096 positions."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    save_file({"w": np.zeros((4, 4), np.float32)}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_that_we_ship_is_valid_and_can_be_placed(path):
    cfg = load_config(path)
    validate(cfg)
    assert plan(cfg, cfg.cluster.gpus_per_node).nodes == cfg.cluster.nodes
    assert path.read_text().startswith("# ")


def test_the_configurations_that_the_readme_names_are_there():
    names = {str(path.relative_to(CONFIGS)) for path in ALL_CONFIGS}
    qwen = ("qwen2_5_7b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_8b", "qwen3_32b")
    grpo = {f"grpo/{name}.yaml" for name in ("demo", "llama3_1_8b", *qwen)}
    assert grpo | {"sft/demo.yaml", "sft/llama3_8b.yaml", "sft/qwen3_1_7b.yaml"} <= names


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=gpro"], "recipe is 'gpro'"),
        (["algorithm.loss=ppp"], "algorithm.loss is 'ppp'"),
        (["algorithm.loss=nowhere.py:Loss"], "algorithm.loss: no such file"),
        (["algorithm.loss=mine.py:1"], "algorithm.loss is 'mine.py:1'"),
        (["algorithm.loss=rloo", "algorithm.clip_low=0.1"], "algorithm.clip_low is not used by algorithm.loss=rloo"),
        (["algorithm.loss_args={tau_pos: 2}"], "algorithm.loss_args.tau_pos is not used by algorithm.loss=grpo"),
        (["algorithm.loss_args={tau: 2}"], "algorithm.loss_args.tau is not used"),
        (["algorithm.loss_args={clip_low: 0.1}"], "algorithm.loss_args has 'clip_low'"),
        (["algorithm.loss=sapo", "algorithm.loss_args={tau_pos: 0}"], "algorithm.loss_args.tau_pos must be a number"),
        (["algorithm.clip_low=1.1"], "algorithm.clip_low must be from 0 to 1"),
        (["algorithm.clip_high=-1"], "algorithm.clip_high must be 0 or more"),
        (["algorithm.kl_estimator=k4"], "algorithm.kl_estimator is 'k4'"),
        (["algorithm.normalization=tokens"], "algorithm.normalization is 'tokens'"),
        (["algorithm.mismatch.cap=0"], "algorithm.mismatch.cap must be greater than 0"),
        (["algorithm.mismatch.token_bounds=[2]"], "algorithm.mismatch.token_bounds is [2.0]"),
        (["algorithm.mismatch.sequence_bounds=[2, 1]"], "algorithm.mismatch.sequence_bounds is [2.0, 1.0]"),
        (["algorithm.mismatch.cap=2", "algorithm.clip_high=0.3"], "algorithm.clip_high has no effect"),
        (["algorithm.mismatch.cap=2", "algorithm.old_kl_coef=0.1"], "algorithm.old_kl_coef has no effect"),
        (["algorithm.advantage=mean"], "algorithm.advantage"),
        (["algorithm.advantage=gdpo", "algorithm.dynamic_sampling=true"], "the advantage gdpo learns where only their"),
        (["algorithm.top_entropy_quantile=0"], "algorithm.top_entropy_quantile must be greater than 0 and at most 1"),
        (["recipe=online_dpo", "trainer.training.seq_len=2000"], "a pair takes up to 3070 tokens of one row"),
        (["algorithm.top_entropy_quantile=0.2", "recipe=online_dpo"], "algorithm.top_entropy_quantile=0.2 is of"),
        (["algorithm.drop_truncated=true", "recipe=ppo"], "algorithm.drop_truncated is of recipe=grpo"),
        (["trainer.optimizer.name=SGD"], "trainer.optimizer.name"),
        (["model.dtype=float16"], "model.dtype"),
        (["reward.0.name=exat"], "reward.0.name is 'exat'"),
        (["reward=[]"], "no reward"),
        (["reward=[{name: exact}, {name: exact}]"], "given twice"),
        (["rollout.group_size=1"], "rollout.group_size is 1"),
        (["algorithm.kl_coef=0.1"], "algorithm.kl_coef=0.1 needs the reference model"),
        (["algorithm.loss=simple_grpo"], "algorithm.kl_coef=0.1, the default of algorithm.loss=simple_grpo, needs"),
        (["reference.enable=true", "reference.device=cuda", "cluster.gpus_per_node=0"], "reference.device=cuda"),
        (["rollout.sampling.temperature=0"], "greedy"),
        (["rollout.sampling.top_p=0"], "rollout.sampling.top_p must be greater than 0"),
        (["rollout.max_staleness=-1"], "rollout.max_staleness must be 0 or more"),
        (["rollout.sync_interval=2"], "rollout.sync_interval=2"),
        (["trainer.training.seq_len=1000"], "shorter than a whole episode"),
        (["generator.engine.max_model_len=100"], "generator.engine.max_model_len=100"),
        (["sandbox.runtime=docker"], "sandbox.runtime is 'docker'"),
        (["sandbox.runtime=apptainer"], "needs an image"),
        (["sandbox.image=python.sif"], "bubblewrap takes no image"),
        (["sandbox.limits.wall_s=0"], "sandbox.limits.wall_s must be greater than 0"),
        (["trainer.optimizer.lr=0"], "trainer.optimizer.lr must be greater than 0"),
        (["trainer.optimizer.lr=.nan"], "finite"),
        (["reward.0.weight=.inf"], "reward.0.weight must be a finite number"),
        (["trainer.training.steps=0"], "trainer.training.steps"),
        (["trainer.lr_scheduler.warmup_steps=101"], "never reached"),
        (["trainer.parallelism.data_parallel_shard_degree=0"], "data_parallel_shard_degree"),
        (
            ["trainer.parallelism.tensor_parallel_degree=3", "cluster.gpus_per_node=8", "cluster.nodes=2"],
            "does not divide",
        ),
        (["cluster.nodes=4", "cluster.rollout_nodes=4"], "4 rollout nodes are not the 4 working nodes"),
        (["cluster.nodes=4", "cluster.rollout_nodes=1", "cluster.trainer_nodes=2"], "are not the 4 working nodes"),
        (["cluster.nodes=2", "cluster.spare_nodes=2"], "leaves none to work"),
        (["rollout.group_size=2", "rollout.prompts_per_step=1", "cluster.gpus_per_node=8"], "data-parallel ranks"),
        (["name=a/b"], "name is 'a/b'"),
        (["slurm.time=tomorrow"], "slurm.time is 'tomorrow'"),
        (["slurm.time=5", "slurm.signal_lead_s=300"], "slurm.signal_lead_s=300 is not shorter"),
        (["slurm.mem=much"], "slurm.mem"),
        (["model.path=warmstart"], "needs warmstart.config"),
        (["model.path=builtin:qwen3"], "model.path is 'builtin:qwen3'"),
        (["model.path=./nowhere"], "no such directory"),
        (["data.path=nowhere.jsonl"], "no such file"),
        (["data.path=builtin:additon"], "data.path is 'builtin:additon'"),
        (["warmstart.config=nowhere.yaml"], "no such file"),
        (["reward.0.name=nowhere.py:f"], "no such file"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words):
    assert words in refused(*overrides).message


def test_a_mistyped_name_is_answered_with_the_nearest():
    assert refused("recipe=gpro").hint == "did you mean grpo?"
    assert refused("reward.0.name=exat").hint == "did you mean exact?"


def test_hub_names_are_not_looked_up():
    validate(load_config(None, ["model.path=meta-llama/Llama-3.1-8B-Instruct", "data.path=openai/gsm8k"]))


def test_paths_can_be_left_unchecked():
    validate(load_config(None, ["model.path=./nowhere", "data.path=nowhere.jsonl"]), check_paths=False)


def test_every_name_stands_for_something_that_exists():
    from forge_hpc.advantages import advantage_function
    from forge_hpc.config import registry
    from forge_hpc.config.user_code import load_user_code
    from forge_hpc.losses.build import build_loss

    tables = [
        value
        for value in vars(registry).values()
        if isinstance(value, dict) and all(isinstance(place, str) and ":" in place for place in value.values())
    ]
    assert len(tables) == 8
    for table in tables:
        for place in table.values():
            assert callable(load_user_code(place, "thing"))
    for name in ADVANTAGES:
        assert callable(advantage_function(name))
    for name in LOSSES:
        validate(load_config(None, [f"algorithm.loss={name}", "reference.enable=true"]))
        build_loss(name, load_config(None).algorithm)


def test_every_option_of_a_loss_is_accepted():
    options = ["kl_coef=0.1", "kl_estimator=k2", "entropy_coef=0.01", "normalization=sequence", "loss=sapo"]
    options += ["kl_weighted=true", "old_kl_coef=0", "top_entropy_quantile=0.2", "drop_truncated=true"]
    options += ["advantage=gdpo"]
    more = ["loss_args={tau_pos: 2, tau_neg: 2.5}", "mismatch.cap=2", "mismatch.token_bounds=[0.5, 5]"]
    validate(load_config(None, ["reference.enable=true", *(f"algorithm.{option}" for option in options + more)]))
    validate(load_config(None, ["algorithm.loss=cispo", "algorithm.clip_low=1", "algorithm.clip_high=7"]))
    validate(load_config(None, ["reward=[{name: exact}, {name: length, args: {max_tokens: 100}}]"]))


def test_a_loss_of_ones_own_is_looked_for_beside_its_yaml(tmp_path):
    (tmp_path / "my_loss.py").write_text("class MyLoss: ...\n")
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: {loss: 'my_loss.py:MyLoss', loss_args: {anything: [1, 2]}, clip_low: 0.1}\n")
    cfg = load_config(file)
    validate(cfg)
    assert cfg.algorithm.loss == f"{tmp_path / 'my_loss.py'}:MyLoss"
    error = refused(f"algorithm.loss={tmp_path / 'my_loss.py'}:MyLos")
    assert error.hint == "did you mean MyLoss?"
    validate(load_config(None, ["algorithm.loss=my_package.losses:MyLoss"]))


def test_a_whole_model_directory_is_accepted(model):
    validate(load_config(None, [f"model.path={model}"]))


def test_a_model_directory_without_its_parts_is_refused(model):
    def message() -> str:
        return refused(f"model.path={model}").message

    weights, config = model / "model.safetensors", model / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "its header promises" in message()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "not a safetensors file" in message()
    weights.write_bytes(b"")
    assert "not a safetensors file" in message()
    weights.unlink()
    assert "no weights" in message()
    weights.write_bytes(whole)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors"}}))
    assert "lacks 1 of 1 weight files" in message()
    index.write_text("{")
    assert "cannot read" in message()
    index.unlink()
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in message()
    config.write_text("{")
    assert "cannot read" in message()
    config.write_text('{"model_type": "bert"}')
    assert "model_type 'bert'" in message()
    config.write_text('{"model_type": "gpt_oss"}')
    assert "would stay random" in message()
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    config.write_text(json.dumps(mistral | {"max_position_embeddings": 4096}))
    assert "the 16 positions of the sliding window" in message()
    config.unlink()
    assert "no config.json" in message()


OTHER_MODELS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel, which cannot be trained"),
    ({"attention_bias": True}, "has attention_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, "has quantization_config"),
    ({"hidden_act": "gelu"}, "has the activation gelu"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "has rotary embeddings of type yarn"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "has rotary embeddings of type yarn"),
    ({"partial_rotary_factor": 0.5}, "rotates 0.5 of each head"),
    (MOE | {"num_experts": 8, "norm_topk_prob": False}, "has not experts in every layer and normalised routing"),
    (
        QWEN2 | {"hidden_size": 64, "head_dim": 32},
        "has heads of 32 values, and vLLM 0.32 gives those of a Qwen2",
    ),
]


@pytest.mark.parametrize(("changes", "why"), OTHER_MODELS)
def test_models_that_would_be_computed_otherwise_are_refused_before_they_are_queued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str
) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert f"the model in {model} {why}" in refused(f"model.path={model}").message
    taught = ("recipe=distillation", f"recipe_args.teachers=[{model}]")
    assert f"of the recipe ({model}) {why}" in refused(*taught).message
    # one of the hub that was fetched here
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("1" * 40)
    model.rename((folder / "snapshots").mkdir() or folder / "snapshots" / ("1" * 40))
    assert why in refused("model.path=some/model").message


def test_a_model_that_only_generates_may_be_one_that_vllm_alone_knows(model: Path) -> None:
    config = model / "config.json"
    plain = json.loads(config.read_text())
    only = ("recipe=eval", "evaluation.num_prompts=10", f"model.path={model}")
    config.write_text(json.dumps(plain | {"rope_scaling": {"type": "yarn", "factor": 4.0}}))
    validate(load_config(None, [*only]))
    config.write_text(json.dumps(plain | QWEN2 | {"hidden_size": 64, "head_dim": 32}))
    assert "whatever config.json says" in refused(*only).message
    served = ("cluster.nodes=2", "cluster.gpus_per_node=1", f"served=[{{name: judge, path: {model}, nodes: 1}}]")
    assert "whatever config.json says" in refused("model.path=builtin:qwen3-tiny", *served).message
    config.write_text(json.dumps(plain | QWEN2 | {"hidden_size": 64, "head_dim": 16}))
    validate(load_config(None, [*only]))


def test_weights_of_other_dimensions_than_config_json_says_are_refused_by_name(model: Path) -> None:
    """Which vLLM would cut down to them, and say nothing."""
    config = model / "config.json"
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "vocab_size": 67}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    shapes = {
        "model.embed_tokens": (67, 64), "lm_head": (67, 64), "model.norm": (64,),
        "model.layers.0.self_attn.q_proj": (128, 64), "model.layers.0.self_attn.k_proj": (64, 64),
        "model.layers.11.self_attn.v_proj": (64, 64), "model.layers.11.self_attn.o_proj": (64, 128),
        "model.layers.11.mlp.gate_proj": (96, 64), "model.layers.11.mlp.down_proj": (64, 96),
    }  # fmt: skip

    def write(**changes: tuple[int, ...]) -> None:
        tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in (shapes | changes).items()}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    write()
    validate(load_config(None, [f"model.path={model}"]))
    for name, shape in shapes.items():
        if name == "model.norm":
            continue
        write(**{name: (shape[0] * 2, shape[1])})
        said = (
            f"the weight {name}.weight in {model} has shape {[shape[0] * 2, shape[1]]}, config.json implies {[*shape]}"
        )
        assert refused(f"model.path={model}").message == said
        assert refused("recipe=distillation", f"recipe_args.teachers=[{model}]").message == said


def test_weights_that_are_packed_or_in_no_index_are_not_compared_with_config_json(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"hidden_size": 64, "head_dim": 16, "vocab_size": 67}
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: np.zeros((64, 32), np.uint8)}, model / "model.safetensors", metadata={"format": "pt"})
    validate(load_config(None, [f"model.path={model}"]))  # two numbers to a byte
    save_file({name: np.zeros((64, 32), np.float32)}, model / "stray.safetensors", metadata={"format": "pt"})
    assert "config.json implies [64, 64]" in refused(f"model.path={model}").message
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model.safetensors"}}))
    validate(load_config(None, [f"model.path={model}"]))


def test_other_models_of_a_recipe_must_suit_the_run_and_the_policy(model: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(model, teacher)
    options = ("recipe=distillation", f"recipe_args.teachers=[{teacher}]", f"model.path={model}")
    where = f"the model 'teacher_1' of the recipe ({teacher})"
    validate(load_config(None, [*options]))
    config = json.loads((model / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1800}))
    said = refused(*options, "trainer.training.seq_len=2000").message
    assert said == f"sequences of 2000 tokens (trainer.training.seq_len) are longer than the 1800 positions of {where}"
    (teacher / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    two = ("cluster.gpus_per_node=8", "trainer.parallelism.tensor_parallel_degree=2")
    assert f"the 4 attention heads and 1 key-value heads of {where}" in refused(*options, *two).message
    (teacher / "config.json").write_text(json.dumps(config))
    # the same tokens at other places; one that has some more may be told of by them or not
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    more = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 2, "content": "<end>"}]}
    (teacher / "tokenizer.json").write_text(json.dumps(more))
    validate(load_config(None, [*options]))
    (teacher / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0, "a": 1}}}))
    said = refused(*options).message
    assert said == f"{where} has another vocabulary than the policy in {model}: 'b' is 0 in one and 1 in the other"


def test_a_frozen_critic_without_a_value_head_is_refused_where_it_is_submitted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from forge_hpc.recipes.base import ModelNeed, Needs, Recipe\n"
        "class Own(Recipe):\n"
        "    def needs(self, config):\n"
        f"        critic = ModelNeed(trained=False, path={str(model)!r}, head='value')\n"
        "        return Needs({'policy': ModelNeed(), 'judge': critic})\n"
        "    async def run(self, session): ...\n"
    )
    own = f"recipe={tmp_path / 'own.py'}:Own"
    assert f"the model 'judge' of the recipe ({model}) has no value head (score.weight)" in refused(own).message
    save_file({"score.weight": np.zeros((1, 4), np.float32)}, model / "model.safetensors")
    validate(load_config(None, [own]))


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("trainer.parallelism.pipeline_parallel_degree", "data_parallel_shard_degree"),
        ("generator.engine.pipeline_parallel_size", "tensor_parallel_size"),
    ],
)
def test_pipeline_parallelism_is_refused_with_what_there_is_in_its_place(key, instead):
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{key}=2"])
    assert key in caught.value.message and "\n" not in caught.value.message
    assert "no pipeline parallelism" in (caught.value.hint or "") and instead in (caught.value.hint or "")
    error = refused("generator.engine.extra.pipeline_parallel_size=2")
    assert "not split into stages" in error.message and error.hint


@pytest.mark.parametrize("key", ["gpu_memory_utilization", "tensor_parallel_size", "max_num_seqs"])
def test_what_is_planned_with_a_key_is_not_changed_behind_it(key):
    error = refused(f"generator.engine.extra.{key}=1")
    assert f"generator.engine.extra.{key} is vLLM's" in error.message and error.hint == f"set generator.engine.{key}"


def test_sequences_and_tensor_parallel_degrees_must_suit_the_model(model):
    path = f"model.path={model}"
    assert "longer than the 4096 positions" in refused(path, "trainer.training.seq_len=5000").message
    validate(load_config(None, [path, "cluster.gpus_per_node=8", "trainer.parallelism.tensor_parallel_degree=2"]))
    error = refused(path, "cluster.gpus_per_node=8", "trainer.parallelism.tensor_parallel_degree=4")
    assert "2 key-value heads" in error.message and error.hint == "choose a divisor of 2"
    validate(load_config(None, [path, "cluster.gpus_per_node=8", "generator.engine.tensor_parallel_size=4"]))
    error = refused(path, "cluster.gpus_per_node=16", "generator.engine.tensor_parallel_size=8")
    assert "generator.engine.tensor_parallel_size=8" in error.message


def test_expert_parallelism_and_routing_replay_must_suit_the_model_and_the_run(model):
    path, config = f"model.path={model}", json.loads((model / "config.json").read_text())
    several = (path, "cluster.gpus_per_node=8", "trainer.parallelism.expert_parallel_degree=2")
    replay = "algorithm.routing_replay=true"
    assert "has no experts" in refused(*several).message
    assert "has no experts" in refused(path, replay).message
    assert "the model builtin:qwen3-tiny has no experts" in refused("model.path=builtin:qwen3-tiny", replay).message
    (model / "config.json").write_text(json.dumps(config | MOE | {"num_experts": 6}))
    validate(load_config(None, [*several, replay]))
    four = "trainer.parallelism.expert_parallel_degree=4"
    assert "does not divide the 6 experts" in refused(path, "cluster.gpus_per_node=8", four).message
    tensor_parallel = (path, "cluster.gpus_per_node=8", "trainer.parallelism.tensor_parallel_degree=2")
    assert "tensor_parallel_degree cuts the tokens" in refused(*tensor_parallel, replay).message
    validate(load_config(None, [path, replay, "environment.name=calculator", "reward=[]"]))
    no_cache = (path, "cluster.gpus_per_node=8", "generator.engine.enable_prefix_caching=false")
    assert "enable_prefix_caching=true" in refused(*no_cache, replay).message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"question": "a", "answer": ', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'["a"]', "not a JSON object"),
        (b'{"question": "a"}', "no field 'answer'"),
        (b'{"question": 1, "answer": "b"}', "'question' is neither text nor"),
    ],
)
def test_a_broken_line_of_a_data_file_is_named_by_its_number(tmp_path, line, words):
    file = tmp_path / "train.jsonl"
    good = b'{"question": "a", "answer": "b"}\n'
    file.write_bytes(good * 2 + b"\n" + good * 2)
    validate(load_config(None, [f"data.path={file}"]))
    file.write_bytes(good * 2 + b"\n" + line + b"\n" + good)
    error = refused(f"data.path={file}")
    assert error.message.startswith(f"{file}:4: ") and words in error.message


def test_an_empty_data_file_and_one_without_held_out_prompts_are_refused(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("\n")
    assert "holds no example" in refused(f"data.path={file}").message
    file.write_text('{"question": "a", "answer": "b"}\n')
    assert "no held-out prompts" in refused(f"data.path={file}", "evaluation.num_prompts=5").message
    validate(load_config(None, [f"data.path={file}", f"data.eval_path={file}", "evaluation.num_prompts=5"]))


def test_a_big_data_file_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"question": "a", "answer": "b"}\n' * 10_000 + b"broken\n")
    validate(load_config(None, [f"data.path={file}"]))  # the loader on the nodes reads it all


def test_a_reward_of_ones_own_is_looked_for_in_its_file(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("from math import gcd\ndef score(prompt, response, target, **fields): return 1.0\n")
    validate(load_config(None, [f"reward.0.name={file}:score"]))
    validate(load_config(None, [f"reward.0.name={file}:gcd"]))
    validate(load_config(None, ["reward.0.name=my_package.rewards:score"]))
    error = refused(f"reward.0.name={file}:scroe")
    assert "has no 'scroe'" in error.message and error.hint == "did you mean score?"
    file.write_text("x = 1\ndef score(:\n")
    assert f"{file}:2:" in refused(f"reward.0.name={file}:score").message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-01:01:01", 90061),
        ("UNLIMITED", math.inf),
    ],
)
def test_walltimes_are_read_as_slurm_reads_them(text, seconds):
    assert walltime_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-1", "1-", "a-1"])
def test_what_slurm_would_not_read_is_refused(text):
    with pytest.raises(UserError):
        walltime_s(text)


def test_the_answers_of_an_evaluation_after_training_must_fit_the_model_too(tmp_path):
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 4}
    config["max_position_embeddings"] = 1024
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = ["recipe=sft", f"model.path={tmp_path}", "trainer.training.seq_len=512", "evaluation.num_prompts=5"]
    with pytest.raises(UserError) as refused:
        validate(load_config(None, overrides))
    assert "sequences of 1536 tokens (rollout.max_prompt_tokens + rollout.max_response_tokens)" in refused.value.message
