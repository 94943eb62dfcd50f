"""Journal: every scored group of a run as a Parquet dataset, the input of any later analysis and of offline objectives.

One row per group:
    ticket int64 · prompt, prompt_class, category (or null), checksum, sampler, reward_worker string · seeds list<int64>
    · step_seed, version int64 · truncated bool (the prompt was cut off) · reward list<float32> [G]
    · reward.<part> list<float32> [G] · final_latents fixed-shape tensor<float32> [G, C, h, w]
      (a part whose latents are lost: of type null) · sample_s, score_s, scored_at float64 (seconds; wall clock)

Parts are written beside and renamed; every page has a checksum, and the schema's metadata say what the groups were made
with (see `learner.dataset`, which reads them for training). A group that was drawn again appears twice; `read_journal`
keeps the last of each ticket.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learner.dataset import IDENTITY_KEY, PARTS
from raysteer.calls import AGAIN
from raysteer.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_PART = 64
FETCH_TIMEOUT_S = 60.0
_ROW_GROUP_BYTES = 4 * 2**20  # of latents: what has to be read for one group

logger = logging.getLogger(__name__)


class JournalWriter:
    """Collects rows and writes parts into `folder`; continues the numbering it finds there. No Ray.

    Args: folder; identity, what the groups are made with, in JSON types; rows_per_part.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], rows_per_part: int = ROWS_PER_PART) -> None:
        self.folder = Path(folder)
        self.identity = json.dumps(identity, sort_keys=True).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows_per_part = rows_per_part
        self.rows: list[tuple[Mapping[str, Any], np.ndarray | None]] = []
        self._next = 1 + max((int(path.stem.split("-")[1]) for path in self.folder.glob(PARTS)), default=0)

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
            table = _table(rows).replace_schema_metadata({IDENTITY_KEY: self.identity})
            latents = rows[0][1]
            together = len(rows) if latents is None else max(1, _ROW_GROUP_BYTES // latents.nbytes)
            pq.write_table(table, beside, row_group_size=together, compression="zstd", write_page_checksum=True)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError:
            beside.unlink(missing_ok=True)  # on a full disk its room is needed
            raise
        self._next += 1


class Journal:
    """Actor around a JournalWriter. Args: folder, identity.

    `lost`: tickets whose last row has no latents.
    """

    def __init__(self, folder: str, identity: Mapping[str, Any]) -> None:
        self.writer = JournalWriter(folder, identity)
        self.without_latents = 0
        self.lost: set[int] = set()

    def append(self, row: Mapping[str, Any], trajectory: list[Any]) -> None:
        """`trajectory` holds one object reference; of it only the final latents are kept.

        Raises StorageError when the disk refuses; the row is kept for the next flush.
        """
        latents, ticket = self.fetch(trajectory[0]), row["ticket"]
        self.lost.discard(ticket)
        if latents is None:
            self.without_latents += 1
            self.lost.add(ticket)
            logger.warning("ticket %s is journaled without latents: its sampler died", ticket)
        with self._named():
            self.writer.append(row, latents)

    def fetch(self, trajectory: Any) -> np.ndarray | None:
        """Final latents of a referenced trajectory as float32, None when they are gone with their owner."""
        import ray

        try:
            fetched = ray.get(trajectory, timeout=FETCH_TIMEOUT_S)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            return None
        return as_float32(fetched.final_latents, fetched.dtype)

    def ping(self) -> None:
        """Answers while the process lives."""

    def lost_among(self, tickets: Sequence[int]) -> list[int]:
        """Those of these tickets whose last row is without latents."""
        return [ticket for ticket in tickets if ticket in self.lost]

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

    parts = sorted(Path(folder).glob(PARTS))
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
    columns["final_latents"] = (
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(np.stack(arrays)))
        if arrays
        else pa.nulls(len(rows))
    )
    return pa.table(columns)
