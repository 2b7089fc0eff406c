//! Where servers keep charges and records, and whether these agree.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, ColumnIndex, Decode, PgPool, Row, SqlitePool, Type, postgres::PgPoolOptions,
    sqlite::SqlitePoolOptions,
};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tower_idempotency::{
    IdempotencyLayer, PostgresStore, SqliteStore,
    store::{Store, StoredBody, StoredResponse},
};

use crate::{client::Reply, report::Check};

/// A database, read by connections that no server has.
#[derive(Clone, Debug)]
pub enum Books {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

/// What is there of a key.
#[derive(Debug)]
pub struct Entry {
    pub key: String,
    /// The ids of its charges.
    pub charges: Vec<String>,
    /// The response of its record, if that is completed.
    pub response: Option<StoredResponse>,
    /// How many attempts the record has seen, if it is completed.
    attempts: i64,
}

impl Books {
    /// Makes the tables.
    pub async fn open(url: &str) -> Self {
        let (books, layer) = if url.starts_with("sqlite:") {
            let options = SqlitePoolOptions::new().max_connections(2);
            let pool = options.connect_lazy_with(url.parse().expect("a URL of SQLite"));
            (Self::Sqlite(pool.clone()), IdempotencyLayer::new(SqliteStore::new(pool)))
        } else {
            let pool =
                PgPoolOptions::new().max_connections(2).connect_lazy(url).expect("a URL of PostgreSQL");
            (Self::Postgres(pool.clone()), IdempotencyLayer::new(PostgresStore::new(pool)))
        };
        layer.handle().prepare().await.expect("the tables can be made");
        let made = match &books {
            Self::Postgres(pool) => sqlx::raw_sql(TABLES).execute(pool).await.map(drop),
            Self::Sqlite(pool) => sqlx::raw_sql(TABLES).execute(pool).await.map(drop),
        };
        made.expect("tables can be made");
        books
    }

    /// Everything, as one snapshot shows it.
    pub async fn entries(&self) -> Result<Vec<Entry>, sqlx::Error> {
        self.select("TRUE").await
    }

    /// Keys with a charge and no completed record, a completed record and no charge, or several charges.
    async fn contradictions(&self) -> Result<Vec<Entry>, sqlx::Error> {
        let mut entries = self.select("COALESCE(c.number, 0) <> 1 OR r.key IS NULL").await?;
        entries.retain(|entry| !entry.charges.is_empty() || entry.is_success());
        Ok(entries)
    }

    /// The store of the servers, for this process.
    pub fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Postgres(pool) => Arc::new(PostgresStore::new(pool.clone())),
            Self::Sqlite(pool) => Arc::new(SqliteStore::new(pool.clone())),
        }
    }

    /// The open intents of this key are past their grace period.
    pub async fn let_dangle(&self, key: &str) {
        let update = |past| {
            let set = format!("UPDATE idempotency_intents SET dangling_at = {past}, look_at = {past}");
            AssertSqlSafe(format!("{set} WHERE key = $1 AND look_at IS NOT NULL"))
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let updated = match self {
                Self::Postgres(pool) => {
                    sqlx::query(update("'epoch'")).bind(key).execute(pool).await.map(drop)
                }
                Self::Sqlite(pool) => sqlx::query(update("0")).bind(key).execute(pool).await.map(drop),
            };
            match updated {
                Ok(()) => return,
                // Others write too.
                Err(error) => assert!(Instant::now() < deadline, "the database does not answer: {error}"),
            }
        }
    }

    pub async fn entry(&self, key: &str) -> Option<Entry> {
        let entries = self.entries().await.expect("the database answers");
        entries.into_iter().find(|entry| entry.key == key)
    }

    /// What this statement finds of a key.
    pub async fn lines(&self, sql: &'static str, key: &str) -> Vec<String> {
        let found = match self {
            Self::Postgres(pool) => sqlx::query_scalar(sql).bind(key).fetch_all(pool).await,
            Self::Sqlite(pool) => sqlx::query_scalar(sql).bind(key).fetch_all(pool).await,
        };
        found.expect("the database answers")
    }

    async fn select(&self, condition: &str) -> Result<Vec<Entry>, sqlx::Error> {
        let sql = AssertSqlSafe(format!("{ENTRIES} WHERE {condition}"));
        match self {
            Self::Postgres(pool) => {
                let rows = sqlx::query(sql).fetch_all(pool).await?;
                rows.iter().map(entry).collect()
            }
            Self::Sqlite(pool) => {
                let rows = sqlx::query(sql).fetch_all(pool).await?;
                rows.iter().map(entry).collect()
            }
        }
    }
}

impl Entry {
    fn is_success(&self) -> bool {
        self.response.as_ref().is_some_and(|response| response.status.is_success())
    }
}

fn entry<'r, R: Row>(row: &'r R) -> Result<Entry, sqlx::Error>
where
    usize: ColumnIndex<R>,
    String: Decode<'r, R::Database> + Type<R::Database>,
    Vec<u8>: Decode<'r, R::Database> + Type<R::Database>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
{
    let charges: String = row.try_get(1)?;
    let response: Option<Vec<u8>> = row.try_get(2)?;
    let response = response.map(|response| StoredResponse::decode(&response.into())).transpose();
    Ok(Entry {
        key: row.try_get(0)?,
        charges: charges.split_whitespace().map(str::to_owned).collect(),
        response: response.expect("a stored response is readable"),
        attempts: row.try_get(3)?,
    })
}

/// What clients were told.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<HashMap<String, Vec<Result<Reply, String>>>>);

/// What became of the keys that clients have sent.
#[derive(Debug, Default)]
pub struct Audit {
    /// Every one of them, with what is wrong with it.
    pub keys: BTreeMap<String, Option<String>>,
    /// How many have several charges.
    pub double_effects: usize,
    /// How many were completed by another attempt than the first.
    pub taken_over: usize,
}

impl Ledger {
    pub fn note(&self, key: &str, reply: Result<Reply, String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()).or_default().push(reply);
    }

    /// Compares what clients were told with what is there.
    pub async fn audit(&self, books: &Books) -> Audit {
        let entries = books.entries().await.expect("the database answers");
        let entries: HashMap<_, _> = entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let mut audit = Audit::default();
        for (key, replies) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let entry = entries.get(key);
            if entry.is_some_and(|entry| entry.charges.len() > 1) {
                audit.double_effects += 1;
            }
            if entry.is_some_and(|entry| entry.attempts > 1) {
                audit.taken_over += 1;
            }
            audit.keys.insert(key.clone(), fault(replies, entry));
        }
        audit
    }
}

impl Audit {
    /// Checks the keys that begin with this.
    pub fn check(&self, prefix: &str, check: &Check) {
        for (key, fault) in self.keys.iter().filter(|(key, _)| key.starts_with(prefix)) {
            check.that(fault.is_none(), key, fault.as_deref().unwrap_or_default());
        }
    }
}

fn fault(replies: &[Result<Reply, String>], entry: Option<&Entry>) -> Option<String> {
    if let Some(Err(error)) = replies.iter().find(|reply| reply.is_err()) {
        return Some(error.clone());
    }
    let Some(entry) = entry else {
        return Some("nothing was charged, though clients were told so".to_owned());
    };
    let [id] = &entry.charges[..] else { return Some(format!("charges {:?}", entry.charges)) };
    let body = format!("charge {id}");
    let stored = entry.response.as_ref().map(|response| &response.body);
    if !entry.is_success() || !matches!(stored, Some(StoredBody::Kept { data, .. }) if *data == body) {
        return Some(format!("{body} is not what is stored: {:?}", entry.response));
    }
    let mut replies = replies.iter().flatten();
    let first = replies.next()?;
    if first.answer.body != body {
        return Some(format!("{body} is not what the client was told: {}", first.shown));
    }
    let other = replies.find(|reply| reply.shown != first.shown)?;
    Some(format!("two answers: {} and {}", first.shown, other.shown))
}

/// Looks for contradictions all the time, until it is stopped.
#[derive(Debug)]
pub struct Poller {
    task: JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl Poller {
    pub fn start(books: &Books, check: &Check) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let (books, check) = (books.clone(), check.clone());
        let task = tokio::spawn(async move {
            while matches!(stopped.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                // The server may be away.
                if let Ok(entries) = books.contradictions().await {
                    let key = entries.first().map_or("-", |entry| &entry.key);
                    check.that(entries.is_empty(), key, format!("{entries:?}"));
                }
                sleep(Duration::from_millis(20)).await;
            }
        });
        Self { task, stop }
    }

    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.expect("the poller does not fail");
    }
}

const TABLES: &str = "
CREATE TABLE charges (consumer text NOT NULL, key text NOT NULL, id text NOT NULL, attempt text NOT NULL);
CREATE TABLE reservations (key text NOT NULL, id text NOT NULL);
CREATE TABLE payouts (key text NOT NULL, id text NOT NULL, reservation text NOT NULL, transfer text NOT NULL);
CREATE TABLE accounts (id integer NOT NULL PRIMARY KEY, charges integer NOT NULL);
INSERT INTO accounts VALUES (1, 0)";

/// In the dialect of both databases.
const ENTRIES: &str = "
SELECT COALESCE(c.key, r.key), COALESCE(c.ids, ''), r.response, CAST(COALESCE(r.attempt_number, 0) AS bigint)
FROM (SELECT consumer, key, count(*) AS number, string_agg(id, ' ') AS ids FROM charges GROUP BY consumer, key) AS c
FULL JOIN (SELECT consumer, key, response, attempt_number FROM idempotency_records WHERE state = 'completed') AS r
ON r.consumer = c.consumer AND r.key = c.key";

const PATIENCE: Duration = Duration::from_secs(30);
