//! Transactions that SQLite rolls back without being asked: nothing is committed, and no key is held.

use axum::http::StatusCode;
use sqlx::Sqlite;
use tower_idempotency::{RejectionCode, Tx, TxError};

use crate::bank::{Answered, Bank, Db, End, charge, charge_once, unique};

/// Statements after which SQLite has rolled everything back. Each fails.
const ROLLED_BACK: [&str; 3] = [
    "INSERT OR ROLLBACK INTO accounts VALUES (1, 5)",
    "UPDATE OR ROLLBACK accounts SET id = 1",
    "INSERT INTO guarded VALUES (1)",
];

async fn bank() -> Bank<Sqlite> {
    let bank = Bank::<Sqlite>::open().await;
    bank.run(
        "CREATE TABLE guarded (n INTEGER);
        CREATE TRIGGER guard BEFORE INSERT ON guarded BEGIN SELECT RAISE(ROLLBACK, 'told to'); END",
    )
    .await;
    bank
}

/// Checks a handler that charges, sends the statement, sends the next ones, and answers with the status.
async fn check(
    bank: &Bank<Sqlite>,
    [statement, next]: [&'static str; 2],
    status: u16,
    answered: impl Into<Answered>,
    charges: i64,
    end: End,
) {
    let handler = move |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        let _ = Sqlite::run(&mut tx, statement).await;
        Sqlite::run(&mut tx, next).await.unwrap();
        unique(StatusCode::from_u16(status).unwrap())
    };
    bank.check(&bank.node(bank.layer(), handler), answered, charges, end).await;
    // Its connection is in order again, or gone.
    bank.check(&bank.node(bank.layer(), charge_once::<Sqlite>), 201, 1, End::Stored).await;
}

const NEXT: &str = "SELECT 1";
const WRITE: &str = "INSERT INTO charges (amount) VALUES (1)";

#[tokio::test(flavor = "multi_thread")]
async fn what_sqlite_rolls_back_is_released() {
    let bank = bank().await;
    for statement in ROLLED_BACK {
        let handler = move |mut tx: Tx<Sqlite>| async move {
            charge(&mut tx).await;
            Sqlite::run(&mut tx, statement).await?;
            Ok::<_, TxError>(unique(StatusCode::CREATED))
        };
        let failed = Answered::Final(RejectionCode::TransactionFailed);
        bank.check(&bank.node(bank.layer(), handler), failed, 0, End::Released).await;
        let statements = [statement, NEXT];
        check(&bank, statements, 201, RejectionCode::TransactionFailed, 0, End::Released).await;
        check(&bank, statements, 422, 422, 0, End::Stored).await;
        check(&bank, statements, 500, 500, 0, End::Released).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_writes_after_a_rollback_that_it_missed_holds_the_key() {
    let bank = bank().await;
    for statement in ROLLED_BACK {
        for status in [201, 422, 500] {
            check(&bank, [statement, WRITE], status, RejectionCode::TransactionEnded, 1, End::Held).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_released() {
    let bank = bank().await;
    let handler = |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        Sqlite::run(&mut tx, "PRAGMA max_page_count = 1").await.unwrap();
        let full = Sqlite::run(&mut tx, "CREATE TABLE big AS SELECT zeroblob(10000000) AS data").await;
        Sqlite::run(&mut tx, "PRAGMA max_page_count = 1000000").await.unwrap();
        full?;
        Ok::<_, TxError>(unique(StatusCode::CREATED))
    };
    bank.check(&bank.node(bank.layer(), handler), RejectionCode::TransactionFailed, 0, End::Released).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_rolls_back_by_itself_holds_its_key_only_if_something_was_committed() {
    let bank = bank().await;
    for nothing in
        [NEXT, "BEGIN", "BEGIN; SELECT 1; COMMIT", "BEGIN IMMEDIATE; INSERT INTO charges (amount) VALUES (1)"]
    {
        let statements = ["ROLLBACK", nothing];
        check(&bank, statements, 201, RejectionCode::TransactionFailed, 0, End::Released).await;
        check(&bank, statements, 422, 422, 0, End::Stored).await;
        check(&bank, statements, 500, 500, 0, End::Released).await;
    }
    for something in [WRITE, "BEGIN; INSERT INTO charges (amount) VALUES (1); COMMIT"] {
        for status in [201, 422, 500] {
            check(&bank, ["ROLLBACK", something], status, RejectionCode::TransactionEnded, 1, End::Held)
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_with_a_hook_of_its_own_commits_unseen_and_holds_its_key() {
    let bank = bank().await;
    let handler = |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        tx.lock_handle().await.unwrap().set_commit_hook(|| true);
        Sqlite::run(&mut tx, "COMMIT").await.unwrap();
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), RejectionCode::TransactionEnded, 1, End::Held).await;
}
