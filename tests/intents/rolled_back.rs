//! Phases whose transaction SQLite rolls back without being asked.

use axum::http::StatusCode;
use sqlx::{Sqlite, SqliteConnection};
use tower_idempotency::{Idempotency, IdempotencyKey, RejectionCode, TxError};

use crate::{
    phases::{Node, Site},
    support::{app::consumer, db::Db},
};

/// Statements after which everything is rolled back.
const ROLLED_BACK: [&str; 4] = [
    "INSERT OR ROLLBACK INTO once VALUES (1)",
    "INSERT INTO guarded VALUES (1)",
    "ROLLBACK",
    "ROLLBACK; BEGIN; SELECT 1; COMMIT",
];

/// A node whose handler has a phase that writes, sends the statement, and goes on with the next.
async fn node(site: &Site<Sqlite>, [statement, next]: [&'static str; 2], passes: bool) -> Node {
    let handler = move |idempotency: Idempotency| async move {
        let step = async |tx: &mut SqliteConnection| {
            Sqlite::run(tx, "INSERT INTO steps VALUES ('before')").await?;
            let sent = Sqlite::run(tx, statement).await;
            if !passes {
                sent?;
            }
            Ok::<_, TxError>(Sqlite::run(tx, next).await?)
        };
        idempotency.phase("step", step).await?;
        Ok::<_, TxError>(StatusCode::CREATED)
    };
    let node = site.node(handler);
    node.handle.evict(&consumer(), &IdempotencyKey::new("key").unwrap()).await.unwrap();
    node
}

async fn site() -> Site<Sqlite> {
    let site = Site::<Sqlite>::open().await;
    site.run(
        "CREATE TABLE once (n INTEGER PRIMARY KEY); INSERT INTO once VALUES (1);
        CREATE TABLE guarded (n INTEGER);
        CREATE TRIGGER guard BEFORE INSERT ON guarded BEGIN SELECT RAISE(ROLLBACK, 'told to'); END",
    )
    .await;
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_that_is_rolled_back_is_not_finished_and_holds_no_key() {
    let site = site().await;
    for statement in ROLLED_BACK {
        for passes in [false, true] {
            let node = node(&site, [statement, "SELECT 1"], passes).await;
            for _ in 0..2 {
                node.send_after_end().await.assert_refused(RejectionCode::TransactionFailed);
                assert_eq!(site.all_steps().await, 0, "{statement}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_phase_writes_after_a_rollback_that_it_missed_holds_the_key() {
    for statement in ROLLED_BACK {
        let site = site().await;
        let node = node(&site, [statement, "INSERT INTO steps VALUES ('after')"], true).await;
        node.send().await.assert_refused(RejectionCode::TransactionEnded);
        node.send_after_end().await.assert_refused(RejectionCode::OutcomeUnknown);
        assert_eq!((site.steps("before").await, site.steps("after").await), (0, 1), "{statement}");
    }
}
