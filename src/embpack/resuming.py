"""Runs that were interrupted: what of their files is whole stays beside the destination, for the next run to go on.

".NAME.embpack-unfinished" has these files in "new", and unfinished.json, which says what they were made of, and what
is known of each and not in it. The checksums of a file are its own: it is read through before it is used. Ranges of
rows that workers have packed, of files that are not whole, are in "parts-DIGEST", each with what is known of it
(ranges.py). The digest is of what the run's bytes come from: a worker that was given up, and works on, must not put a
part among those of a run of another source.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import embpack
from embpack.errors import FormatError
from embpack.files import format_checksum
from embpack.formats import Checkpoint, OutShard, open_checkpoint
from embpack.formats.atomic import check_space, replace_text
from embpack.formats.new_folder import remove_others
from embpack.formats.paths import path_in
from embpack.formats.source import SourceFile, make_source
from embpack.methods.base import Sums
from embpack.packed_files import PackedFile, check_file
from embpack.ranges import Part, name_part, read_parts
from embpack.rules import Decision, list_names
from embpack.shard_writer import DonePiece, PieceWriter, ShardWriter

RECORD_NAME = "unfinished.json"
_PARTS, _DIGEST_DIGITS = "parts", 16
_RECORD_VERSION = 1
_MOST_RECORD_BYTES = 1 << 30
# Of a source's beginning and of its end, where formats have what they say of themselves.
_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8

Record = dict[str, Any]


def describe_run(checkpoint: Checkpoint, decisions: Sequence[Decision], shards: Sequence[OutShard]) -> Record:
    """Describe all that a run's bytes come from: the source, how tables are packed, what is in which file, embpack."""
    tables = {each.tensor.name: _describe_table(each) for each in decisions if each.variant}
    return {
        "embpack": embpack.__version__,
        "sources": {
            path_in(source.path, checkpoint.path.parent).as_posix(): _describe_source(source)
            for source in list_sources(checkpoint)
        },
        "tables": tables,
        "files": {shard.file_name: _checksum([[t.name, t.dtype, t.shape] for t in shard.tensors]) for shard in shards},
    }


def _describe_table(decision: Decision) -> str:
    assert decision.variant is not None  # it is packed
    return f"{decision.variant.parsed_method.spec} in {decision.row_format}"


def list_sources(checkpoint: Checkpoint) -> list[SourceFile]:
    """List the files that tensors are read from."""
    found = (tensor.source for each in checkpoint.tensors for tensor in (each, *each.parts))
    return list({source.path: source for source in (*checkpoint.sources, *found) if source is not None}.values())


def _describe_source(source: SourceFile) -> Record:
    with source.unchanged("its header"):
        ends = source.read(0, _HEADER_BYTES), source.read(max(0, source.size - _HEADER_BYTES), _HEADER_BYTES)
        header = format_checksum(hashlib.sha256(b"".join(ends)))
        seen = {"bytes": source.size, "modified_ns": source.modified_ns, "header": header}
        return {**seen, "version": source.version} if source.version else seen


def _checksum(value: Any) -> str:
    return format_checksum(hashlib.sha256(json.dumps(value).encode()))


def find_differences(before: Record, now: Record) -> list[str]:
    """Say in what two runs differ, of which the later one is to go on where the earlier one was."""
    found = []
    if before["embpack"] != now["embpack"]:
        found.append(f"embpack was {before['embpack']} and is {now['embpack']}")
    for name in _union(before["sources"], now["sources"]):
        was, own = before["sources"].get(name), now["sources"].get(name)
        if was is None or own is None:
            found.append(f"source {name!r} is {'new' if was is None else 'gone'}")
        elif was["bytes"] != own["bytes"]:
            found.append(f"source {name!r} had {was['bytes']} bytes and has {own['bytes']}")
        elif was != own:
            found.append(f"source {name!r} was written to since")
    for name in _union(before["tables"], now["tables"]):
        was, own = (run["tables"].get(name, "copied as it is") for run in (before, now))
        if was != own:
            found.append(f"table {name!r} was {was} and is to be {own}")
    if not found and before["files"] != now["files"]:
        found.append(
            "the files get other tensors: max_shard_size (--max-shard-size) is another, or keep_checksums "
            "(--keep-checksums)"
        )
    return found


def _union(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return list({**first, **second})


@dataclass
class Unfinished:
    """The files of a run that are whole: the Keeper of a packed folder.

    Attributes:
        dst: the folder that they are for.
        run: what they come from, as describe_run says it.
        writers: of the files.
        sizes: of the files, by name, in bytes.
        resume: whether to go on where an earlier run was.
        files: of those that are whole: what their checksums are and what is known of their tables.
        parts: ranges that are packed, by name.
    """

    dst: Path
    run: Record
    writers: Sequence[ShardWriter]
    sizes: Mapping[str, int]
    resume: bool
    files: dict[str, Record] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    _record: Path | None = None

    def start(self, work: Path) -> None:
        """Take what an earlier run left, if it is to be used.

        Raises:
            OSError: there is no space for what is left to do.
            ValueError: it was another run; says in what it differs.
        """
        record = work / RECORD_NAME
        before = self._read(record)
        if self.resume and before is not None:
            differences = find_differences(before["run"], self.run)
            if differences:
                raise ValueError(
                    f"{self.dst}: cannot be resumed, for {list_names(differences)}; give what was given before, or "
                    "leave out --resume (in Python resume=True) to begin anew"
                )
            self.files = before["files"]
            whole = {number for number, name in enumerate(self.sizes) if name in self.files}
            parts = read_parts(work / _name_parts(self.run))
            self.parts = {name: part for name, part in parts.items() if part.file not in whole}
        elif self.resume:
            warnings.warn(f"{self.dst}: there is nothing to resume, so packing begins", stacklevel=2)
        elif before is not None:
            files, parts = before["files"], read_parts(work / _name_parts(before["run"]))
            if files or parts:
                done = _say_done(len(files), len(before["run"]["files"]), len(parts))
                warnings.warn(
                    f"{self.dst}: an earlier run was interrupted with {done} done, which are removed; --resume (in "
                    "Python resume=True) goes on with them",
                    stacklevel=2,
                )
        self._record = record
        kept = {f"new/{name}" for name in self.files}
        folder = self.parts_folder
        kept |= {f"{folder.name}/{path.name}" for name in self.parts for path in name_part(folder, name)}
        remove_others(work, kept | {RECORD_NAME} if kept else kept)
        check_space(self.dst, [size for name, size in self.sizes.items() if name not in self.files], work)

    def reuse(self, number: int, path: Path) -> bool:
        """Whether a file is there and whole; what is known of its tables is known again then."""
        name, writer = self._name(number), self.writers[number]
        if name not in self.files:
            return False
        try:
            with open_checkpoint(path) as checkpoint:
                [shard] = checkpoint.shards
                file = check_file(path, shard)
                self._restore(self.files[name], path, file, writer.pieces)
        except (ValueError, FileNotFoundError, LookupError, TypeError, OverflowError):
            del self.files[name]
            path.unlink(missing_ok=True)
            return False
        for piece in writer.pieces:
            piece.table.progress(piece.table.decision.tensor.name, piece.num_rows)
        return True

    def _name(self, number: int) -> str:
        return list(self.sizes)[number]

    def _restore(self, record: Record, path: Path, file: PackedFile, pieces: Sequence[PieceWriter]) -> None:
        """Read a file through, and take what was known of its tables."""
        if record["header"] != _checksum_header(path):
            raise FormatError(f"{path}: is not what was written")
        done = {}
        for name in file.contents.tables:
            file.verify(name)
            known = record["pieces"][name]
            sums = [
                Sums(float(error), float(square), int(lost), float(own)) for error, square, lost, own in known["sums"]
            ]
            reused = int(known["reused_rows"]), known["packed_anew"] and str(known["packed_anew"])
            done[name] = DonePiece(file.contents.tables[name], sums, float(known["seconds"]), *reused)
        file.verify_others()
        for piece in pieces:
            shared = piece.table.row_format.form.shared()
            for part in file.parts[piece.name]:
                if shared is not None and part.name == piece.name + shared.suffix:
                    piece.table.check_shared(part.read())
            piece.done = done[piece.name]

    def keep(self, number: int, path: Path) -> None:
        """Write down that a file is whole."""
        known = {
            piece.name: {
                "sums": piece.done.sums,
                "seconds": piece.done.seconds,
                "reused_rows": piece.done.reused_rows,
                "packed_anew": piece.done.packed_anew,
            }
            for piece in self.writers[number].pieces
            if piece.done is not None
        }
        self.files[self._name(number)] = {"header": _checksum_header(path), "pieces": known}
        self._write()

    @cached_property
    def parts_folder(self) -> Path:
        """Where parts lie."""
        return self._work / _name_parts(self.run)

    def find_part(self, name: str, packer: str) -> Part | None:
        """Return what is known of a part that is there, if it is of the same packer, by its checksum."""
        found = self.parts.get(name)
        return found if found is not None and found.packer == packer else None

    def keep_part(self, name: str, part: Part) -> None:
        """Take note of a part that a worker has made."""
        if not self.parts and not self.files:
            self._write()
        self.parts[name] = part

    def drop_parts(self, names: Sequence[str]) -> None:
        """Forget parts, which are of no use any more."""
        for name in names:
            self.parts.pop(name, None)

    @property
    def _work(self) -> Path:
        assert self._record is not None  # it was started
        return self._record.parent

    def _write(self) -> None:
        assert self._record is not None  # it was started
        replace_text(self._record, json.dumps({"version": _RECORD_VERSION, "run": self.run, "files": self.files}))

    def is_kept(self, error: BaseException) -> bool:
        """Whether files stay: what was there before is never removed by mistake, nor is what is whole.

        A ValueError is of the source or of an option, and a next run would end with it, too. All else may be of this
        run alone: a signal that became SystemExit, or what the caller's progress raises to stop it.
        """
        if self._record is None:
            return True
        is_kept = bool(self.files or self.parts) and not isinstance(error, ValueError)
        if is_kept and not isinstance(error, OSError):
            error.add_note(f"{self.dst}: {self.say_kept()}")
        return is_kept

    def say_kept(self) -> str:
        """Say how much is done, and what to do."""
        if not self.files and not self.parts:
            return "nothing was kept"
        done = _say_done(len(self.files), len(self.sizes), len(self.parts))
        return f"{done} are done, and --resume (in Python resume=True) goes on"

    def _read(self, path: Path) -> Record | None:
        """Read what an earlier run wrote down; None if there was none.

        Raises:
            ValueError: it is damaged, and is to be used.
        """
        try:
            with make_source(path) as source:
                value = json.loads(source.read(0, _MOST_RECORD_BYTES))
            if value["version"] == _RECORD_VERSION and _is_run(value["run"]) and isinstance(value["files"], dict):
                return {"run": value["run"], "files": value["files"]}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            pass
        if self.resume:
            raise ValueError(f"{path}: is damaged, so nothing can be resumed; leave out --resume to begin anew")
        return None


def _name_parts(run: Record) -> str:
    """Name the folder for the parts of a run."""
    return f"{_PARTS}-{hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]}"


def _say_done(files: int, of_files: int, parts: int) -> str:
    return f"{files} of {of_files} files" + (f", and {parts} ranges of rows of others," if parts else "")


def _is_run(value: Any) -> bool:
    """Whether what a file says of a run is as describe_run makes it."""
    return (
        set(value) == {"embpack", "sources", "tables", "files"}
        and all(isinstance(value[key], dict) for key in ("sources", "tables", "files"))
        and all(isinstance(own, dict) and "bytes" in own for own in value["sources"].values())
    )


def _checksum_header(path: Path) -> str:
    """Checksum a safetensors file's header, which has the checksums of all else."""
    with make_source(path) as source:
        length = source.read(0, _LENGTH_BYTES)
        header = source.read(_LENGTH_BYTES, int.from_bytes(length, "little"))
        return format_checksum(hashlib.sha256(length + header))
