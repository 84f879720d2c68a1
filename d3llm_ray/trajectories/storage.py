"""Files on any `pyarrow.fs` storage (local, `s3://`, `gs://`), complete under their final names or absent."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from d3llm_ray.errors import InputError
from d3llm_ray.paths import expanded
from d3llm_ray.report import destination, storing

SUCCESS = "_SUCCESS"
LEFTOVER = re.compile(r"_partial\.[0-9a-f]+\..+")
PARTIAL = "_partial"  # begins the names of files that are being written; Parquet readers skip names that begin with "_"
STARTED = "_STARTED"  # the marker of a folder whose writer has not finished
COMPRESSION_LEVEL = 9  # zstd; rows are written once and read at every epoch


@dataclass(frozen=True)
class Location:
    """A file or folder: the file system, and the path within it."""

    filesystem: fs.FileSystem
    path: str
    name: str  # as the user wrote it, made absolute when it is local; also what Ray Data reads

    @classmethod
    def of(cls, name: str | os.PathLike[str], field: str = "path") -> Location:
        """Resolve a local path or a URI; `InputError` names `field` when no file system serves it."""
        text = os.fspath(name)
        if "://" not in text:
            absolute = os.path.abspath(expanded(text, field))
            return cls(fs.LocalFileSystem(), absolute, absolute)
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{field}: cannot open {text!r}: {error}; accepted: a local path, s3://, gs://") from error
        return cls(filesystem, path, text)

    def __truediv__(self, child: str) -> Location:
        return Location(self.filesystem, f"{self.path}/{child}", f"{self.name}/{child}")

    @property
    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    @property
    def exists(self) -> bool:
        return bool(self.info.type != fs.FileType.NotFound)

    @property
    def is_folder(self) -> bool:
        return bool(self.info.type == fs.FileType.Directory)

    def files(self, suffix: str = "") -> list[Location]:
        """The complete files directly in this folder whose names end in `suffix`, sorted; none without the folder."""
        return [self / name for name in self._names() if name.endswith(suffix) and not name.startswith(PARTIAL)]

    def leftovers(self) -> list[Location]:
        """What writers that were killed have left in this folder."""
        return [self / name for name in self._names() if LEFTOVER.fullmatch(name)]

    def names(self) -> list[str]:
        """Everything directly in this folder, sorted; nothing without the folder."""
        entries = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(item.base_name for item in entries)

    def _names(self) -> list[str]:
        entries = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(item.base_name for item in entries if item.type == fs.FileType.File)

    def resolved(self, folder: bool = False) -> str:
        """The path that writing ends at: on this machine, behind symbolic links. `InputError` for a pipe or device."""
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        return str(destination(self.path, "output", folder=folder)) if local else self.path

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.resolved(folder=True), recursive=True)

    def remove_folder(self) -> None:
        if self.exists:
            self.filesystem.delete_dir(self.path)

    def remove(self) -> None:
        """Delete this file."""
        self.filesystem.delete_file(self.path)

    def read_text(self) -> str:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read()).decode()

    def write_text(self, text: str) -> None:
        with self._replaced() as partial, self.filesystem.open_output_stream(partial) as stream:
            stream.write(text.encode())

    def write_table(self, table: pa.Table, row_group_rows: int = 8192) -> None:
        """Write Parquet (zstd)."""
        with self._replaced() as partial:
            pq.write_table(
                table,
                partial,
                filesystem=self.filesystem,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                row_group_size=row_group_rows,
            )

    @contextmanager
    def _replaced(self) -> Iterator[str]:
        """Where the bytes go before the rename: in the same folder, under a name of this writer's own.

        A writer that fails leaves nothing.
        """
        target = self.resolved()
        folder, _, file = target.rpartition("/")
        partial = f"{folder}/{PARTIAL}.{uuid.uuid4().hex[:8]}.{file}"
        with storing(self.name):  # Arrow's error does not say which file
            try:
                yield partial
                self.filesystem.move(partial, target)
            except BaseException:
                with suppress(OSError):
                    self.filesystem.delete_file(partial)
                raise
