"""What a recipe says of itself is all that is asked: placement, checks and resume go by it, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_hpc.config import Config, UserError, load_config, plan, safe_changes, validate
from forge_hpc.config.recipes import load_recipe, needs_of, resolve_recipe_args
from forge_hpc.config.registry import RECIPES

OWN = """
from dataclasses import dataclass

from forge_hpc.recipes import ModelNeed, Needs, Recipe, UserError, setting


@dataclass
class Options:
    beta: float = 0.1
    rounds: int = 1


class Mine(Recipe):
    Args = Options

    async def run(self, session):
        await session.start()


@dataclass
class Teacher:
    teacher: str = setting("", path=True)


class Taught(Mine):
    Args = Teacher

    def needs(self, config):
        return Needs({"policy": ModelNeed(), "teacher": ModelNeed(trained=False, path=self.args.teacher)})


class TrainersAlone(Mine):
    def needs(self, config):
        return Needs({"policy": ModelNeed(loss="sft")}, "none", "examples", rewards=False, environments=False)


class Picky(Mine):
    def check(self, config):
        if self.args.rounds > 3:
            raise UserError("recipe_args.rounds is too large", "give at most 3")


class WithoutRun(Recipe):
    pass


class NotAsync(Recipe):
    def run(self, session):
        pass


def function(session):
    pass
"""
SLIP = """
from forge_hpc.recipes import Recipe


class Slip(Recipe):
    async def run(self, session):
        await session.start()
        await session.publsh(1)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def config(directory: Path, name: str, *overrides: str) -> Config:
    return load_config(None, [f"recipe={directory}/own.py:{name}", *overrides])


def test_a_recipe_of_ones_own_is_found_beside_the_configuration_and_placed_like_grpo(own: Path) -> None:
    (own / "own.yaml").write_text("recipe: own.py:Mine\nrollout: {group_size: 1}\ncluster: {nodes: 4}\n")
    cfg = load_config(own / "own.yaml")
    assert cfg.recipe == f"{own}/own.py:Mine"
    validate(cfg)
    assert (plan(cfg, 8).trainer_nodes, plan(cfg, 8).rollout_nodes) == (range(2), range(2, 4))
    assert type(load_recipe(cfg)).__name__ == "Mine"


def test_a_recipe_of_trainers_alone_has_every_node_and_says_so_where_rollout_nodes_are_asked_for(own: Path) -> None:
    alone = config(own, "TrainersAlone", "cluster.nodes=4")
    validate(alone)
    placement = plan(alone, 8)
    assert (placement.trainer_nodes, placement.rollout_nodes, placement.trainer_procs) == (range(4), range(4, 4), 32)
    assert plan(config(own, "TrainersAlone", "cluster.nodes=4", "cluster.rollout_nodes=0"), 8) == placement
    with pytest.raises(UserError, match="trains on every node"):
        plan(config(own, "TrainersAlone", "cluster.nodes=4", "cluster.rollout_nodes=1"), 8)
    with pytest.raises(UserError, match="plays no episodes"):
        validate(config(own, "TrainersAlone", "environment.name=guessing"))


def test_options_have_types_and_names_and_are_compared_at_resume(own: Path) -> None:
    cfg = config(own, "Mine", "recipe_args.beta=1")
    assert load_recipe(cfg).args.beta == 1.0 and isinstance(load_recipe(cfg).args.beta, float)
    for given, words, hint in (
        ("recipe_args={betta: 1}", "unknown key recipe_args.betta", "did you mean recipe_args.beta?"),
        ("recipe_args={rounds: many}", "recipe_args.rounds must be a whole number, not 'many'", None),
    ):
        with pytest.raises(UserError) as refused:
            validate(config(own, "Mine", given))
        assert words in refused.value.message and refused.value.hint == hint
    with pytest.raises(UserError, match="recipe=grpo has no options"):
        validate(load_config(None, ["recipe_args={beta: 1}"]))
    with pytest.raises(UserError, match=r"recipe_args.beta \(1 there, 2 now\)"):
        safe_changes(cfg, config(own, "Mine", "recipe_args.beta=2"), 0, "refused", "hint")


def test_paths_among_the_options_are_looked_for_beside_the_yaml(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (own / "teacher").mkdir()
    (own / "own.yaml").write_text("recipe: own.py:Taught\nrecipe_args: {teacher: teacher}\n")
    cfg = load_config(own / "own.yaml")
    resolve_recipe_args(cfg, own / "own.yaml")
    assert cfg.recipe_args == {"teacher": str(own / "teacher")}
    assert needs_of(cfg).models["teacher"].path == str(own / "teacher")
    with pytest.raises(UserError, match=r"the model 'teacher' of the recipe: no such directory: \./nowhere"):
        validate(load_config(own / "own.yaml", ["recipe_args.teacher=./nowhere"]))


def test_a_recipe_refuses_what_it_cannot_work_with_before_anything_is_queued(own: Path) -> None:
    validate(config(own, "Picky", "recipe_args.rounds=3"))
    with pytest.raises(UserError, match="rounds is too large"):
        validate(config(own, "Picky", "recipe_args.rounds=4"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OWN:function", "is no forge_hpc.recipes.Recipe"),
        ("OWN:WithoutRun", "has no async run"),
        ("OWN:NotAsync", "has no async run"),
        ("OWN:other", "has no 'other'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("nowhere.py:f", "recipe: no such file: nowhere.py"),
        ("nowhere.py:", "recipe is 'nowhere.py:'"),
        ("gpro", "recipe is 'gpro'"),
    ],
)
def test_what_is_no_recipe_is_refused(name: str, words: str, own: Path) -> None:
    with pytest.raises(UserError) as refused:
        validate(Config(recipe=name.replace("OWN", f"{own}/own.py")))
    assert words in refused.value.message and refused.value.hint


def test_a_misspelt_name_of_the_session_is_found_where_the_recipe_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "slip.py").write_text(SLIP)
    with pytest.raises(UserError, match=r"slip.py:Slip, line 8: a session has no 'publsh'") as refused:
        validate(Config(recipe=f"{tmp_path}/slip.py:Slip"))
    assert refused.value.hint == "did you mean publish?"


def test_a_session_is_what_run_calls_it_and_nothing_else(tmp_path: Path) -> None:
    named = SLIP.replace("session", "s").replace("publsh", "strat")
    (tmp_path / "named.py").write_text(named)
    with pytest.raises(UserError, match=r"named.py:Slip, line 8: a s.* has no 'strat'"):
        validate(Config(recipe=f"{tmp_path}/named.py:Slip"))
    other = "\n\ndef ask():\n    import requests\n    session = requests.Session()\n    return session.post('a')\n"
    (tmp_path / "other.py").write_text(SLIP.replace("publsh", "publish") + other)
    validate(Config(recipe=f"{tmp_path}/other.py:Slip"))


def test_a_recipe_whose_module_fails_says_how(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Mine: pass\n1 / 0\n")
    with pytest.raises(UserError, match=r"broken.py cannot be imported: ZeroDivisionError"):
        validate(Config(recipe=f"{tmp_path}/broken.py:Mine"))


@pytest.mark.parametrize("name", [*RECIPES, "forge_hpc.recipes.grpo:GRPO"])
def test_our_recipes_are_found_by_name(name: str) -> None:
    cfg = Config(recipe=name)
    assert type(load_recipe(cfg)).__module__.startswith("forge_hpc.recipes.")
    assert needs_of(cfg).trains == (name != "eval")
