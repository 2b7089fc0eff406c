//! The pairs: the layer and its partner, and the goals.

use crate::load::{Keys, Sample};

/// Two applications that are measured in turn.
pub struct Pair {
    /// The name of a pair without goals.
    pub name: &'static str,
    pub work: String,
    pub subject: Side,
    pub partner: Side,
    pub connections: &'static [usize],
    /// Bytes of a request's body, and of the response's.
    pub body: usize,
    pub before: Before,
    pub goals: &'static [Goal],
}

/// One of the two.
#[derive(Clone, Copy)]
pub struct Side {
    pub label: &'static str,
    /// The application, as [`serve`](crate::serve) knows it.
    pub role: &'static str,
    pub place: Place,
    pub keys: Keys,
    /// Processes that share the load.
    pub servers: usize,
    /// Expired records are purged during the measurement.
    pub purging: bool,
}

/// Where an application stores.
#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Memory,
    Sqlite,
    Redis,
    /// A new database.
    Postgres,
    /// A new database in which each flush takes a millisecond longer.
    SlowPostgres,
    /// A database with so many millions of records.
    Filled(f64),
}

/// Happens to the database of the subject before the measurement.
#[derive(Clone, Copy, PartialEq)]
pub enum Before {
    Nothing,
    Analyze,
    /// A million expired records are added.
    Expire,
}

pub struct Goal {
    pub name: &'static str,
    pub connections: &'static [usize],
    pub figure: Figure,
    pub bound: Bound,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Figure {
    Throughput,
    P50,
    P99,
    /// Processor time of server and database for each request.
    Cpu,
    /// Deadlocks that the database has counted; no ratio.
    Deadlocks,
}

#[derive(Clone, Copy)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Figure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Cpu => "CPU",
            Self::Deadlocks => "deadlocks",
        }
    }

    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Throughput => sample.throughput,
            Self::P50 => sample.p50,
            Self::P99 => sample.p99,
            Self::Cpu => sample.server_cpu + sample.database_cpu,
            Self::Deadlocks => 0.0,
        }
    }
}

impl Bound {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// All pairs; the tables have so many millions of records.
pub fn all(millions: &[f64]) -> Vec<Pair> {
    let mut pairs = on_postgres();
    pairs.extend(elsewhere());
    pairs.extend(slow_flushes());
    for million in millions {
        pairs.extend(with_records(*million));
    }
    pairs.extend(millions.last().map(|million| while_purging(*million)));
    pairs
}

fn on_postgres() -> Vec<Pair> {
    use Place::{Memory, Postgres, Redis};
    let first = Side::new("layer", "layer", Postgres);
    let by_hand = Side::new("two statements by hand", "hand", Postgres);
    let transaction = Side::new("one transaction by hand", "hand-tx", Postgres);
    vec![
        Pair { connections: CURVE, goals: P1, ..pair("first", "first request, PostgreSQL", first, by_hand) },
        Pair {
            body: 16 * 1024,
            connections: &[64],
            ..pair("16KiB", "the same, bodies of 16 KiB", first, by_hand)
        },
        Pair {
            body: 1024 * 1024,
            connections: &[16],
            ..pair("1MiB", "the same, bodies of 1 MiB", first, by_hand)
        },
        Pair {
            connections: CURVE,
            goals: P3,
            ..pair("single", "`Tx`, single transaction", Side::new("layer", "single", Postgres), transaction)
        },
        Pair {
            connections: CURVE,
            goals: P3B,
            ..pair("claimed", "`Tx`, claimed", Side::new("layer", "tx", Postgres), transaction)
        },
        Pair {
            connections: CURVE,
            goals: P4,
            ..pair(
                "hot",
                "replay of one key, PostgreSQL",
                first.with_keys(Keys::One),
                Side::new("bare handler", "bare", Memory).with_keys(Keys::One),
            )
        },
        Pair {
            connections: CURVE,
            goals: P5,
            ..pair(
                "many",
                "replays of 200,000 keys, PostgreSQL",
                first.with_keys(Keys::Many(crate::drive::KEYS)),
                Side::new("SELECT by key", "select", Postgres).with_keys(Keys::Many(crate::drive::KEYS)),
            )
        },
        Pair {
            connections: &[64, 256],
            goals: P10,
            ..pair(
                "processes",
                "first request, two processes on one PostgreSQL",
                Side { label: "two processes", servers: 2, ..first },
                Side { label: "one process", ..first },
            )
        },
        Pair {
            connections: &[64, 256],
            goals: P11,
            ..pair(
                "redis",
                "first request, PostgreSQL",
                first,
                Side::new("`idempotent` on Redis without persistence", "rival", Redis),
            )
        },
    ]
}

fn elsewhere() -> Vec<Pair> {
    use Place::{Memory, Sqlite};
    let (bare, memory) = (Side::new("bare handler", "bare", Memory), Side::new("layer", "layer", Memory));
    let sqlite = Side::new("layer", "layer", Sqlite);
    vec![
        Pair {
            goals: P6,
            ..pair(
                "nokey",
                "no key",
                memory.with_keys(Keys::None),
                Side::new("`RequestBodyLimitLayer`", "limit", Memory).with_keys(Keys::None),
            )
        },
        Pair {
            connections: CURVE,
            goals: P7,
            ..pair(
                "sqlite",
                "first request, SQLite",
                sqlite,
                Side::new("two statements by hand", "hand", Sqlite),
            )
        },
        pair(
            "sqlite-tx",
            "`Tx`, claimed, SQLite",
            Side::new("layer", "tx", Sqlite),
            Side::new("one transaction by hand", "hand-tx", Sqlite),
        ),
        pair(
            "sqlite-single",
            "`Tx`, single transaction, SQLite",
            Side::new("layer", "single", Sqlite),
            Side::new("one transaction by hand", "hand-tx", Sqlite),
        ),
        pair(
            "sqlite-replay",
            "replay of one key, SQLite",
            sqlite.with_keys(Keys::One),
            Side::new("SELECT by key", "select", Sqlite).with_keys(Keys::One),
        ),
        Pair { connections: CURVE, goals: P9, ..pair("memory", "first request, memory", memory, bare) },
        Pair {
            goals: P9_RIVAL,
            ..pair(
                "memory-rival",
                "first request, memory",
                memory,
                Side::new("`idempotent` in memory", "rival", Memory),
            )
        },
        pair(
            "memory-replay",
            "replay of one key, memory",
            memory.with_keys(Keys::One),
            bare.with_keys(Keys::One),
        ),
    ]
}

fn slow_flushes() -> Vec<Pair> {
    use Place::SlowPostgres;
    let transaction = Side::new("one transaction by hand", "hand-tx", SlowPostgres);
    vec![
        Pair {
            connections: CURVE,
            ..pair(
                "slow-first",
                "first request, PostgreSQL, 1 ms more for a flush",
                Side::new("layer", "layer", SlowPostgres),
                Side::new("two statements by hand", "hand", SlowPostgres),
            )
        },
        Pair {
            connections: &[1, 64],
            ..pair(
                "slow-single",
                "`Tx`, single transaction, 1 ms more for a flush",
                Side::new("layer", "single", SlowPostgres),
                transaction,
            )
        },
        Pair {
            connections: &[1, 64],
            ..pair(
                "slow-claimed",
                "`Tx`, claimed, 1 ms more for a flush",
                Side::new("layer", "tx", SlowPostgres),
                transaction,
            )
        },
    ]
}

fn with_records(million: f64) -> [Pair; 2] {
    let filled = |label| Side::new(label, "layer", Place::Filled(million));
    let empty = Side::new("an empty table", "layer", Place::Postgres);
    let never = pair("records", "first request", filled("many records, never analyzed"), empty);
    let analyzed = pair("records", "first request", filled("many records, analyzed"), empty);
    [
        Pair {
            work: format!("first request, {million} million records, never analyzed"),
            goals: P8,
            ..never
        },
        Pair {
            work: format!("first request, {million} million records, analyzed"),
            before: Before::Analyze,
            goals: P8,
            ..analyzed
        },
    ]
}

fn while_purging(million: f64) -> Pair {
    let filled = Side::new("not purging", "layer", Place::Filled(million));
    Pair {
        work: format!("first request while a million of {million} million is purged"),
        before: Before::Expire,
        goals: P8_PURGE,
        ..pair("purging", "", Side { label: "purging", purging: true, ..filled }, filled)
    }
}

fn pair(name: &'static str, work: &str, subject: Side, partner: Side) -> Pair {
    let work = work.to_owned();
    Pair { name, work, subject, partner, connections: &[64], body: 200, before: Before::Nothing, goals: &[] }
}

impl Side {
    fn new(label: &'static str, role: &'static str, place: Place) -> Self {
        Self { label, role, place, keys: Keys::Fresh, servers: 1, purging: false }
    }

    fn with_keys(self, keys: Keys) -> Self {
        Self { keys, ..self }
    }
}

const fn at_least(name: &'static str, connections: &'static [usize], bound: f64) -> Goal {
    Goal { name, connections, figure: Figure::Throughput, bound: Bound::AtLeast(bound) }
}

const fn at_most(name: &'static str, connections: &'static [usize], figure: Figure, bound: f64) -> Goal {
    Goal { name, connections, figure, bound: Bound::AtMost(bound) }
}

const CURVE: &[usize] = &[1, 16, 64, 256, 1024];
const P1: &[Goal] = &[
    at_least("P1", &[64], 4.0),
    at_least("P1", &[256], 5.0),
    at_most("P1", &[64, 256], Figure::Cpu, 0.25),
    at_most("P1", &[64, 256], Figure::P99, 1.0),
    at_most("P2", &[1], Figure::P50, 1.1),
];
const P3: &[Goal] = &[at_least("P3", &[1, 64], 1.2)];
const P3B: &[Goal] = &[at_least("P3b", &[64], 0.9)];
const P4: &[Goal] = &[at_least("P4", &[64], 0.75)];
const P5: &[Goal] = &[at_least("P5", &[64], 1.2)];
const P6: &[Goal] = &[at_least("P6", &[64], 1.0)];
const P7: &[Goal] = &[at_least("P7", &[64], 5.0)];
const P8: &[Goal] = &[at_most("P8", &[64], Figure::P50, 1.2)];
const P8_PURGE: &[Goal] = &[at_most("P8", &[64], Figure::P99, 2.0)];
const P9: &[Goal] = &[at_least("P9", &[64], 0.65)];
const P9_RIVAL: &[Goal] = &[at_least("P9", &[64], 1.0)];
const P10: &[Goal] = &[at_least("P10", &[64, 256], 1.0), at_most("P10", &[64, 256], Figure::Deadlocks, 0.0)];
const P11: &[Goal] = &[at_least("P11", &[256], 1.0)];
