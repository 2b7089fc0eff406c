//! A nightly job that pays out from a list, and may be killed at any moment and started again.
//!
//! ```sh
//! cargo run --example job -- 2031-01-31
//! ```
//!
//! pays everybody on the list, and writes it down in `job.sqlite`. The same line again pays nobody: each payout has its key,
//! made of the night and whom it is for, and the log knows its result. Another night pays again.
//!
//! To kill it in the middle, take a bank that outlives it and that does not answer when it is called first:
//!
//! ```sh
//! cargo build --examples
//! cargo run --example payout -- --bank &
//! export UPSTREAM_URL=http://127.0.0.1:4000 UPSTREAM=timeout
//! timeout -s KILL 1 cargo run --example job -- 2031-02-28
//! cargo run --example job -- 2031-02-28
//! curl localhost:4000/transfers
//! ```
//!
//! The bank has made a transfer that the job knows nothing of. It is not made again: the bank is asked for it first.

#[path = "payout/bank.rs"]
mod bank;

use std::{error::Error, time::Duration};

use bank::Bank;
use serde::Serialize;
use sqlx::{
    SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tokio::time::{Instant, sleep};
use tower_idempotency::{
    Consumer, IdempotencyKey, IntentError, IntentLog, Reconciler, TxError, jobs::LogOutcome,
};

#[derive(Serialize)]
struct Due {
    to: &'static str,
    cents: u32,
}

const LIST: [Due; 3] =
    [Due { to: "DE01", cents: 1000 }, Due { to: "DE02", cents: 250 }, Due { to: "DE03", cents: 4000 }];
const TIMEOUT: Duration = Duration::from_secs(2);

/// Returns what became of a payout, or `None` if that must be found out first: another run has begun it and may have died.
async fn pay(log: &IntentLog, bank: &Bank, night: &str, due: &Due) -> Result<Option<String>, Box<dyn Error>> {
    let key = IdempotencyKey::new(format!("{night}:{}", due.to))?;
    let attempt = match log.attempt(&Consumer::new("job:payouts")?, &key, due).await? {
        LogOutcome::Run(attempt) => attempt,
        LogOutcome::Completed(result) => return Ok(Some(String::from_utf8_lossy(&result).into_owned())),
        LogOutcome::InProgress | LogOutcome::Held => return Ok(None),
        LogOutcome::OtherArguments => return Err(format!("{}: the list was changed", due.to).into()),
    };
    let order = format!("{} cents to {}", due.cents, due.to);
    let wish = std::env::var("UPSTREAM").ok();
    let idempotency = attempt.idempotency();
    let intent = idempotency.intent("bank.transfer").with_arguments(due).with_timeout(TIMEOUT);
    let called =
        intent.with_grace(TIMEOUT).call(async |key| bank.transfer(key, order, wish.as_deref()).await);
    let result = match called.await {
        Ok(transfer) => transfer.id,
        Err(IntentError::Refused(reason)) => format!("refused: {reason}"),
        // The attempt is given back. It may run again once the bank was asked what became of the call.
        Err(error @ (IntentError::NotSent(_) | IntentError::Unknown { .. })) => {
            println!("{}: {error}", due.to);
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let write_down = async |tx: &mut SqliteConnection| {
        let insert = sqlx::query("INSERT INTO payouts (night, recipient, result) VALUES (?, ?, ?)");
        insert.bind(night).bind(due.to).bind(&result).execute(tx).await?;
        Ok::<_, TxError>(())
    };
    idempotency.phase("write down", write_down).await?;
    attempt.complete(result.clone()).await?;
    Ok(Some(result))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let night =
        std::env::args().nth(1).ok_or("say which night it is: cargo run --example job -- 2031-01-31")?;
    let file = SqliteConnectOptions::new().filename("job.sqlite").create_if_missing(true);
    let pool = SqlitePool::connect_with(file.journal_mode(SqliteJournalMode::Wal)).await?;
    let create = "CREATE TABLE IF NOT EXISTS payouts (night TEXT, recipient TEXT, result TEXT)";
    sqlx::raw_sql(create).execute(&pool).await?;
    let bank = match std::env::var("UPSTREAM_URL") {
        Ok(url) => Bank::at(url),
        Err(_) => Bank::open(0).await?,
    };
    println!("{night}, through the bank at {}", bank.url());

    // What a run leaves behind that was killed is taken over when the lease has run out.
    let log = IntentLog::new(pool).with_lease(Duration::from_secs(3));
    let handle = log.handle();
    let reconciler = Reconciler::new().on("bank.transfer", bank.clone());
    handle.start_reconciler(reconciler.with_interval(TIMEOUT).with_confirmation_after(TIMEOUT))?;
    let mut left = Vec::from(LIST);
    let patience = Instant::now() + Duration::from_secs(60);
    while !left.is_empty() && Instant::now() < patience {
        let mut later = Vec::new();
        for due in left {
            match pay(&log, &bank, &night, &due).await? {
                Some(result) => println!("{}: {result}", due.to),
                None => later.push(due),
            }
        }
        left = later;
        sleep(Duration::from_millis(100)).await;
    }
    handle.drain(Duration::from_secs(10)).await?;
    match left.len() {
        0 => Ok(()),
        some => Err(format!("{some} are not decided: start it again").into()),
    }
}
