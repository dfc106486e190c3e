"""The SQLite store of MLflow in a results folder: its URI, and checks that it keeps all files inside that folder.

The store says where MLflow reads and writes the files of each MLflow run, and somebody else may have written the store.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from tuner.errors import InputError
from tuner.printable import one_line
from tuner.sweep.folder import SweepFolder
from tuner.sweep.journal import refuse_foreign_journal

_LOCATIONS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of the store that hold paths which MLflow reads or writes. The table `experiments` has such a
column, too; only the sweep's own experiment is checked there."""


def own_store(results: Path) -> str:
    """Return the tracking URI of the SQLite store in a results folder, whether or not the store exists yet."""
    # The path is absolute, since each process would resolve a relative one in its own working directory.
    return f"sqlite:///{results.absolute() / 'mlflow.db'}"


def is_own_store(results: Path, uri: str) -> bool:
    """Return whether a tracking URI names the SQLite store in a results folder."""
    scheme, _, rest = uri.partition(":///")
    path = Path(rest.partition("?")[0])
    return (
        scheme.partition("+")[0] == "sqlite"
        and path.name == "mlflow.db"
        and path.parent.resolve() == results.resolve()
    )


def refuse_places_outside(folder: SweepFolder) -> None:
    """Check that the SQLite store in a results folder keeps no files outside the folder; without a store, do nothing.

    Raises:
        InputError: if the store names a path outside the folder, or cannot be read. The error says what to do.
    """
    database = folder.tracking_store
    refuse_foreign_journal(database)
    if not database.exists():
        return
    experiment = folder.sweep().experiment
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True)) as store:
            places = [place for table, column in _LOCATIONS for place in _values(store, table, column)]
            places += _values(store, "experiments", "artifact_location", experiment)
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot be read: {error}") from None
    for place in places:
        artifact_folder(folder.path, str(place))


def _values(store: sqlite3.Connection, table: str, column: str, name: str | None = None) -> list[object]:
    """Return the distinct values of a column that are not null; empty if this release of MLflow has no such column.

    `name` restricts the rows to those whose column `name` has this value; None takes all rows.
    """
    if not store.execute("select 1 from pragma_table_info(?) where name = ?", (table, column)).fetchone():
        return []
    # The names are constants of this module.
    query = f"select distinct {column} from {table} where {column} is not null"  # noqa: S608
    rows = store.execute(query) if name is None else store.execute(f"{query} and name = ?", (name,))
    return [row[0] for row in rows]


def artifact_folder(results: Path, place: str) -> Path:
    """Return the folder in which the SQLite store of a results folder keeps files, after a check that it lies inside.

    Args:
        results: the results folder.
        place: the folder as the store states it: an absolute path, or a `file://` URI without a host.

    Raises:
        InputError: if `place` lies outside the results folder, or is no such path or URI.
    """
    text = place.removeprefix("file://")
    path = Path(unquote(text))  # MLflow decodes %2e in a path as well as in a URI
    is_plain = text.startswith("/") and not {"?", "#", "\0"} & {*text, *str(path)} - {
        *str(results.absolute())
    }
    if not is_plain or not path.resolve().is_relative_to(results.resolve()):
        raise InputError(
            f"{results / 'mlflow.db'}: keeps files at {one_line(place)}, outside the results folder: somebody else "
            "made it, or the folder was moved. Delete mlflow.db and mlartifacts there, and `megatune sync` writes them "
            "again from the trials. Or name another MLflow with --uri"
        )
    return path
