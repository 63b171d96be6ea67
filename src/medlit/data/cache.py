"""The Arrow cache of notes: its folder and keys, the files that libraries read into it, and one column of a table."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.data.settings import Columns
from medlit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 2  # part of the key of a file's table: raise it when the same file would be read differently

_BATCH = 1_000  # rows
MAX_WORKBOOK = 1 << 30  # bytes that an Excel workbook may unpack to: its texts are held in memory
_EXCEL_AS_TEXT: dict[str, Any] = {"header": None, "dtype": str, "na_filter": False, "engine": "openpyxl"}


def cache_key(*parts: object) -> str:
    """Key of a cached table: 32 hexadecimal digits of everything that it depends on."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """The folder for the text of notes, in the cache of `datasets`; only its owner may enter it.

    What comes from the Hub is not copied here, because `datasets` must find it again offline.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "medlit"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE: {folder} cannot be made private ({error.strerror}), as notes must be; set"
            " HF_DATASETS_CACHE to a folder of your own."
        ) from error
    return folder


def cached_table(
    path: Path, names: tuple[str, ...], rows: Callable[..., Iterator[dict[str, str | None]]], /, **settings: object
) -> Dataset:
    """Write what `rows` yields of a file to the Arrow cache, or map what an earlier run wrote.

    The settings hold tuples and no lists, which `datasets` takes for shards. An error is the one that `rows` raises.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    status = path.stat()
    stamp = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    try:
        return Dataset.from_generator(
            rows,
            features=Features({name: Value("string") for name in names}),
            cache_dir=str(cache_folder()),
            gen_kwargs={"path": str(path), **settings},
            fingerprint=cache_key(VERSION, stamp, sorted(settings.items())),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def read_parquet(path: Path, columns: Columns) -> Dataset:
    """Read the columns that are used, and those others that `datasets` has a type for."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features
    from datasets.exceptions import DatasetGenerationError

    def has_type(field: pa.Field) -> bool:
        try:
            return bool(Features.from_arrow_schema(pa.schema([field])))
        except ValueError:  # UUIDs, maps, list views, binary values of a fixed size
            return False

    try:
        schema = pq.read_schema(path)
        names = schema.names
        column_names(names, str(path))
        kept = pa.schema([field for field in schema if has_type(field)], schema.metadata)
        for key, name in columns.of(names).items():
            if name in names and name not in kept.names:
                raise UserError(columns.no_text(key, str(path), schema.field(name).type))
        if pq.read_metadata(path).num_rows == 0:
            raise UserError(f"data.source: {path} has no rows; it needs at least one note.")
        features = Features.from_arrow_schema(kept)
        return Dataset.from_parquet(str(path), cache_dir=str(cache_folder()), columns=kept.names, features=features)
    except (pa.ArrowException, OSError, DatasetGenerationError):
        raise damaged(path, "Parquet file") from None


def read_excel(path: Path, columns: Columns) -> Dataset:
    """Read a workbook's sheet of notes: the only one with rows, or of several the one with the column of the text."""
    import pandas as pd

    try:
        with zipfile.ZipFile(path) as book:
            size = sum(part.file_size for part in book.infolist())
        if size > MAX_WORKBOOK:
            raise UserError(f"data.source: {path} unpacks to {size >> 20:,} MiB; save such a table as CSV.")
        first = pd.read_excel(path, sheet_name=None, nrows=1, **_EXCEL_AS_TEXT)
        heads = {str(sheet): row for sheet, rows in first.items() for row in rows.values.tolist() if any(row)}
        sheets = [sheet for sheet, head in heads.items() if columns.text in head] or list(heads)
        if len(sheets) != 1:
            fault = f"several sheets of rows ({', '.join(sheets)})" if sheets else "no sheet that begins with a header"
            raise UserError(f"data.source: {path} has {fault}; save the notes as the one sheet of a workbook.")
        head = heads[sheets[0]]
        while head and not head[-1]:  # pandas makes all rows as long as the longest
            head.pop()
        header = column_names(head, f"{path}, sheet {sheets[0]}, row 1")
        return cached_table(path, header, excel_rows, header=header, sheet=sheets[0])
    except (UserError, PermissionError):
        raise
    except ImportError:
        raise UserError(f"data.source: {path} cannot be read without openpyxl; run `pip install openpyxl`.") from None
    except Exception as error:  # a damaged workbook fails in zipfile, XML or openpyxl, each with its own classes
        raise damaged(path, "Excel workbook") from error


def excel_rows(path: str, header: tuple[str, ...], sheet: str) -> Iterator[dict[str, str | None]]:
    """Yield column -> text of each row after the header that is not blank."""
    import pandas as pd

    rows = pd.read_excel(path, sheet_name=sheet, **_EXCEL_AS_TEXT).itertuples(index=False, name=None)
    filled = [(number, row) for number, row in enumerate(rows, start=1) if any(row)][1:]
    if not filled:
        raise UserError(f"data.source: {path} has a header and no rows; it needs at least one note.")
    for number, row in filled:
        if any(row[len(header) :]):
            raise UserError(
                f"data.source: {path}, row {number}: a cell stands beside the header's columns; name its column."
            )
        yield dict(zip(header, row, strict=False))


def damaged(path: Path, kind: str) -> UserError:
    """The error for a file that is not what its suffix says."""
    return UserError(f"data.source: {path} is not a whole {kind} (cut short, or another format); export it again.")


def column_names(header: Sequence[str], where: str) -> tuple[str, ...]:
    """Names of all columns; one without a name is called after its place.

    Raises:
        UserError: a name is repeated.
    """
    names = tuple(name.strip() or f"column_{place}" for place, name in enumerate(header, start=1))
    repeated = next((name for name, times in Counter(names).items() if times > 1), None)
    if repeated is not None:
        raise UserError(f"data.source: {where}: two columns are called {repeated[:40]!r}; rename one.")
    return names


def iter_column(rows: Dataset, column: str) -> Iterator[str | None]:
    """Yield the values of a text column in the order of the rows, from the files and not through their mapping.

    Pages of a mapped file count as this process's memory once they are read: one pass over a million notes would add
    gigabytes. Here every batch is released. Tables that are not simply the rows of their files (rows were selected, or
    are in memory, or a column was renamed) are read through the mapping.
    """
    import pyarrow as pa

    files = [file["filename"] for file in rows.cache_files]
    if rows._indices is None and _rows_with(files, rows.column_names) == len(rows):
        for file in files:
            with pa.OSFile(file) as source, pa.ipc.open_stream(source) as batches:
                for batch in batches:
                    yield from batch.column(column).to_pylist()
        return
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH):
        yield from table.column(column).to_pylist()


def _rows_with(files: list[str], columns: list[str]) -> int:
    """Number of rows in those Arrow files that have these columns; no value is read."""
    import pyarrow as pa

    rows = 0
    for file in files:
        with pa.memory_map(file) as source, pa.ipc.open_stream(source) as batches:
            if set(columns) <= set(batches.schema.names):
                rows += sum(len(batch) for batch in batches)
    return rows
