"""Refuses SQLite files of a results folder that would make SQLite touch files outside the folder."""

from pathlib import Path

from tuner.errors import InputError

_JOURNAL_END = bytes.fromhex("d9d505f920a163d7")
"""The last bytes of a SQLite journal that names a super-journal. Published: https://www.sqlite.org/fileformat2.html.
A transaction over several files has one; neither Optuna nor MLflow makes such transactions.
"""


def refuse_foreign_journal(database: Path) -> None:
    """Refuse a SQLite file whose journal names another file, since SQLite deletes that file when it opens the first.

    Raises:
        InputError: naming the journal.
    """
    journal = database.with_name(f"{database.name}-journal")
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        file.seek(max(0, journal.stat().st_size - len(_JOURNAL_END)))
        if file.read() == _JOURNAL_END:
            raise InputError(
                f"{journal}: names another file, which SQLite would delete; megatune never writes such a journal: "
                f"delete it together with {database.name}"
            )
