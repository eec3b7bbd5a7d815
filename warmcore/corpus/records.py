"""Files with a document in each record: JSONL, Parquet and Arrow, read in batches.

The split orders documents by the hash of their content, and no table can be read in that order.
All texts are therefore written into a scratch file. There a document is read again by its offset.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from warmcore.corpus.sources import SourceFile
from warmcore.specs.fields import FieldError

# 1024 documents of some kB each: a few MB in memory, however large the file is.
_BATCH_ROWS = 1024
_NUM_SHOWN = 10  # keys or columns in an error


def read_texts(file: SourceFile, field: str) -> Iterator[str]:
    """Return the field `field` of every record, in the order of the file.

    Raises:
        ValueError: a record lacks the field, or the extension does not fit the content.
    """
    if file.extension in (".jsonl", ".jsonl.gz"):
        return _read_json_lines(file, field)
    return _read_column(file, field)


def unpack_records(
    files: Iterable[SourceFile], field: str, path: Path
) -> Iterator[tuple[int, bytes]]:
    """Write the text of every record into `path`; yield its offset there and its bytes."""
    offset = 0
    with path.open("wb") as scratch:
        for file in files:
            for number, text in enumerate(read_texts(file, field), start=1):
                content = _encode_text(text, file.path, number)
                scratch.write(content)
                yield offset, content
                offset += len(content)


def _encode_text(text: str, path: Path, number: int) -> bytes:
    # JSON may hold half of a surrogate pair, "\ud800": it has no bytes in UTF-8.
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: record {number} holds half a character ({error.reason}); remove it"
        ) from None


def _read_json_lines(file: SourceFile, field: str) -> Iterator[str]:
    with _open_file(file) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _parse_line(line, field, f"{file.path}:{number}")
                    if text is not None:
                        yield text
        except (OSError, EOFError) as error:
            raise ValueError(f"{file.path} cannot be read: {error}") from error


def _open_file(file: SourceFile) -> AbstractContextManager[IO[bytes]]:
    if file.extension.endswith(".gz"):
        return cast("AbstractContextManager[IO[bytes]]", gzip.open(file.path, "rb"))
    return file.path.open("rb")


def _parse_line(line: bytes, field: str, place: str) -> str | None:
    """Return the text in a line of JSON; None for null, which is no document in tables either."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}") from None
    match record:
        case {**fields} if field in fields and isinstance(fields[field], str | None):
            return fields[field]
        case {**fields}:
            found = f"{field!r} is {fields[field]!r:.40}" if field in fields else f"no {field!r}"
            keys = ", ".join(sorted(fields)[:_NUM_SHOWN]) or "none"
            raise FieldError(
                "text_field",
                field,
                f"{place}: {found} in this record; its keys are: {keys}; "
                "text_field can name another key, if its value is a string",
            )
        case _:
            raise ValueError(f'{place} is no object; a line like {{"{field}": "…"}} works')


def _read_column(file: SourceFile, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - of the extra `datasets`
    except ImportError:
        raise ValueError(f"{file.path} needs: pip install 'warmscale[datasets]'") from None
    try:
        for batch in _read_batches(file, field):
            _check_column(batch.schema, field, file.path)
            yield from (text for text in batch.column(field).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file.path} is no {file.extension[1:]} file: {reason}") from None


def _read_batches(file: SourceFile, field: str) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    if file.extension == ".parquet":
        table = pq.ParquetFile(file.path)
        _check_column(table.schema_arrow, field, file.path)
        return table.iter_batches(batch_size=_BATCH_ROWS, columns=[field])
    # Arrow has two formats with the same extension: a stream of batches, and a file with an index.
    mapped = pa.memory_map(str(file.path))
    try:
        return iter(pa.ipc.open_stream(mapped))  # `datasets` writes streams
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(mapped)
        return map(reader.get_batch, range(reader.num_record_batches))


def _check_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415

    # Strings only: bytes have no known encoding, and numbers are no text.
    names = cast("list[str]", schema.names)
    if field not in names:
        columns = ", ".join(chain(sorted(names)[:_NUM_SHOWN], ["…"] * (len(names) > _NUM_SHOWN)))
        message = f"{path}: no column {field!r}; text_field can name: {columns}"
        raise FieldError("text_field", field, message)
    kind = schema.field(field).type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise FieldError("text_field", field, f"{path}: column {field!r} holds {kind}, not strings")
