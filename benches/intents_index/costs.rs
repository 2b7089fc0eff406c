//! What it costs to open and to finalize intents, beside the reference.

use std::{collections::VecDeque, time::Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use uuid::Uuid;

use crate::{
    Result, as_f64,
    candidates::Candidate,
    median,
    server::{COPY, REFERENCE, Server, query},
};

/// What opening and finalizing cost by clients and in the server, in relation to the reference.
pub(crate) struct Costs {
    pub(crate) client: [f64; 2],
    pub(crate) server: [f64; 2],
    pub(crate) wal: f64,
}

/// How many intents are opened and finalized in a round.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    by_clients: i64,
    in_server: i64,
}

impl Pairs {
    /// Less in a table so small that it would not be the same one after that.
    pub(crate) fn of(rows: i64) -> Self {
        Self { by_clients: (rows / 100).min(2_000), in_server: (rows / 40).min(5_000) }
    }

    pub(crate) fn in_all_rounds(self) -> i64 {
        ROUNDS * (self.by_clients + self.in_server)
    }
}

impl Costs {
    pub(crate) async fn measure(server: &Server, candidates: [&Candidate; 2], pairs: Pairs) -> Result<Self> {
        let (mut client, mut inside, mut wal) = (Vec::new(), Vec::new(), Vec::new());
        // The first rounds warm up.
        for round in 0..ROUNDS {
            let (mut by_clients, mut in_server) = ([[0.0; 2]; 2], [[0.0; 2]; 2]);
            // Each goes first in every other round.
            for index in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let database = [REFERENCE, COPY][index];
                by_clients[index] =
                    run_clients(server, database, candidates[index], pairs.by_clients).await?;
                let mut sql = server.connect(database).await?;
                let before = wal_position(&mut sql).await?;
                in_server[index] = churn(&mut sql, pairs.in_server).await?;
                if index == 1 {
                    wal.push((wal_position(&mut sql).await? - before) / as_f64(pairs.in_server));
                }
                sql.close().await?;
            }
            if round >= 2 {
                client.push(ratios(by_clients));
                inside.push(ratios(in_server));
            }
        }
        Ok(Self { client: medians(&client), server: medians(&inside), wal: median(wal) })
    }
}

fn ratios([reference, candidate]: [[f64; 2]; 2]) -> [f64; 2] {
    [candidate[0] / reference[0], candidate[1] / reference[1]]
}

fn medians(rounds: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|figure| median(rounds.iter().map(|round| round[figure]).collect()))
}

/// Opens and finalizes intents with several clients; the time that each of the two took, over all clients.
async fn run_clients(server: &Server, database: &str, candidate: &Candidate, pairs: i64) -> Result<[f64; 2]> {
    let (open, finalize) = (candidate.open(), candidate.finalize());
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let sql = server.connect(database).await?;
        clients.push(tokio::spawn(run_client(sql, open.clone(), finalize.clone(), pairs / CLIENTS)));
    }
    let mut sums = [0.0; 2];
    for client in clients {
        let times = client.await??;
        sums = [sums[0] + times[0], sums[1] + times[1]];
    }
    Ok(sums)
}

async fn run_client(mut sql: PgConnection, open: String, finalize: String, pairs: i64) -> Result<[f64; 2]> {
    let (mut pending, mut times) = (VecDeque::new(), [0.0; 2]);
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
pub(crate) async fn churn(sql: &mut PgConnection, pairs: i64) -> Result<[f64; 2]> {
    let row = query(sql, &format!("CALL churn({}, 0, 0)", pairs.max(0))).await?;
    let row = row.first().ok_or("the procedure returns its sums")?;
    Ok([row.try_get(0)?, row.try_get(1)?])
}

/// Share of the updates that touched no index, if there were any.
pub(crate) async fn hot_share(sql: &mut PgConnection) -> Result<Option<f64>> {
    // The server reports what a connection has done when that has ended.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let row = query(sql, HOT_SHARE).await?;
    Ok(row.first().ok_or("the share is one row")?.try_get(0)?)
}

async fn wal_position(sql: &mut PgConnection) -> Result<f64> {
    let row = query(sql, "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8").await?;
    Ok(row.first().ok_or("the position is one row")?.try_get(0)?)
}

const ROUNDS: i64 = 12;
const CLIENTS: i64 = 4;
pub(crate) const OPEN_AT_ONCE: i64 = 64;

const HOT_SHARE: &str = "
SELECT n_tup_hot_upd::float8 / nullif(n_tup_upd, 0) FROM pg_stat_user_tables WHERE relname = 'intents'";
