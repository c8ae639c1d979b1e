"""The one store: a SQLite file with three narrow tables. Adding a metric adds rows, never columns.

The driver of a sweep is the only writer and commits each result when it is made, in WAL mode, so that a kill at any
moment loses no committed row. A clean exit folds the log back: the file alone can be copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from skipcost.bench.cases.case import Case
from skipcost.bench.cases.record import Result
from skipcost.bench.decoding import check_fields, check_members, parse_json
from skipcost.bench.errors import BenchError, StoreError
from skipcost.bench.measure.metrics import METRICS
from skipcost.kernels.outputs import is_beside_store

T = TypeVar("T")
APPLICATION_ID = 0x534B4950  # "SKIP", in the file's header: tells our files from other SQLite files
SCHEMA_VERSION = 1  # raise it with every change of SCHEMA; there are no migrations before 1.0
# Added to a store that has it not: one without, or a run that wrote none, asked for what it measured.
ASKED = """
CREATE TABLE IF NOT EXISTS asked (  -- the cases of a run's plan, those too that an earlier run had measured
    run_id INTEGER NOT NULL REFERENCES runs,
    case_id TEXT NOT NULL REFERENCES cases,
    PRIMARY KEY (run_id, case_id)
) WITHOUT ROWID;
"""
SCHEMA = """
CREATE TABLE runs (           -- one call of `skipcost sweep`, whether or not anything was missing
    run_id INTEGER PRIMARY KEY,
    started TEXT NOT NULL,        -- UTC, ISO 8601
    sweep TEXT NOT NULL,          -- the sweep's name
    seed INTEGER NOT NULL,        -- of the order in which cases ran
    fingerprint TEXT NOT NULL,    -- hash of the environment; results of different ones are never compared
    environment TEXT NOT NULL     -- JSON: machine, versions, flags, commit, dirty
);
CREATE TABLE cases (          -- everything that changes a number
    case_id TEXT PRIMARY KEY,     -- hash of the canonical JSON
    label TEXT NOT NULL,          -- the network's label
    definition TEXT NOT NULL,     -- the canonical JSON
    aliases TEXT NOT NULL         -- JSON list: labels of the sweep whose network is this same one
);
CREATE TABLE results (        -- one metric of one case in one run; a failure is a row
    run_id INTEGER NOT NULL REFERENCES runs,
    case_id TEXT NOT NULL REFERENCES cases,
    metric TEXT NOT NULL,
    outcome TEXT NOT NULL,        -- ok, out_of_memory, timeout, crash, unsupported, throttled
    note TEXT NOT NULL,           -- why there is no number, or what makes it doubtful
    samples TEXT NOT NULL,        -- JSON list, raw, in the metric's base unit
    detail TEXT NOT NULL,         -- JSON object
    PRIMARY KEY (run_id, case_id, metric)
) WITHOUT ROWID;
"""

RUN = {"started": str, "sweep": str, "seed": int, "fingerprint": str}
ENVIRONMENT = {  # what is read of it, where it has it
    "cpu": str,
    "cpus": int,
    "memory_bytes": int,
    "gpus": list,
    "versions": dict,
    "flags": dict,
    "code": str,
    "commit": str,
    "dirty": bool,
}
GPU = {"name": str, "memory_bytes": int, "driver": str}


@dataclass(frozen=True, slots=True)
class Run:
    """A row of `runs`."""

    run_id: int
    started: str
    sweep: str
    seed: int
    fingerprint: str
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A result with the run and the case that it belongs to."""

    run_id: int
    fingerprint: str
    case_id: str
    result: Result


class Store:
    """An open store. Use `open_store` to read one, `create_store` to write one, each in a `with` block."""

    def __init__(self, connection: sqlite3.Connection, path: Path, *, writer: bool) -> None:
        self._db, self._path, self._writer = connection, path, writer
        self._cases: dict[str, tuple[Case, list[str]]] | None = None  # what was read, until something is written
        self._rows: tuple[Row, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            with contextlib.suppress(sqlite3.OperationalError):  # somebody reads it: the log stays beside it
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()

    def add_run(self, started: str, sweep: str, seed: int, environment: dict[str, Any]) -> int:
        """Write a run and return its id."""
        row = (started, sweep, seed, environment["fingerprint"], json.dumps(environment, sort_keys=True))
        with self.writing():
            done = self._db.execute(
                "INSERT INTO runs (started, sweep, seed, fingerprint, environment) VALUES (?, ?, ?, ?, ?)", row
            )
        return int(done.lastrowid or 0)

    def add_case(self, case: Case, aliases: list[str]) -> None:
        """Write a case; one that is known gains the aliases that it did not have."""
        known = self._db.execute("SELECT aliases FROM cases WHERE case_id = ?", (case.case_id,)).fetchone()
        names = sorted({*aliases, *(json.loads(known[0]) if known else [])})
        row = (case.case_id, case.spec.label, case.to_json(), json.dumps(names))
        with self.writing():
            self._db.execute("INSERT OR REPLACE INTO cases VALUES (?, ?, ?, ?)", row)

    def add_asked(self, run_id: int, case_ids: Iterable[str]) -> None:
        """Write which cases a run asks for, whether or not there is anything left to measure of them."""
        with self.writing():
            self._db.executemany("INSERT OR IGNORE INTO asked VALUES (?, ?)", [(run_id, each) for each in case_ids])

    def add_result(self, run_id: int, case_id: str, result: Result, *, again: bool = False) -> bool:
        """Commit a result unless its environment has one for the case and metric already; say whether it was new.

        again: commit it beside the one that is there. Readers get the newest run's (`rows`).
        """
        values = (
            run_id, case_id, result.metric, result.outcome, result.note,
            json.dumps(result.samples), json.dumps(result.detail, sort_keys=True),
        )  # fmt: skip
        with self.writing():
            done = self._db.execute(
                "INSERT INTO results SELECT ?, ?, ?, ?, ?, ?, ? WHERE ? OR NOT EXISTS ("
                " SELECT 1 FROM results WHERE case_id = ? AND metric = ? AND run_id IN (SELECT run_id FROM runs"
                " WHERE fingerprint = (SELECT fingerprint FROM runs WHERE run_id = ?)))",  # by the primary key
                (*values, again, case_id, result.metric, run_id),
            )
        return done.rowcount == 1

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Commit what the block writes at its end, all or nothing, or say in one sentence why that cannot be.

        Within such a block nothing else commits.
        """
        try:
            with contextlib.nullcontext() if self._db.in_transaction else self._committing():
                yield
        finally:
            self._cases = self._rows = None  # also where nothing stays of what a block wrote

    @contextlib.contextmanager
    def _committing(self) -> Iterator[None]:
        try:
            with self._db:
                self._db.execute("BEGIN")
                yield
        except sqlite3.OperationalError as error:
            with contextlib.suppress(sqlite3.Error):
                kept = self._db.execute("SELECT count(DISTINCT case_id) FROM results").fetchone()[0]
                message = (
                    f"cannot write to {self._path}: {error}; {kept} cases are kept in it: make room, and run again"
                )
                raise StoreError(message) from None
            raise

    def measured(self, fingerprint: str) -> dict[tuple[str, str], str]:
        """The outcome of every row of an environment that `rows` gives, by (case_id, metric)."""
        rows = self._db.execute(
            "SELECT case_id, metric, outcome FROM results JOIN runs USING (run_id)"
            " WHERE fingerprint = ? ORDER BY run_id",
            (fingerprint,),
        )
        return {(case_id, metric): outcome for case_id, metric, outcome in rows}

    def asked(self) -> list[tuple[int, str]]:
        """(run_id, case_id) of every case that a run asked for, oldest run first."""
        asked = set(self._db.execute("SELECT DISTINCT run_id, case_id FROM results"))
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'asked'").fetchone():
            asked |= set(self._db.execute("SELECT run_id, case_id FROM asked"))
        return sorted(asked)

    def states(self, fingerprint: str | None = None) -> dict[str, list[Case]]:
        """Every case that a run asked for (of one environment, if it is given), by `Case.work`.

        A network of the suite is one case. Of a user's own model there is one for each state of its code and of what it
        reads: the one that was asked for last stands last.
        """
        runs = {run.run_id: run.fingerprint for run in self.runs()}
        asked = {case_id: run_id for run_id, case_id in self.asked() if fingerprint in (None, runs.get(run_id))}
        found = [(asked[case_id], case) for case_id, (case, _) in self.cases().items() if case_id in asked]
        states: dict[str, list[Case]] = {}
        for _, case in sorted(found, key=lambda each: (each[0], bool(each[1].factory and each[1].factory.read))):
            states.setdefault(case.work, []).append(case)
        return states

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        rows = self._db.execute(
            "SELECT run_id, started, sweep, seed, fingerprint, environment FROM runs ORDER BY run_id"
        )
        return [self._read("runs", number, _run, row) for number, row in enumerate(rows, 1)]

    def newest(self) -> Run:
        """The last run of the environment that measured last; BenchError where there is no run."""
        runs = self.runs()
        if not runs:
            message = "the store holds no run yet: `skipcost sweep` fills it"
            raise BenchError(message)
        return runs[-1]

    def newest_states(self, fingerprint: str) -> set[str]:
        """Ids of an environment's cases; of a user's own model in several states the one that was asked for last."""
        return {states[-1].case_id for states in self.states(fingerprint).values()}

    def results(self, fingerprint: str, chosen: Collection[str] | None = None) -> dict[str, dict[str, Result]]:
        """Results of an environment, by case and metric; of the cases that are `chosen`, else of the newest states."""
        ids = self.newest_states(fingerprint) if chosen is None else chosen
        table: dict[str, dict[str, Result]] = defaultdict(dict)
        for row in self.rows():
            if row.fingerprint == fingerprint and row.case_id in ids:
                table[row.case_id][row.result.metric] = row.result
        return dict(table)

    def cases(self) -> dict[str, tuple[Case, list[str]]]:
        """Every case by its id, with its aliases."""
        if self._cases is None:
            rows = self._db.execute("SELECT case_id, definition, aliases FROM cases ORDER BY label, case_id")
            self._cases = {row[0]: self._read("cases", number, _case, row) for number, row in enumerate(rows, 1)}
        return self._cases

    def rows(self) -> tuple[Row, ...]:
        """Results in the order run, case, metric; of several for one environment, case and metric the newest run's."""
        if self._rows is None:
            self._rows = tuple(self._read_rows())
        return self._rows

    def failures(self, fingerprint: str) -> dict[tuple[str, str], Result]:
        """The rows of an environment that are not ok, by (case_id, metric); the others are not read."""
        rows = self._read_rows(ok=False)
        return {(row.case_id, row.result.metric): row.result for row in rows if row.fingerprint == fingerprint}

    def _read_rows(self, *, ok: bool = True) -> Iterator[Row]:
        rows = self._db.execute(
            "SELECT run_id, fingerprint, results.case_id, cases.case_id, metric, outcome, samples, note, detail FROM ("
            " SELECT results.*, fingerprint, max(run_id) OVER (PARTITION BY fingerprint, case_id, metric) AS newest"
            " FROM results LEFT JOIN runs USING (run_id)) AS results"
            " LEFT JOIN cases ON cases.case_id = results.case_id"
            " WHERE run_id = newest AND (? OR outcome != 'ok') ORDER BY run_id, results.case_id, metric",
            (ok,),
        )
        for number, row in enumerate(rows, 1):
            yield self._read("results", number, _row, row)

    def check(self) -> None:
        """Read everything once; StoreError for the first row that is damaged."""
        self.runs()
        self.cases()
        if self._writer:  # which asks for few of them, and may have many
            deque(self._read_rows(), maxlen=0)
        else:
            self.rows()

    def _read(self, table: str, number: int, decode: Callable[..., T], row: tuple[Any, ...]) -> T:
        """Decode a row; StoreError that names it, in the order in which it is read."""
        try:
            return decode(*row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            lacks = "it has no " if isinstance(error, KeyError) else ""
            message = (
                f"row {number} of {table} is damaged: {lacks}{error}; {self._path} was left untouched: "
                "restore a copy, or sweep into a new file"
            )
            raise StoreError(message) from None


def _run(number: int, started: str, sweep: str, seed: int, fingerprint: str, environment: str) -> Run:
    facts = parse_json(environment)
    check_fields({"started": started, "sweep": sweep, "seed": seed, "fingerprint": fingerprint}, RUN)
    check_fields(facts, ENVIRONMENT)
    for name in ("versions", "flags"):
        check_members(name, facts.get(name, {}), str)
    for gpu in facts.get("gpus", ()):
        check_fields(gpu, GPU, ("name",))
    if facts.get("fingerprint") != fingerprint:
        message = f"its environment is not that of its fingerprint {fingerprint!r}"
        raise ValueError(message)
    return Run(number, started, sweep, seed, fingerprint, facts)


def _case(case_id: str, definition: str, aliases: str) -> tuple[Case, list[str]]:
    case, names = Case.from_json(definition), parse_json(aliases)
    check_members("aliases", names, str)
    if case.case_id != case_id:
        message = f"its definition is not the one that {case_id!r} was made from"
        raise ValueError(message)
    return case, names


def _row(
    run_id: int,
    fingerprint: str | None,
    case_id: str,
    known: str | None,
    metric: str,
    outcome: str,
    samples: str,
    note: str,
    detail: str,
) -> Row:  # fmt: skip
    for table, found in (("runs", fingerprint), ("cases", known)):
        if found is None:
            message = f"what it belongs to is not in {table} (run {run_id!r}, case {case_id!r})"
            raise ValueError(message)
    result = Result(metric, outcome, tuple(parse_json(samples)), note, parse_json(detail))
    if metric not in METRICS:
        message = f"{metric!r} is no metric of this version of skipcost"
        raise ValueError(message)
    result.check(counted=METRICS[metric].exact)
    return Row(run_id, str(fingerprint), case_id, result)


def open_store(path: str | Path) -> Store:
    """Open a store to read it; StoreError in one sentence where it is no such thing."""
    path = Path(path)
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long
        message = f"there is no store at {path}: `skipcost sweep quick -o {path}` makes one"
        raise StoreError(message)
    with _opened(path, path.resolve().as_uri() + "?mode=ro", uri=True) as connection:
        _check(connection, path)
        store = Store(connection, path, writer=False)
        store.check()
        return store


def create_store(path: Path) -> Store:
    """Open a store to add to it, made if it does not exist; a file that is something else is left untouched."""
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - as above
        what = "a folder" if path.is_dir() else "no file"
        message = f"{path} is {what}: name a file for the store, such as {path.with_name('sweep.sqlite')}"
        raise StoreError(message)
    if is_beside_store(path):
        message = f"{path} is a part of the store beside it while that is written: name another file"
        raise StoreError(message)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make the folder of {path}: {error.strerror}; name another place with -o"
        raise StoreError(message) from None
    with _opened(path, str(path), timeout=30) as connection:
        if connection.execute("PRAGMA page_count").fetchone()[0]:
            _check(connection, path)
        else:  # one transaction before anything else: a file is empty or a store, whenever this process is killed
            header = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};"
            connection.executescript(f"BEGIN IMMEDIATE; {header} {SCHEMA} COMMIT;")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(ASKED)
        # Under WAL a killed process loses nothing with this, only a power cut could.
        connection.execute("PRAGMA synchronous=NORMAL")
        store = Store(connection, path, writer=True)
        store.check()
        return store


def _check(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        message = f"{path} is a SQLite file, but not a store of skipcost; it was left untouched: name another file"
        raise StoreError(message)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        message = (
            f"{path} has schema version {version}, this skipcost reads version {SCHEMA_VERSION}; it was left "
            "untouched: use the skipcost that wrote it, or sweep into a new file"
        )
        raise StoreError(message)
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        message = f"{path} is damaged ({damage}); it was left untouched: restore a copy, or sweep into a new file"
        raise StoreError(message)


@contextlib.contextmanager
def _opened(path: Path, name: str, **options: Any) -> Iterator[sqlite3.Connection]:
    """Connect; where the block fails, close again and turn what SQLite says of the file into one sentence."""
    try:
        with contextlib.ExitStack() as undo:
            connection = sqlite3.connect(name, **options)
            undo.callback(connection.close)
            yield connection
            undo.pop_all()
    except sqlite3.OperationalError as error:
        message = (
            f"cannot use {path} as a store: {error}; check that the folder can be written, or name another with -o"
        )
        raise StoreError(message) from None
    except sqlite3.DatabaseError as error:
        message = f"{path} is not a readable store ({error}); it was left untouched: name another file"
        raise StoreError(message) from None
