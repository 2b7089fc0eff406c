//! Transactions that the handler or the database ends.

use std::convert::Infallible;

use axum::http::StatusCode;
use sqlx::Postgres;
use tower_idempotency::{RejectionCode, Tx};

use crate::bank::{Answered, Bank, Db, End, charge, charge_once, unique, with_both_strategies};

with_both_strategies!(
    a_deferred_constraint_that_is_violated_leaves_nothing,
    a_handler_that_commits_by_itself_does_not_run_again,
    a_handler_that_commits_by_itself_and_then_fails_does_not_run_again,
    a_handler_that_commits_by_itself_and_then_panics_does_not_run_again,
    a_handler_that_begins_another_transaction_does_not_run_again,
);

async fn a_deferred_constraint_that_is_violated_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let handler = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        DB::run(&mut tx, "INSERT INTO charges (amount, account) VALUES (1, 999)").await.unwrap();
        StatusCode::CREATED
    };
    let node = bank.node(bank.layer(), handler);
    bank.check(&node, Answered::Final(RejectionCode::TransactionFailed), 0, End::Released).await;
}

async fn a_handler_that_commits_by_itself_does_not_run_again<DB: Db>(bank: Bank<DB>) {
    ending(&bank, "COMMIT", 201, 1).await;
}

async fn a_handler_that_commits_by_itself_and_then_fails_does_not_run_again<DB: Db>(bank: Bank<DB>) {
    ending(&bank, "COMMIT", 422, 1).await;
    ending(&bank, "COMMIT", 500, 1).await;
}

async fn a_handler_that_commits_by_itself_and_then_panics_does_not_run_again<DB: Db>(bank: Bank<DB>) {
    async fn handler<DB: Db>(mut tx: Tx<DB>) -> Infallible {
        charge(&mut tx).await;
        DB::run(&mut tx, "COMMIT").await.unwrap();
        panic!("the handler breaks");
    }

    let node = bank.node(bank.layer(), handler::<DB>);
    bank.check(&node, RejectionCode::TransactionEnded, 1, End::Held).await;
}

/// What it writes after that would be committed immediately, and PostgreSQL does not tell.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_rolls_back_by_itself_does_not_run_again_on_postgres() {
    let bank = Bank::<Postgres>::open().await;
    for status in [201, 422, 500] {
        for statements in ["ROLLBACK", "ABORT", "ROLLBACK AND CHAIN", "ROLLBACK; BEGIN"] {
            ending(&bank, statements, status, 0).await;
        }
        ending(&bank, "COMMIT AND CHAIN", status, 1).await;
        for charged in ["", "BEGIN; "] {
            let statements = format!("ROLLBACK; {charged}INSERT INTO charges (amount) VALUES (1); COMMIT");
            ending(&bank, statements.leak(), status, 1).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_statement_that_may_not_run_inside_a_transaction_is_told_from_one_that_ends_it() {
    let bank = Bank::<Postgres>::open().await;
    let (failed, ended) = (RejectionCode::TransactionFailed, RejectionCode::TransactionEnded);
    for (statement, code, end) in [
        ("DISCARD ALL", failed, End::Released),
        ("VACUUM", failed, End::Released),
        // It fails on a server without prepared transactions, and is the end of the transaction.
        ("PREPARE TRANSACTION 'charge'", ended, End::Held),
    ] {
        let handler = move |mut tx: Tx<Postgres>| async move {
            charge(&mut tx).await;
            Postgres::run(&mut tx, statement).await.unwrap_err();
            unique(StatusCode::CREATED)
        };
        let node = bank.node(bank.layer(), handler);
        bank.check(&node, code, 0, end).await;
    }
}

async fn a_handler_that_begins_another_transaction_does_not_run_again<DB: Db>(bank: Bank<DB>) {
    for status in [201, 422, 500] {
        ending(&bank, "COMMIT; BEGIN", status, 1).await;
    }
}

/// A handler charges, sends the statements, and answers with the status.
async fn ending<DB: Db>(bank: &Bank<DB>, statements: &'static str, status: u16, charges: i64) {
    let handler = move |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        DB::run(&mut tx, statements).await.unwrap();
        unique(StatusCode::from_u16(status).unwrap())
    };
    let node = bank.node(bank.layer(), handler);
    bank.check(&node, RejectionCode::TransactionEnded, charges, End::Held).await;
    // Its connection is in order again, or gone.
    let next = bank.node(bank.layer(), charge_once::<DB>);
    bank.check(&next, 201, 1, End::Stored).await;
}
