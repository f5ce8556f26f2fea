"""Site profiles: what is the same for every run on one cluster, in one small file outside the project.

    # ~/.config/forge_hpc/sites/NAME.yaml, taken with --site NAME; or any file that $FORGE_HPC_SITE names
    slurm: {partition: gpu, account: my-project, setup: [module load cuda]}
    cluster: {gpus_per_node: 8}
    sandbox: {runtime: apptainer, image: /apps/images/python.sif}

A site's values win over the configuration file, and lose to key=value on the command line.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from forge_hpc.config import UserError

SECTIONS = ("slurm", "cluster", "sandbox")


def sites_folder() -> Path:
    """Where profiles are looked for by name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "forge_hpc" / "sites"


def site_file(name: str | None) -> Path | None:
    """The file of the profile `name`, else the one that $FORGE_HPC_SITE names, else None.

    Raises:
        UserError: there is no such file; the hint names those that are there.
    """
    name = name or os.environ.get("FORGE_HPC_SITE")
    if not name:
        return None
    by_name = sites_folder() / f"{name}.yaml"
    path = Path(name).expanduser() if "/" in name or name.endswith((".yaml", ".yml")) else by_name
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in sites_folder().glob("*.yaml"))) or "none"
        raise UserError(f"no site profile {name}: {path} is not a file", f"profiles in {sites_folder()}: {known}")
    return path


def site_overrides(name: str | None) -> list[str]:
    """The profile as ``key=value`` overrides, [] where there is none. Raises UserError on a broken file."""
    path = site_file(name)
    if path is None:
        return []
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # no scalar has a type
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    overrides = []
    for section, keys in _pairs(root, path):
        if section not in SECTIONS:
            raise UserError(f"{path}: a site profile has no section {section}", f"sections: {', '.join(SECTIONS)}")
        # Each value goes on as the text that it was, so that 24:00:00 stays a time.
        overrides += [f"{section}.{key}={_text(value)}" for key, value in _pairs(keys, path)]
    return overrides


def _pairs(node: yaml.Node | None, path: Path) -> list[tuple[str, yaml.Node]]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null")):
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{path}:{node.start_mark.line + 1}: a mapping is needed here", "write `slurm: {partition: gpu}`"
        )
    return [(key.value, value) for key, value in node.value]


def _text(node: yaml.Node) -> str:
    return yaml.serialize(node, Dumper=yaml.BaseDumper, allow_unicode=True).removesuffix("...\n").strip()
