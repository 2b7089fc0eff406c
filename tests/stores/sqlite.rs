//! What the SQLite store promises beyond the contract of every store: tables, names and locks.

use std::time::{Duration, Instant};

use sqlx::{Executor, SqlitePool};
use tokio::task::JoinSet;
use tower_idempotency::{
    SqliteStore,
    store::{ClaimOutcome, Store, StoreErrorKind, TableCreation},
};

use crate::support::{claim, must_name, names_to_quote, sqlite::SqliteFile, win};

#[tokio::test]
async fn sqlite_migrates_twice_and_from_many_stores_at_once() {
    let file = SqliteFile::new();
    let mut stores = JoinSet::new();
    for _ in 0..8 {
        let store = SqliteStore::new(file.pool());
        stores.spawn(async move { store.migrate().await });
    }
    for migrated in stores.join_all().await {
        migrated.unwrap();
    }
    let store = SqliteStore::new(file.pool());
    store.migrate().await.unwrap();
    store.migrate().await.unwrap();
    let versions: i64 = sqlx::query_scalar("SELECT count(*) FROM idempotency_migrations")
        .fetch_one(&file.pool())
        .await
        .unwrap();
    assert_eq!(versions, 2);
    win(&store, &claim("k")).await;
}

/// Without this the rules of the conformance suite for intents would check nothing.
#[tokio::test]
async fn sqlite_keeps_intents() {
    assert!(SqliteStore::new(SqliteFile::new().pool()).recovery().is_some());
}

#[tokio::test]
async fn sqlite_keeps_prefixes_apart() {
    let file = SqliteFile::new();
    let [one, two] =
        ["orders", "payouts"].map(|prefix| SqliteStore::new(file.pool()).with_table_prefix(prefix).unwrap());
    win(&one, &claim("k")).await;
    win(&two, &claim("k")).await;
    let rows: i64 = sqlx::query_scalar(
        "SELECT (SELECT count(*) FROM orders_records) + (SELECT count(*) FROM payouts_records)",
    )
    .fetch_one(&file.pool())
    .await
    .unwrap();
    assert_eq!(rows, 2);
}

#[tokio::test]
async fn sqlite_says_which_file_to_run_when_it_may_not() {
    let file = SqliteFile::new();
    let store = SqliteStore::new(file.pool()).with_table_creation(TableCreation::Manual);
    must_name(&store.prepare().await.unwrap_err(), "migrations/sqlite/0001_records.sql");
    must_name(&store.claim(&claim("k")).await.unwrap_err(), "migrations/sqlite/0001_records.sql");
    sqlx::raw_sql(FILES[0]).execute(&file.pool()).await.unwrap();
    must_name(&store.prepare().await.unwrap_err(), "migrations/sqlite/0002_intents.sql");
    sqlx::raw_sql(FILES[1]).execute(&file.pool()).await.unwrap();
    store.prepare().await.unwrap();
    win(&store, &claim("k")).await;
}

#[tokio::test]
async fn sqlite_refuses_tables_of_a_newer_release() {
    let file = SqliteFile::new();
    SqliteStore::new(file.pool()).migrate().await.unwrap();
    sqlx::query("INSERT INTO idempotency_migrations (version) VALUES (999)")
        .execute(&file.pool())
        .await
        .unwrap();
    must_name(&SqliteStore::new(file.pool()).prepare().await.unwrap_err(), "999");
}

#[tokio::test]
async fn sqlite_refuses_databases_in_memory() {
    for url in ["sqlite::memory:", "sqlite://"] {
        let store = SqliteStore::new(SqlitePool::connect_lazy(url).unwrap());
        must_name(&store.prepare().await.unwrap_err(), "MemoryStore");
        must_name(&store.claim(&claim("k")).await.unwrap_err(), "MemoryStore");
    }
}

#[tokio::test]
async fn sqlite_refuses_read_only_databases() {
    let file = SqliteFile::new();
    SqliteStore::new(file.pool()).migrate().await.unwrap();
    let store = SqliteStore::new(SqlitePool::connect_lazy_with(file.options().read_only(true)));
    must_name(&store.prepare().await.unwrap_err(), "read-only");
}

#[tokio::test]
async fn sqlite_answers_duplicates_while_another_process_writes() {
    let file = SqliteFile::new();
    let store = SqliteStore::new(file.pool());
    win(&store, &claim("k")).await;
    let mut writer = file.pool().acquire().await.unwrap();
    writer.execute("BEGIN IMMEDIATE").await.unwrap();
    let begun = Instant::now();
    let duplicate = store.claim(&claim("k")).await.unwrap();
    assert!(matches!(duplicate, ClaimOutcome::Exists(_)), "{duplicate:?}");
    assert!(begun.elapsed() < Duration::from_secs(1), "a duplicate waited for {:?}", begun.elapsed());
    let locked = store.claim(&claim("another")).await.unwrap_err();
    assert_eq!(locked.kind(), StoreErrorKind::Unavailable, "{locked:?}");
    writer.execute("COMMIT").await.unwrap();
}

#[tokio::test]
async fn sqlite_rejects_names_that_would_need_quoting() {
    for name in names_to_quote() {
        let store = SqliteStore::new(SqlitePool::connect_lazy("sqlite::memory:").unwrap());
        assert!(store.with_table_prefix(&name).is_err(), "{name:?}");
    }
}

const FILES: [&str; 2] = [
    include_str!("../../migrations/sqlite/0001_records.sql"),
    include_str!("../../migrations/sqlite/0002_intents.sql"),
];
