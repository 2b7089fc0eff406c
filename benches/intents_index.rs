//! Which index finds dangling intents, and which one serves their purge: sizes, costs and times on PostgreSQL.
//!
//! ```sh
//! scripts/with-servers cargo bench --all-features --bench intents_index              # 10 million rows
//! scripts/with-servers cargo bench --all-features --bench intents_index -- 200000    # a quick try
//! ```
//!
//! The table is filled once, in a database of its own. Every candidate gets a copy of that database and is measured beside
//! another copy, the reference, that has no further index: every round writes to the one and then to the other, and the
//! median of the rounds' ratios is printed. Intents are opened and finalized one by one, each in a transaction of its own,
//! 64 of them open at any time: by four clients, and in the server by a procedure, without a round trip.
//!
//! Nothing is vacuumed in the background; `VACUUM` runs where the tables say so. Needs a server of version 15 or later
//! on Linux and a superuser, since cold times are taken after the operating system has been told to forget the files.
//! The databases are dropped at the end.

use std::{collections::VecDeque, time::Instant};

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, Row,
    postgres::{PgConnectOptions, PgRow},
};
use uuid::Uuid;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

struct Candidate {
    name: &'static str,
    fillfactor: u8,
    /// What it adds to the table.
    ddl: &'static str,
    open_intents: OpenIntents,
    find: &'static str,
    /// Whether batches of the purge are measured.
    purge: bool,
}

/// Where it is written that an intent is open.
#[derive(Clone, Copy, PartialEq)]
enum OpenIntents {
    /// In its row.
    InPlace,
    /// In a row of a second table too, which finalizing deletes.
    Beside,
    /// In a row of a second table too, which is deleted before the next search.
    Swept,
    /// In its row, and the index gets it before the next search if it is still open then.
    Promoted,
    /// The row is in a second table, and finalizing moves it.
    Moved,
}

#[tokio::main]
async fn main() -> Result<()> {
    let rows = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(10_000_000);
    let url = std::env::var("TEST_POSTGRES_URL").map_err(|_| "run it with scripts/with-servers")?;
    let server = Server { options: url.parse()? };
    for database in [BASE, REFERENCE, COPY] {
        server.drop(database).await?;
    }
    let measured = measure_all(&server, rows).await;
    for database in [BASE, REFERENCE, COPY] {
        server.drop(database).await?;
    }
    print(rows, &measured?);
    println!("\n{}", server.settings().await?);
    Ok(())
}

async fn measure_all(server: &Server, rows: i64) -> Result<Vec<Measured>> {
    fill(server, rows).await?;
    let reference = &CANDIDATES[0];
    prepare(server, REFERENCE, reference).await?;
    let mut measured = Vec::new();
    for candidate in CANDIDATES {
        let started = Instant::now();
        measured.push(measure(server, reference, candidate, rows).await?);
        server.drop(COPY).await?;
        eprintln!("{}: {:.0} s", candidate.name, started.elapsed().as_secs_f64());
    }
    Ok(measured)
}

/// Everything that is known of a candidate. Times are in seconds, sizes in bytes.
struct Measured {
    candidate: &'static Candidate,
    fresh: Sizes,
    churned: Sizes,
    costs: Costs,
    cold: f64,
    warm: f64,
    /// The first search after the churn, what had to be swept before it, and further searches.
    after_churn: (f64, f64, f64),
    after_purge: f64,
    vacuum: f64,
    after_vacuum: f64,
    /// After more churn, all of it beside a transaction that is older.
    old_snapshot: f64,
    purge: Option<Purge>,
}

struct Purge {
    batch: f64,
    /// The first time when nothing is due, before `VACUUM`, and the time after it.
    idle: (f64, f64),
    refilled_batch: f64,
    refilled_idle: f64,
}

async fn measure(
    server: &Server,
    reference: &Candidate,
    candidate: &'static Candidate,
    rows: i64,
) -> Result<Measured> {
    prepare(server, COPY, candidate).await?;
    let mut sql = server.connect(COPY).await?;
    let fresh = Sizes::of(&mut sql).await?;
    server.forget(COPY).await?;
    let cold = find(&mut sql, candidate).await?;
    let warm = find_again(&mut sql, candidate).await?;
    server.remember(COPY).await?;

    let mut costs = Costs::measure(server, [reference, candidate]).await?;
    let pairs = rows * 3 / 100;
    churn(&mut sql, pairs - ROUNDS * (CLIENT_PAIRS + SERVER_PAIRS)).await?;
    let after_churn = (
        sweep(&mut sql, candidate).await?,
        find(&mut sql, candidate).await?,
        find_again(&mut sql, candidate).await?,
    );
    let churned = Sizes::of(&mut sql).await?;
    sql.close().await?;
    let mut sql = server.connect(COPY).await?;
    costs.hot = hot_share(&mut sql).await?;

    let batch = if candidate.purge { Some(purge(&mut sql, 90, 20).await?) } else { None };
    execute(&mut sql, PURGE_ALL).await?;
    let after_purge = find(&mut sql, candidate).await?;
    let idle = if candidate.purge { purge(&mut sql, 90, 1).await? } else { 0.0 };
    let vacuum = execute(&mut sql, "VACUUM").await?;
    let after_vacuum = find_again(&mut sql, candidate).await?;
    let idle = (idle, if candidate.purge { purge(&mut sql, 90, 5).await? } else { 0.0 });
    let old_snapshot = find_beside_snapshot(server, &mut sql, candidate, pairs / 3).await?;
    let purge = match batch {
        Some(batch) => Some(Purge::refilled(&mut sql, batch, idle).await?),
        None => None,
    };
    sql.close().await?;
    Ok(Measured {
        candidate,
        fresh,
        churned,
        costs,
        cold,
        warm,
        after_churn,
        after_purge,
        vacuum,
        after_vacuum,
        old_snapshot,
        purge,
    })
}

impl Purge {
    async fn refilled(sql: &mut PgConnection, batch: f64, idle: (f64, f64)) -> Result<Self> {
        let refilled_idle = purge(sql, 90, 5).await?;
        Ok(Self { batch, idle, refilled_batch: purge(sql, 80, 20).await?, refilled_idle })
    }
}

/// A search while a transaction is open that may still see every version of the intents finalized meanwhile.
async fn find_beside_snapshot(
    server: &Server,
    sql: &mut PgConnection,
    candidate: &Candidate,
    pairs: i64,
) -> Result<f64> {
    let mut old = server.connect(COPY).await?;
    execute(&mut old, "BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    query(&mut old, "SELECT 1").await?;
    churn(sql, pairs).await?;
    sweep(sql, candidate).await?;
    let time = find_again(sql, candidate).await?;
    old.close().await?;
    Ok(time)
}

/// What opening and finalizing cost by clients and in the server, in relation to the reference.
struct Costs {
    client: [f64; 2],
    server: [f64; 2],
    wal: f64,
    /// Share of updates that touched no index; 1 where there are none.
    hot: f64,
}

impl Costs {
    async fn measure(server: &Server, candidates: [&Candidate; 2]) -> Result<Self> {
        let (mut client, mut inside, mut wal) = (Vec::new(), Vec::new(), Vec::new());
        // The first rounds warm up.
        for round in 0..ROUNDS {
            let (mut by_clients, mut in_server) = ([[0.0; 2]; 2], [[0.0; 2]; 2]);
            for (index, database) in [REFERENCE, COPY].into_iter().enumerate() {
                by_clients[index] = run_clients(server, database, candidates[index]).await?;
                let mut sql = server.connect(database).await?;
                let before = wal_position(&mut sql).await?;
                in_server[index] = churn(&mut sql, SERVER_PAIRS).await?;
                if index == 1 {
                    wal.push((wal_position(&mut sql).await? - before) / as_f64(SERVER_PAIRS));
                }
                sql.close().await?;
            }
            if round >= 2 {
                client.push(ratios(by_clients));
                inside.push(ratios(in_server));
            }
        }
        Ok(Self { client: medians(&client), server: medians(&inside), wal: median(wal), hot: 1.0 })
    }
}

fn ratios([reference, candidate]: [[f64; 2]; 2]) -> [f64; 2] {
    [candidate[0] / reference[0], candidate[1] / reference[1]]
}

fn medians(rounds: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|figure| median(rounds.iter().map(|round| round[figure]).collect()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "sizes and counts are far below 2^52")]
fn as_f64(value: i64) -> f64 {
    value as f64
}

/// Opens and finalizes intents with several clients; the time that each of the two took, over all clients.
async fn run_clients(server: &Server, database: &str, candidate: &Candidate) -> Result<[f64; 2]> {
    let (open, finalize) = (candidate.open(), candidate.finalize());
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let sql = server.connect(database).await?;
        clients.push(tokio::spawn(run_client(sql, open.clone(), finalize.clone())));
    }
    let mut sums = [0.0; 2];
    for client in clients {
        let times = client.await??;
        sums = [sums[0] + times[0], sums[1] + times[1]];
    }
    Ok(sums)
}

async fn run_client(mut sql: PgConnection, open: String, finalize: String) -> Result<[f64; 2]> {
    let (mut pending, mut times) = (VecDeque::new(), [0.0; 2]);
    let pairs = CLIENT_PAIRS / CLIENTS;
    for pair in 0..pairs + OPEN_AT_ONCE / CLIENTS {
        if pair < pairs {
            let id = Uuid::new_v4();
            times[0] += write_one(&mut sql, &open, id).await?;
            pending.push_back(id);
        }
        if pair >= OPEN_AT_ONCE / CLIENTS {
            let id = pending.pop_front().ok_or("as many are opened as are finalized")?;
            times[1] += write_one(&mut sql, &finalize, id).await?;
        }
    }
    sql.close().await?;
    Ok(times)
}

async fn write_one(sql: &mut PgConnection, statement: &str, id: Uuid) -> Result<f64> {
    let query = sqlx::query(AssertSqlSafe(statement)).bind(id);
    let started = Instant::now();
    let done = query.execute(sql).await?;
    let time = started.elapsed().as_secs_f64();
    if done.rows_affected() == 1 { Ok(time) } else { Err(format!("no row: {statement}").into()) }
}

/// Opens and finalizes intents in the server; the time that each of the two took, without the commits.
async fn churn(sql: &mut PgConnection, pairs: i64) -> Result<[f64; 2]> {
    let row = query(sql, &format!("CALL churn({}, 0, 0)", pairs.max(0))).await?;
    let row = row.first().ok_or("the procedure returns its sums")?;
    Ok([row.try_get(0)?, row.try_get(1)?])
}

/// What a reconciler does before it searches.
async fn sweep(sql: &mut PgConnection, candidate: &Candidate) -> Result<f64> {
    match candidate.open_intents {
        OpenIntents::Swept => execute(sql, SWEEP).await,
        OpenIntents::Promoted => execute(sql, PROMOTE).await,
        OpenIntents::InPlace | OpenIntents::Beside | OpenIntents::Moved => Ok(0.0),
    }
}

/// One search of a reconciler.
async fn find(sql: &mut PgConnection, candidate: &Candidate) -> Result<f64> {
    let started = Instant::now();
    let found = sqlx::query(candidate.find).fetch_all(sql).await?.len();
    let time = started.elapsed().as_secs_f64();
    if found == 100 { Ok(time) } else { Err(format!("{} found {found}", candidate.name).into()) }
}

async fn find_again(sql: &mut PgConnection, candidate: &Candidate) -> Result<f64> {
    let mut times = Vec::new();
    while times.len() < 9 && times.iter().sum::<f64>() < 2.0 {
        times.push(find(sql, candidate).await?);
    }
    Ok(median(times))
}

/// The median time of a batch of the purge.
async fn purge(sql: &mut PgConnection, days: u8, batches: usize) -> Result<f64> {
    let batch = PURGE_BATCH.replace("{days}", &days.to_string());
    let mut times = Vec::new();
    while times.len() < batches && times.iter().sum::<f64>() < 5.0 {
        times.push(execute(sql, &batch).await?);
    }
    Ok(median(times))
}

/// What the candidate adds to the table, and all indexes with that.
#[derive(Clone, Copy)]
struct Sizes {
    own: f64,
    all: f64,
}

impl Sizes {
    async fn of(sql: &mut PgConnection) -> Result<Self> {
        let row = query(sql, SIZES).await?;
        let row = row.first().ok_or("the sizes are one row")?;
        Ok(Self { own: as_f64(row.try_get(0)?), all: as_f64(row.try_get(1)?) })
    }
}

async fn hot_share(sql: &mut PgConnection) -> Result<f64> {
    // The server reports what a connection has done when that has ended.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let row = query(sql, HOT_SHARE).await?;
    Ok(row.first().ok_or("the share is one row")?.try_get(0)?)
}

async fn wal_position(sql: &mut PgConnection) -> Result<f64> {
    let row = query(sql, "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8").await?;
    Ok(row.first().ok_or("the position is one row")?.try_get(0)?)
}

async fn query(sql: &mut PgConnection, text: &str) -> Result<Vec<PgRow>> {
    Ok(sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(sql).await?)
}

/// Runs statements and takes their time.
async fn execute(sql: &mut PgConnection, text: &str) -> Result<f64> {
    let started = Instant::now();
    sqlx::raw_sql(AssertSqlSafe(text)).execute(sql).await?;
    Ok(started.elapsed().as_secs_f64())
}

struct Server {
    options: PgConnectOptions,
}

impl Server {
    async fn connect(&self, database: &str) -> Result<PgConnection> {
        let mut sql = PgConnection::connect_with(&self.options.clone().database(database)).await?;
        execute(&mut sql, SESSION).await?;
        Ok(sql)
    }

    async fn execute(&self, text: &str) -> Result<()> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        execute(&mut sql, text).await?;
        Ok(sql.close().await?)
    }

    async fn drop(&self, database: &str) -> Result<()> {
        self.execute(&format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)")).await
    }

    /// The server's cache does not have a database that was copied as files; this makes the system's forget it too.
    async fn forget(&self, database: &str) -> Result<()> {
        self.execute("CHECKPOINT").await?;
        let forget = "dd if=/dev/null of=$file oflag=nocache conv=notrunc,fdatasync count=0 status=none";
        self.for_each_file(database, forget).await
    }

    async fn remember(&self, database: &str) -> Result<()> {
        self.for_each_file(database, "cat $file").await
    }

    async fn for_each_file(&self, database: &str, command: &str) -> Result<()> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        let row = query(&mut sql, &format!("SELECT oid::text FROM pg_database WHERE datname = '{database}'"))
            .await?;
        let oid: String = row.first().ok_or("the database exists")?.try_get(0)?;
        let script = format!("cat >/dev/null; for file in base/{oid}/*; do {command}; done >/dev/null");
        execute(&mut sql, &format!("COPY (SELECT 1) TO PROGRAM '{script}'")).await?;
        Ok(sql.close().await?)
    }

    async fn settings(&self) -> Result<String> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        let row = query(&mut sql, SETTINGS).await?;
        Ok(row.first().ok_or("the settings are one row")?.try_get(0)?)
    }
}

/// Makes the table that all candidates have, in the order in which the intents would have come.
async fn fill(server: &Server, rows: i64) -> Result<()> {
    let started = Instant::now();
    server.execute(&format!("CREATE DATABASE {BASE}")).await?;
    let mut sql = server.connect(BASE).await?;
    execute(&mut sql, include_str!("../migrations/postgres/0001_records.sql")).await?;
    execute(&mut sql, include_str!("../migrations/postgres/0002_intents.sql")).await?;
    execute(&mut sql, TABLE).await?;
    execute(&mut sql, &FILL.replace("{columns}", COLUMNS).replace("{rows}", &rows.to_string())).await?;
    for statement in [PRIMARY_KEY, RECORD_INDEX, "VACUUM (FREEZE, ANALYZE) intents"] {
        execute(&mut sql, statement).await?;
    }
    sql.close().await?;
    eprintln!("filled with {rows} rows: {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Copies the table and makes what the candidate adds.
async fn prepare(server: &Server, database: &str, candidate: &Candidate) -> Result<()> {
    server.execute(&format!("CREATE DATABASE {database} TEMPLATE {BASE} STRATEGY file_copy")).await?;
    let mut sql = server.connect(database).await?;
    execute(&mut sql, &format!("ALTER TABLE intents SET (fillfactor = {})", candidate.fillfactor)).await?;
    execute(&mut sql, candidate.ddl).await?;
    let procedure = CHURN
        .replace("{open}", &candidate.open().replace("$1", "intent"))
        .replace("{finalize}", &candidate.finalize().replace("$1", "intent"))
        .replace("{open_at_once}", &OPEN_AT_ONCE.to_string());
    execute(&mut sql, &procedure).await?;
    Ok(sql.close().await?)
}

impl Candidate {
    /// The statement that opens intent `$1`.
    fn open(&self) -> String {
        let insert = |table, look_at| format!("INSERT INTO {table} ({COLUMNS}) SELECT {OPENED}, {look_at}");
        match self.open_intents {
            OpenIntents::InPlace => insert("intents", LOOK_AT),
            OpenIntents::Promoted => insert("intents", "NULL"),
            OpenIntents::Beside | OpenIntents::Swept => format!(
                "WITH beside AS (INSERT INTO open_intents (id, look_at) VALUES ($1, {LOOK_AT})) {}",
                insert("intents", "NULL")
            ),
            OpenIntents::Moved => format!(
                "{} WHERE NOT EXISTS (SELECT FROM intents WHERE id = $1)",
                insert("open_intents", LOOK_AT)
            ),
        }
    }

    /// The statement that finalizes intent `$1`.
    fn finalize(&self) -> String {
        let update = format!("UPDATE intents SET {FINALIZED} WHERE id = $1 AND state = 'open'");
        match self.open_intents {
            OpenIntents::InPlace | OpenIntents::Promoted | OpenIntents::Swept => update,
            OpenIntents::Beside => {
                format!("WITH beside AS (DELETE FROM open_intents WHERE id = $1) {update}")
            }
            OpenIntents::Moved => MOVE.replace("{columns}", COLUMNS),
        }
    }
}

fn print(rows: i64, all: &[Measured]) {
    println!("{rows} rows; own size, size of all indexes; costs as ratios to the first line's copy\n");
    println!(
        "| candidate | own size | all indexes | insert: clients, server | finalize: clients, server | HOT | WAL a pair |"
    );
    println!("|---|---|---|---|---|---|---|");
    for Measured { candidate, fresh, costs, .. } in all {
        let ([insert, finalize], [insert_in, finalize_in]) = (costs.client, costs.server);
        println!(
            "| {} | {} | {} | {insert:.2}, {insert_in:.2} | {finalize:.2}, {finalize_in:.2} | {:.1} % | {:.0} B |",
            candidate.name,
            size(fresh.own),
            size(fresh.all),
            costs.hot * 100.0,
            costs.wal
        );
    }
    print_times(all);
    print_purges(all);
}

fn print_times(all: &[Measured]) {
    println!(
        "\n| candidate | cold | warm | after churn: first, again | sweep | after purge | after `VACUUM` | beside an old snapshot | own size after churn | all indexes | `VACUUM` |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for figures in all {
        let (sweep, first, again) = figures.after_churn;
        let times = [figures.cold, figures.warm].map(time).join(" | ");
        println!(
            "| {} | {times} | {}, {} | {} | {} | {} | {} | {} | {} | {} |",
            figures.candidate.name,
            time(first),
            time(again),
            time(sweep),
            time(figures.after_purge),
            time(figures.after_vacuum),
            time(figures.old_snapshot),
            size(figures.churned.own),
            size(figures.churned.all),
            time(figures.vacuum)
        );
    }
}

fn print_purges(all: &[Measured]) {
    println!(
        "\n| purge by age | size | batch of 1,000 | nothing due: before, after `VACUUM` | refilled: batch, nothing due |"
    );
    println!("|---|---|---|---|---|");
    for figures in all {
        if let Some(purge) = &figures.purge {
            println!(
                "| {} | {} | {} | {}, {} | {}, {} |",
                figures.candidate.name,
                size(figures.fresh.own),
                time(purge.batch),
                time(purge.idle.0),
                time(purge.idle.1),
                time(purge.refilled_batch),
                time(purge.refilled_idle)
            );
        }
    }
}

fn size(bytes: f64) -> String {
    if bytes < 1e6 { format!("{:.0} kB", bytes / 1024.0) } else { format!("{:.1} MB", bytes / 1048576.0) }
}

fn time(seconds: f64) -> String {
    match seconds {
        0.0 => String::new(),
        ..0.01 => format!("{:.1} ms", seconds * 1e3),
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

const BASE: &str = "intents_index_base";
const REFERENCE: &str = "intents_index_reference";
const COPY: &str = "intents_index_copy";

const ROUNDS: i64 = 12;
const CLIENTS: i64 = 4;
const CLIENT_PAIRS: i64 = 2_000;
const SERVER_PAIRS: i64 = 5_000;
const OPEN_AT_ONCE: i64 = 64;

const CANDIDATES: &[Candidate] = &[
    Candidate {
        name: "no further index",
        fillfactor: 100,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
    Candidate {
        name: "no further index, fillfactor 85",
        fillfactor: 85,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "no further index, fillfactor 70",
        fillfactor: 70,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "B-tree (state, look_at)",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (state, look_at)",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE state = 'open' AND look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "B-tree (look_at)",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (look_at)",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (look_at), not null",
        fillfactor: 100,
        ddl: PARTIAL,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (look_at), not null, fillfactor 70",
        fillfactor: 70,
        ddl: PARTIAL,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (created_at), not settled",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (created_at) WHERE settled_at IS NULL AND state <> 'dead'",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE settled_at IS NULL AND state <> 'dead' AND created_at <= now() - interval '1 minute' AND look_at <= now() ORDER BY created_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "BRIN (created_at), fillfactor 70",
        fillfactor: 70,
        ddl: "CREATE INDEX ON intents USING brin (created_at)",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE created_at <= now() - interval '1 minute' AND look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: true,
    },
    Candidate {
        name: "table of open intents, fillfactor 70",
        fillfactor: 70,
        ddl: BESIDE,
        open_intents: OpenIntents::Beside,
        find: FIND_BESIDE,
        purge: false,
    },
    Candidate {
        name: "the same, swept by the reconciler",
        fillfactor: 70,
        ddl: BESIDE_SWEPT,
        open_intents: OpenIntents::Swept,
        find: FIND_BESIDE,
        purge: false,
    },
    Candidate {
        name: "open intents moved when finalized",
        fillfactor: 100,
        ddl: MOVED,
        open_intents: OpenIntents::Moved,
        find: "SELECT id FROM open_intents WHERE look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "B-tree (created_at), partial (look_at) of those found open, fillfactor 70",
        fillfactor: 70,
        ddl: PROMOTED,
        open_intents: OpenIntents::Promoted,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "B-tree (created_at), fillfactor 70",
        fillfactor: 70,
        ddl: BY_AGE,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
    Candidate {
        name: "partial (created_at), finalized, fillfactor 70",
        fillfactor: 70,
        ddl: "CREATE INDEX ON intents (created_at) WHERE state = 'finalized'",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
];

const FIND: &str =
    "SELECT id FROM intents WHERE look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED";

const FIND_BESIDE: &str = "
SELECT i.id, i.arguments FROM open_intents AS o JOIN intents AS i ON i.id = o.id
WHERE o.look_at <= now() ORDER BY o.look_at LIMIT 100 FOR UPDATE OF o SKIP LOCKED";

const SWEEP: &str = "
DELETE FROM open_intents AS o USING intents AS i
WHERE i.id = o.id AND o.look_at <= now() AND i.settled_at IS NOT NULL";

/// What has stayed open since the last search; the reconciler would remember when that was.
const PROMOTE: &str = "
UPDATE intents SET look_at = dangling_at
WHERE created_at > now() - interval '1 hour' AND created_at <= now() AND state = 'open' AND look_at IS NULL";

const PARTIAL: &str = "CREATE INDEX ON intents (look_at) WHERE look_at IS NOT NULL";

const BY_AGE: &str = "CREATE INDEX ON intents (created_at)";

const PROMOTED: &str = "
CREATE INDEX ON intents (created_at);
CREATE INDEX ON intents (look_at) WHERE look_at IS NOT NULL";

const BESIDE: &str = "
CREATE TABLE open_intents (id uuid PRIMARY KEY, look_at timestamptz NOT NULL) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT id, look_at FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const BESIDE_SWEPT: &str = "
CREATE TABLE open_intents (id uuid, look_at timestamptz NOT NULL) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT id, look_at FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const MOVED: &str = "
CREATE TABLE open_intents (LIKE intents, PRIMARY KEY (id)) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT * FROM intents WHERE look_at IS NOT NULL;
DELETE FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const MOVE: &str = "
WITH moved AS (DELETE FROM open_intents WHERE id = $1 RETURNING *)
INSERT INTO intents ({columns})
SELECT id, record_id, consumer, key, name, discriminator, ordinal, arguments, subject, 'finalized', sent, absent,
       attempt, call, calls, repeatable_until, created_at, opened_at, dangling_at, looks, absences,
       now(), 'ch_3NqXfM2eZvKYlo2C1ab2cd3e', '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}', NULL
FROM moved";

const SESSION: &str = "SET maintenance_work_mem = '1GB'; SET jit = off";

const TABLE: &str = "
CREATE TABLE intents (LIKE idempotency_intents INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
WITH (autovacuum_enabled = off)";

const PRIMARY_KEY: &str = "ALTER TABLE intents ADD PRIMARY KEY (id)";
const RECORD_INDEX: &str = "CREATE INDEX intents_record_id ON intents (record_id)";

const COLUMNS: &str = "
    id, record_id, consumer, key, name, discriminator, ordinal, arguments, subject, state, sent, absent,
    attempt, call, calls, repeatable_until, created_at, opened_at, dangling_at, looks, absences,
    settled_at, resource_id, payload, look_at";

/// The values of an intent that was just opened, all but the last.
const OPENED: &str = "
    $1, gen_random_uuid(), 'consumer-17', gen_random_uuid()::text, 'charge', '', 0, sha256(uuid_send($1)), NULL, 'open', true, false,
    gen_random_uuid(), gen_random_uuid(), 1, now() + interval '1 day', now(), now(), now() + interval '1 minute', 0, 0,
    NULL, NULL, NULL";

/// Before every dangling intent of the fill, so that a search has to pass what finalizing has left in an index.
const LOOK_AT: &str = "now() - interval '1 day'";

const FINALIZED: &str = "
    state = 'finalized', settled_at = now(), resource_id = 'ch_3NqXfM2eZvKYlo2C1ab2cd3e', look_at = NULL,
    payload = '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}'";

/// Intents of 100 days; 500 of them, all over the table, are open and have been due for a minute at most.
const FILL: &str = "
INSERT INTO intents ({columns})
SELECT gen_random_uuid(), gen_random_uuid(), 'consumer-17', gen_random_uuid()::text, 'charge', '', 0, sha256(int8send(i)), NULL,
       CASE WHEN dangles THEN 'open' ELSE 'finalized' END, true, false,
       gen_random_uuid(), gen_random_uuid(), 1, at + interval '1 day', at, at, at + interval '1 minute', 0, 0,
       CASE WHEN NOT dangles THEN at + interval '1 second' END,
       CASE WHEN NOT dangles THEN 'ch_3NqXfM2eZvKYlo2C1ab2cd3e' END,
       CASE WHEN NOT dangles THEN '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}'::bytea END,
       CASE WHEN dangles THEN now() - random() * interval '1 minute' END
FROM (SELECT i, i % ({rows} / 500) = 0 AS dangles, now() - interval '100 days' * (1 - i::float8 / {rows}) AS at
      FROM generate_series(1::bigint, {rows}) AS i) AS ages";

/// Opens and finalizes intents, `{open_at_once}` at a time, and adds up the seconds of the statements.
const CHURN: &str = "
CREATE PROCEDURE churn(pairs bigint, INOUT opening float8, INOUT finalizing float8) LANGUAGE plpgsql AS $$
DECLARE
    pending uuid[] := array_fill(NULL::uuid, ARRAY[{open_at_once}]);
    place integer;
    intent uuid;
    started timestamptz;
BEGIN
    FOR pair IN 1 .. pairs + {open_at_once} LOOP
        place := pair % {open_at_once} + 1;
        intent := pending[place];
        IF intent IS NOT NULL THEN
            started := clock_timestamp();
            {finalize};
            finalizing := finalizing + extract(epoch FROM clock_timestamp() - started);
            COMMIT;
        END IF;
        intent := CASE WHEN pair <= pairs THEN gen_random_uuid() END;
        pending[place] := intent;
        IF intent IS NOT NULL THEN
            started := clock_timestamp();
            {open};
            opening := opening + extract(epoch FROM clock_timestamp() - started);
            COMMIT;
        END IF;
    END LOOP;
END $$";

const PURGE_BATCH: &str = "
WITH doomed AS MATERIALIZED (
    SELECT ctid AS place FROM intents
    WHERE created_at < now() - interval '{days} days' AND state = 'finalized' LIMIT 1000 FOR UPDATE SKIP LOCKED
)
DELETE FROM intents AS i USING doomed
WHERE i.ctid = doomed.place AND (i.created_at < now() - interval '{days} days') IS TRUE";

const PURGE_ALL: &str =
    "DELETE FROM intents WHERE created_at < now() - interval '90 days' AND state = 'finalized'";

const SIZES: &str = "
WITH shared AS (SELECT pg_relation_size('intents_pkey') + pg_relation_size('intents_record_id') AS size),
     every AS (SELECT pg_indexes_size('intents') + coalesce(pg_total_relation_size(to_regclass('open_intents')), 0) AS size)
SELECT every.size - shared.size, every.size FROM shared, every";

const HOT_SHARE: &str = "
SELECT coalesce(n_tup_hot_upd::float8 / nullif(n_tup_upd, 0), 1) FROM pg_stat_user_tables WHERE relname = 'intents'";

const SETTINGS: &str = "
SELECT 'PostgreSQL ' || current_setting('server_version') || string_agg(', ' || name || ' ' || current_setting(name), '')
FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'shared_buffers', 'synchronous_commit')";
