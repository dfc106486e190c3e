"""Load a model or a cluster: a built-in one by its name, or one from a user's own file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tuner.core.cluster import Cluster
from tuner.core.workload import Model
from tuner.errors import InputError, did_you_mean
from tuner.files import read_json_data, read_yaml
from tuner.frameworks.huggingface.config import model_from_config

ROOT = Path(__file__).parent


def model_names() -> list[str]:
    """Return the names of the built-in models, sorted."""
    return _names("models")


def cluster_names() -> list[str]:
    """Return the names of the built-in clusters, sorted."""
    return _names("clusters")


def load_model(name_or_path: str) -> Model:
    """Return a model.

    Args:
        name_or_path: the name of a built-in model, the path of a `.yaml` file that holds the fields of `Model`, or the
            path of a Hugging Face `config.json`.

    Raises:
        InputError: if there is no such model or file, or the file doesn't describe a model.
    """
    path = _find("models", name_or_path, ["a .yaml file", "a Hugging Face config.json"])
    if path.suffix != ".json":
        return read_yaml(Model, path)
    return model_from_config(read_json_data(path), str(path))


def load_cluster(name_or_path: str, nodes: int | None = None) -> Cluster:
    """Return a cluster.

    Args:
        name_or_path: the name of a built-in cluster, or the path of a `.yaml` file that holds the fields of `Cluster`.
        nodes: replaces the cluster's number of nodes, unless it is None.

    Raises:
        InputError: if there is no such cluster or file, the file doesn't describe a cluster, or `nodes` is below 1.
    """
    cluster = read_yaml(Cluster, _find("clusters", name_or_path, ["a .yaml file"]))
    if nodes is None:
        return cluster
    try:
        return replace(cluster, nodes=nodes)
    except ValueError as error:
        raise InputError(f"cluster {name_or_path}: {error}") from None


def _names(kind: str) -> list[str]:
    """Return the names of the built-in files of a kind, which is the folder that holds them: "models" or "clusters"."""
    return sorted(path.stem for path in (ROOT / kind).glob("*.yaml"))


def _find(kind: str, name_or_path: str, file_types: Sequence[str]) -> Path:
    """Return the path of a built-in file or of the user's own; `file_types` says which files a user may give."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml", ".json"}:
        return path
    names = _names(kind)
    if name_or_path in names:
        return ROOT / kind / f"{name_or_path}.yaml"
    raise InputError(
        f"unknown {kind.removesuffix('s')} '{name_or_path}'{did_you_mean(name_or_path, names)}. "
        f"Give the path of {' or '.join(file_types)}, or one of: {', '.join(names)}"
    )
