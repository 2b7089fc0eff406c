//! Which index finds dangling intents, and which one serves their purge: sizes, costs and times on PostgreSQL.
//!
//! ```sh
//! scripts/with-servers cargo bench --all-features --bench intents_index              # 10 million rows
//! scripts/with-servers cargo bench --all-features --bench intents_index -- 200000    # a quick try
//! scripts/with-servers cargo bench --all-features --bench intents_index -- 200000 partial    # of some candidates
//! ```
//!
//! The table is filled once, in a database of its own. Every candidate gets a copy of that database and is measured beside
//! another copy, the reference, that has no further index: every round writes to the one and then to the other, and the
//! median of the rounds' ratios is printed. Intents are opened and finalized one by one, each in a transaction of its own,
//! 64 of them open at any time: by four clients, and in the server by a procedure, without a round trip.
//!
//! Nothing is vacuumed in the background; `VACUUM` runs where the tables say so. Needs a server of version 15 or later
//! on Linux and a superuser, since cold times are taken after the operating system has been told to forget the files.
//! The databases are dropped at the end. Ten million rows take half an hour to an hour and 20 GB of disk.

mod candidates;
mod costs;
mod report;
mod server;

use std::time::Instant;

use sqlx::{Connection, PgConnection, Row};

use candidates::{CANDIDATES, Candidate, OpenIntents, PROMOTE, SWEEP};
use costs::{Costs, Pairs, churn, hot_share};
use server::{BASE, COPY, REFERENCE, Server, execute, fill, prepare, query};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let rows = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(10_000_000);
    let names: Vec<_> = arguments.into_iter().filter(|argument| argument.parse::<i64>().is_err()).collect();
    let url = std::env::var("TEST_POSTGRES_URL").map_err(|_| "run it with scripts/with-servers")?;
    let server = Server { options: url.parse()? };
    for database in [BASE, REFERENCE, COPY] {
        server.drop(database).await?;
    }
    let measured = measure_all(&server, rows, &names).await;
    for database in [BASE, REFERENCE, COPY] {
        server.drop(database).await?;
    }
    report::print(rows, &measured?);
    println!("\n{}", server.settings().await?);
    Ok(())
}

/// All candidates, or those that have one of these in their name.
async fn measure_all(server: &Server, rows: i64, names: &[String]) -> Result<Vec<Measured>> {
    fill(server, rows).await?;
    let mut measured = Vec::new();
    let chosen =
        |candidate: &Candidate| names.is_empty() || names.iter().any(|name| candidate.name.contains(name));
    for candidate in CANDIDATES.iter().filter(|candidate| chosen(candidate)) {
        let started = Instant::now();
        measured.push(measure(server, &CANDIDATES[0], candidate, rows).await?);
        for database in [REFERENCE, COPY] {
            server.drop(database).await?;
        }
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
    /// Share of the updates that touched no index, if there were any.
    hot: Option<f64>,
    cold: f64,
    warm: f64,
    /// What a reconciler does before it searches.
    swept: f64,
    /// The first search and further ones.
    after_churn: (f64, f64),
    purge: Purge,
}

/// Batches when something is due and when nothing is, and searches in between.
struct Purge {
    batch: f64,
    idle: f64,
    found: f64,
    vacuum: f64,
    vacuumed_idle: f64,
    vacuumed_found: f64,
    refilled_found: f64,
    refilled_idle: f64,
    refilled_batch: f64,
}

async fn measure(
    server: &Server,
    reference: &Candidate,
    candidate: &'static Candidate,
    rows: i64,
) -> Result<Measured> {
    // Both are copied anew: leaves that inserts have split take the next ones at another cost.
    prepare(server, REFERENCE, reference).await?;
    prepare(server, COPY, candidate).await?;
    let mut sql = server.connect(COPY).await?;
    let fresh = Sizes::of(&mut sql).await?;
    for database in [REFERENCE, COPY] {
        server.forget(database).await?;
    }
    let cold = find(&mut sql, candidate).await?;
    let warm = find_again(&mut sql, candidate).await?;
    for database in [REFERENCE, COPY] {
        server.remember(database).await?;
    }
    let in_rounds = Pairs::of(rows);
    let costs = Costs::measure(server, [reference, candidate], in_rounds).await?;
    let pairs = rows * 3 / 100;
    churn(&mut sql, pairs - in_rounds.in_all_rounds()).await?;
    let swept = sweep(&mut sql, candidate).await?;
    let after_churn = (find(&mut sql, candidate).await?, find_again(&mut sql, candidate).await?);
    let churned = Sizes::of(&mut sql).await?;
    sql.close().await?;

    let mut sql = server.connect(COPY).await?;
    let hot = hot_share(&mut sql).await?;
    let purge = Purge::measure(server, &mut sql, candidate, pairs / 3).await?;
    sql.close().await?;
    Ok(Measured { candidate, fresh, churned, costs, hot, cold, warm, swept, after_churn, purge })
}

impl Purge {
    /// Purges a tenth of the rows and lets others take their place.
    async fn measure(
        server: &Server,
        sql: &mut PgConnection,
        candidate: &Candidate,
        pairs: i64,
    ) -> Result<Self> {
        let batch = purge(sql, candidate, 90, 20).await?;
        execute(sql, PURGE_ALL).await?;
        let found = find(sql, candidate).await?;
        let idle = purge(sql, candidate, 90, 1).await?;
        let vacuum = execute(sql, "VACUUM").await?;
        Ok(Self {
            batch,
            idle,
            found,
            vacuum,
            vacuumed_idle: purge(sql, candidate, 90, 5).await?,
            vacuumed_found: find_again(sql, candidate).await?,
            refilled_found: refill_beside_snapshot(server, sql, candidate, pairs).await?,
            refilled_idle: purge(sql, candidate, 90, 5).await?,
            refilled_batch: purge(sql, candidate, 80, 20).await?,
        })
    }
}

/// A search while a transaction is open that may still see every version of the intents finalized meanwhile.
async fn refill_beside_snapshot(
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

/// The median time of a batch of the purge, for those candidates that it is measured of.
async fn purge(sql: &mut PgConnection, candidate: &Candidate, days: u8, batches: usize) -> Result<f64> {
    if !candidate.purge {
        return Ok(0.0);
    }
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "sizes and counts are far below 2^52")]
fn as_f64(value: i64) -> f64 {
    value as f64
}

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
