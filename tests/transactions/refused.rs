//! Errors of statements: which of them a retry meets again.

use axum::http::StatusCode;
use sqlx::{Postgres, Sqlite};
use tower_idempotency::{Directive, RejectionCode, ResultPolicy, Tx, TxError};

use crate::{
    bank::{Answered, Bank, Db, End, charge, charge_once, unique, with_both_strategies},
    support::log::Log,
};

with_both_strategies!(
    an_error_that_a_retry_meets_again_is_not_retryable,
    a_row_that_is_absent_or_of_another_form_is_not_retryable,
);

/// A handler that returns the error of a statement.
async fn failing<DB: Db>(bank: &Bank<DB>, statement: &'static str, answered: Answered) {
    let handler = move |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        DB::run(&mut tx, statement).await?;
        Ok::<_, TxError>(unique(StatusCode::CREATED))
    };
    bank.check(&bank.node(bank.layer(), handler), answered, 0, End::Released).await;
}

const FINAL: Answered = Answered::Final(RejectionCode::TransactionFailed);

async fn an_error_that_a_retry_meets_again_is_not_retryable<DB: Db>(bank: Bank<DB>) {
    bank.run("CREATE TABLE limited (n INTEGER NOT NULL UNIQUE CHECK (n < 5))").await;
    bank.run("INSERT INTO limited VALUES (1)").await;
    for statement in [
        "INSERT INTO limited VALUES (9)",
        "INSERT INTO limited VALUES (1)",
        "INSERT INTO limited VALUES (NULL)",
        "INSERT INTO missing VALUES (1)",
        "SELECT missing FROM limited",
        "INSERT INTO accounts VALUES ('not a number', 1)",
        "SELEKT 1",
    ] {
        failing(&bank, statement, FINAL).await;
    }
}

async fn a_row_that_is_absent_or_of_another_form_is_not_retryable<DB: Db>(bank: Bank<DB>) {
    let absent = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        Err::<StatusCode, TxError>(sqlx::Error::RowNotFound.into())
    };
    bank.check(&bank.node(bank.layer(), absent), FINAL, 0, End::Released).await;
    let other = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        Err::<StatusCode, TxError>(sqlx::Error::ColumnNotFound("amount".to_owned()).into())
    };
    bank.check(&bank.node(bank.layer(), other), FINAL, 0, End::Released).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn the_class_of_an_error_of_postgres_says_whether_a_retry_makes_sense() {
    let bank = Bank::<Postgres>::open().await;
    let failed = Answered::Refused(RejectionCode::TransactionFailed);
    let conflict = Answered::Refused(RejectionCode::TransactionConflict);
    let lost = Answered::Refused(RejectionCode::TransactionLost);
    for (code, answered) in [
        ("22012", FINAL),
        ("23P01", FINAL),
        ("42501", FINAL),
        ("44000", FINAL),
        ("P0001", FINAL),
        ("40001", conflict),
        ("40P01", conflict),
        ("53100", failed),
        ("08006", lost),
        ("57P01", lost),
        ("57014", lost),
    ] {
        let raise = format!("DO $$ BEGIN RAISE EXCEPTION 'told to' USING ERRCODE = '{code}'; END $$");
        failing(&bank, raise.leak(), answered).await;
    }
}

#[tokio::test]
async fn a_success_that_is_rolled_back_is_logged() {
    let (log, _guard) = Log::listen();
    let bank = Bank::<Sqlite>::open().await;
    let warned = || log.lines(&["WARN", "rolled back"]).len();
    for (directive, end) in [(Directive::Release, End::Released), (Directive::Hold, End::Held)] {
        let before = warned();
        let handler = move |mut tx: Tx<Sqlite>| async move {
            charge(&mut tx).await;
            (StatusCode::ACCEPTED, axum::Extension(directive))
        };
        let node = bank.node(bank.layer(), handler);
        let key = format!("{directive:?}");
        assert_eq!(node.send(&key).await.status, StatusCode::ACCEPTED);
        node.until(&key, end).await;
        assert_eq!((warned() - before, bank.charges().await), (1, 0), "{directive:?}");
    }
    let line = log.lines(&["WARN", "rolled back"]).remove(0);
    assert!(line.contains("202") && line.contains("key=Release"), "{line}");
    // A policy of the application.
    let before = warned();
    let layer = bank.layer().with_policy(ResultPolicy::from_fn(|_| Directive::Release));
    bank.node(layer, charge_once::<Sqlite>).send("policy").await;
    assert_eq!(warned() - before, 1);
    // No transaction, no success, and a success that is stored.
    for (key, status) in [("none", StatusCode::ACCEPTED), ("failed", StatusCode::BAD_GATEWAY)] {
        let handler = move |request: axum::extract::Request| async move {
            if status.is_server_error() {
                charge(&mut Tx::<Sqlite>::begin(request.extensions()).await.unwrap()).await;
            }
            (status, axum::Extension(Directive::Release))
        };
        bank.node(bank.layer(), handler).send(key).await;
    }
    bank.node(bank.layer(), charge_once::<Sqlite>).send("stored").await;
    assert_eq!(warned() - before, 1);
}
