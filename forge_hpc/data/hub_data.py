"""What ``datasets`` finds under a name, in a directory or in a Parquet file: the text files of a split, or a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.hub_cache import split_name
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.damage import naming_damage
from forge_hpc.data.text_files import TextFile
from forge_hpc.hub.assets import Asset, find_cached, is_hub_name


def find_text_files(data: DataConfig, split: str, *, streaming: bool) -> list[TextFile] | None:
    """The JSON or CSV files of a split of a directory or a dataset of the hub; None where its files are others.

    Without ``streaming`` what is on the hub is downloaded to its cache. Raises UserError, as ``load_dataset``.
    """
    import datasets
    from datasets.download.streaming_download_manager import StreamingDownloadManager
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    with naming_sources(data, split):
        builder = datasets.load_dataset_builder(**_source(data))
        settings = builder.config
        if not isinstance(builder, Csv | Json) or _is_special(builder) or split not in settings.data_files:
            return None
        access = datasets.DownloadConfig(
            token=builder.token,
            storage_options=builder.storage_options,
            extract_on_the_fly=True,
            cache_dir=None if streaming else builder._cache_downloaded_dir,
        )
        manager = (StreamingDownloadManager if streaming else datasets.DownloadManager)(
            dataset_name=builder.dataset_name,
            data_dir=settings.data_dir,
            download_config=access,
            base_path=builder.base_path,
        )
        found = manager.extract(manager.download(list(settings.data_files[split])))
        csv = settings.pd_read_csv_kwargs if isinstance(builder, Csv) else None
        return [TextFile(str(path), csv) for path in manager.iter_files(found)]


def _is_special(builder: Any) -> bool:
    """Whether the dataset's own card says more of its files than that they are text: paths of images, for one."""
    settings = builder.config
    features = settings.features or builder.info.features or {}
    has_media = any(_as_stored(feature) != feature for feature in features.values())
    return has_media or bool(getattr(settings, "field", None)) or settings.encoding not in (None, "utf-8")


def load_dataset(data: DataConfig, split: str, *, streaming: bool) -> Any:
    """A ``datasets.Dataset``, or an ``IterableDataset`` that reads as it goes. Raises UserError.

    Images, audio and video stay as they are stored, bytes and path.
    """
    import datasets

    source = _source(data)
    if source["path"].endswith(".parquet"):
        if not Path(source["path"]).is_file():
            raise UserError(f"no such data file: {source['path']}", "give data.path")
        source, split = {"path": "parquet", "data_files": source["path"]}, "train"
    with naming_sources(data, split):
        dataset = datasets.load_dataset(**source, split=split, streaming=streaming)
    for column, feature in (dataset.features or {}).items():
        if (stored := _as_stored(feature)) != feature:
            dataset = dataset.cast_column(column, stored)
    return dataset


def _source(data: DataConfig) -> dict[str, Any]:
    """What ``datasets`` is told. Of a dataset of the hub that the cache has whole it is the directory there: it is the
    same, and no hub is asked."""
    path = Path(data.path).expanduser()
    if path.exists() or path.suffix == ".parquet" or not is_hub_name(data.path):
        return {"path": str(path) if path.exists() or path.suffix == ".parquet" else data.path, "name": data.name}
    if (cached := find_cached(Asset("dataset", data.path, (), data.name))) is not None:
        return {"path": str(cached.snapshot), "name": data.name}
    name, revision = split_name(data.path)
    return {"path": name, "name": data.name, "revision": revision}


def _as_stored(feature: Any) -> Any:
    """The feature without decoding, also within others; what is stored as JSON text alone is decoded."""
    import datasets

    if isinstance(feature, dict):
        return {name: _as_stored(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_as_stored(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature


@contextmanager
def naming_sources(data: DataConfig, split: str) -> Iterator[None]:
    """Raise a UserError for what ``datasets`` raises where there are no such data, or they cannot be read."""
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with naming_damage(data.path):
            yield
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {data.path} (name {data.name}, split {split}): {first_line}",
            "check path, name and split of the data; a JSONL file needs the suffix .jsonl",
        ) from None
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, httpx.TransportError) as error:
        raise UserError(
            f"{data.path} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            "where there is a network: forge-hpc fetch with the run's configuration, and the same HF_HOME",
        ) from None
