"""Journal: every scored group of a run as a Parquet dataset, the input of any later analysis and of offline objectives.

One row per group:
    ticket int64 · prompt, prompt_class, category (or null), checksum, sampler, reward_worker string · seeds list<int64>
    · step_seed, version int64 · truncated bool (the prompt was cut off) · reward list<float32> [G]
    · reward.<part> list<float32> [G] · final_latents fixed-shape tensor<float32> [G, C, h, w]
    · sample_s, score_s, scored_at float64 (seconds; wall clock)

Parts are written beside and renamed. A group that was drawn again appears twice; `read_journal` keeps the last of
each ticket.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysteer.calls import AGAIN
from raysteer.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_PART = 64
FETCH_TIMEOUT_S = 60.0
_PART = "part-*.parquet"

logger = logging.getLogger(__name__)


class JournalWriter:
    """Collects rows and writes parts into `folder`; continues the numbering it finds there. No Ray."""

    def __init__(self, folder: str | Path, rows_per_part: int = ROWS_PER_PART) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_per_part = rows_per_part
        self.rows: list[tuple[Mapping[str, Any], np.ndarray | None]] = []
        self._next = 1 + max((int(path.stem.split("-")[1]) for path in self.folder.glob(_PART)), default=0)

    def append(self, row: Mapping[str, Any], final_latents: np.ndarray | None) -> None:
        """One group; `final_latents` float32 [G, C, h, w], or None when they are lost with their owner."""
        self.rows.append((row, final_latents))
        if len(self.rows) >= self.rows_per_part:
            self.flush()

    def flush(self) -> int:
        """Write what has been collected; returns the number of rows written.

        Raises OSError when the disk refuses; what is not written stays collected.
        """
        count = len(self.rows)
        while self.rows:  # one part for each shape of latents
            shape = _shape(self.rows[0])
            self._write([row for row in self.rows if _shape(row) == shape])
            self.rows = [row for row in self.rows if _shape(row) != shape]
        return count

    def _write(self, rows: list[tuple[Mapping[str, Any], np.ndarray | None]]) -> None:
        import pyarrow.parquet as pq

        target = self.folder / f"part-{self._next:06d}.parquet"
        beside = self.folder / f".{target.name}.{os.getpid()}"
        try:
            pq.write_table(_table(rows), beside, compression="zstd")
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError:
            beside.unlink(missing_ok=True)  # on a full disk its room is needed
            raise
        self._next += 1


class Journal:
    """Actor around a JournalWriter. Args: folder."""

    def __init__(self, folder: str) -> None:
        self.writer = JournalWriter(folder)
        self.without_latents = 0

    def append(self, row: Mapping[str, Any], trajectory: list[Any]) -> None:
        """`trajectory` holds one object reference; of it only the final latents are kept.

        Raises StorageError when the disk refuses; the row is kept for the next flush.
        """
        import ray

        try:
            fetched = ray.get(trajectory[0], timeout=FETCH_TIMEOUT_S)
            latents = as_float32(fetched.final_latents, fetched.dtype)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            latents = None
            self.without_latents += 1
            logger.warning("ticket %s is journaled without latents: its sampler died", row["ticket"])
        with self._named():
            self.writer.append(row, latents)

    def ping(self) -> None:
        """Answers while the process lives."""

    def flush(self) -> dict[str, int]:
        """Everything appended so far is on disk when this returns. Raises StorageError when the disk refuses."""
        with self._named():
            return {"rows": self.writer.flush(), "without_latents": self.without_latents}

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"the journal cannot be written ({error.strerror or error})"
            raise StorageError(str(self.writer.folder), problem, f"free some space; {AGAIN}") from error


def read_journal(folder: str | Path) -> pa.Table:
    """All rows, one per ticket (the last one written), in ticket order. Raises FileNotFoundError when there is no
    part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted(Path(folder).glob(_PART))
    if not parts:
        raise FileNotFoundError(f"{folder}: no journal here")
    table = pa.concat_tables([pq.read_table(part) for part in parts], promote_options="default")
    last = {ticket: index for index, ticket in enumerate(table["ticket"].to_pylist())}
    return table.take([last[ticket] for ticket in sorted(last)])


def latents_of(table: pa.Table) -> np.ndarray:
    """final_latents of a journal table as float32 [rows, G, C, h, w]; every row must have them."""
    return table["final_latents"].combine_chunks().to_numpy_ndarray()


def as_float32(latents: np.ndarray, dtype: str) -> np.ndarray:
    """Stored latents as float32, exactly; bfloat16 is stored as its uint16 bits."""
    if dtype == "bfloat16":
        return (latents.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(latents, np.float32)


def _shape(row: tuple[Mapping[str, Any], np.ndarray | None]) -> tuple[int, ...] | None:
    return None if row[1] is None else row[1].shape


def _table(rows: list[tuple[Mapping[str, Any], np.ndarray | None]]) -> pa.Table:
    import pyarrow as pa

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([row[name] for row, _ in rows], kind)

    text = ("prompt", "prompt_class", "category", "checksum", "sampler", "reward_worker")
    columns: dict[str, Any] = {"ticket": column("ticket", pa.int64())}
    columns |= {name: column(name, pa.string()) for name in text}
    columns |= {name: column(name, pa.int64()) for name in ("step_seed", "version")}
    columns["truncated"] = column("truncated", pa.bool_())
    columns |= {"seeds": column("seeds", pa.list_(pa.int64())), "reward": column("reward", pa.list_(pa.float32()))}
    for part in sorted({part for row, _ in rows for part in row["parts"]}):
        columns[f"reward.{part}"] = pa.array([row["parts"].get(part) for row, _ in rows], pa.list_(pa.float32()))
    columns |= {name: column(name, pa.float64()) for name in ("sample_s", "score_s", "scored_at")}
    arrays = [latents for _, latents in rows if latents is not None]
    if arrays:
        columns["final_latents"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(np.stack(arrays)))
    return pa.table(columns)
