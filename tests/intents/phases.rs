//! Recovery points: steps of local work that a later attempt skips.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    Router,
    handler::Handler,
    http::{Extensions, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use sqlx::{Connection, Pool, Sqlite};
use tokio::time::{sleep, timeout};
use tower_http::timeout::TimeoutLayer;
use tower_idempotency::{
    Idempotency, IdempotencyHandle, IdempotencyKey, IdempotencyLayer, RejectionCode, Resource,
    TransactionOptions, Tx, TxError, store::Store,
};

use crate::records_alone::RecordsAlone;
use crate::support::{
    app::consumer,
    db::Db,
    direct::{self, Answer},
    served::Count,
};

/// A database with a table of the steps that were done.
pub(crate) struct Site<DB: Db> {
    home: DB::Home,
    pool: Pool<DB>,
    pub(crate) store: Arc<dyn Store>,
}

/// A handler behind a layer.
pub(crate) struct Node {
    pub(crate) router: Router,
    pub(crate) handle: IdempotencyHandle,
}

impl<DB: Db> Site<DB> {
    pub(crate) async fn open() -> Self {
        let home = DB::home().await;
        let pool = DB::pool(&home, 4);
        let site = Self { store: DB::store(&pool), home, pool };
        site.run("CREATE TABLE steps (name TEXT NOT NULL)").await;
        site
    }

    pub(crate) async fn watch(&self) -> sqlx::pool::PoolConnection<DB> {
        DB::pool(&self.home, 1).acquire().await.unwrap()
    }

    pub(crate) async fn steps(&self, name: &str) -> i64 {
        let count = format!("SELECT count(*) FROM steps WHERE name = '{name}'");
        DB::number(&mut *self.watch().await, &count).await.unwrap()
    }

    pub(crate) async fn all_steps(&self) -> i64 {
        DB::number(&mut *self.watch().await, "SELECT count(*) FROM steps").await.unwrap()
    }

    pub(crate) async fn run(&self, sql: &str) {
        DB::run(&mut *self.watch().await, sql).await.unwrap();
    }

    pub(crate) fn node<T: 'static>(&self, handler: impl Handler<T, ()>) -> Node {
        self.node_with(handler, |layer| layer)
    }

    /// A node of another process.
    pub(crate) fn another_node_with<T: 'static>(
        &self,
        handler: impl Handler<T, ()>,
        set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Node {
        let layer = set(IdempotencyLayer::new(DB::store(&DB::pool(&self.home, 4))));
        let handle = layer.handle();
        Node { router: Router::new().route("/charges", post(handler)).layer(layer), handle }
    }

    pub(crate) fn node_with<T: 'static>(
        &self,
        handler: impl Handler<T, ()>,
        set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Node {
        let layer = set(IdempotencyLayer::new(Arc::clone(&self.store)));
        let handle = layer.handle();
        Node { router: Router::new().route("/charges", post(handler)).layer(layer), handle }
    }
}

impl Node {
    pub(crate) async fn send(&self) -> Answer {
        let sent = direct::send(&self.router, direct::charge("key"));
        timeout(Duration::from_secs(30), sent).await.expect("an answer")
    }

    /// Sends until the end of the attempt before is written down.
    pub(crate) async fn send_after_end(&self) -> Answer {
        loop {
            let answer = self.send().await;
            if answer.rejection != Some(RejectionCode::InProgress) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn done<DB: Db>(tx: &mut DB::Connection, name: &str) -> Result<(), TxError> {
    Ok(DB::run(tx, &format!("INSERT INTO steps VALUES ('{name}')")).await?)
}

macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$test($crate::phases::Site::<sqlx::Sqlite>::open().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs PostgreSQL: run scripts/test"]
            async fn postgres() {
                super::$test($crate::phases::Site::<sqlx::Postgres>::open().await).await;
            }
        }
    )*};
}
pub(crate) use on_both_stores;

on_both_stores!(
    a_later_attempt_skips_what_is_finished,
    a_failed_phase_is_rolled_back_and_runs_again,
    a_phase_that_panics_or_is_dropped_is_rolled_back,
    a_name_is_used_once_in_an_attempt,
    whatever_would_wait_for_itself_is_refused_at_once,
    a_result_that_cannot_be_stored_or_read_runs_nothing_twice,
    a_phase_that_ends_its_transaction_holds_the_key,
    a_phase_may_fail_with_an_error_of_the_application,
    an_attempt_that_has_lost_its_record_finishes_nothing,
    a_phase_keeps_the_record_while_it_is_open_and_renews_its_lease,
);

async fn a_later_attempt_skips_what_is_finished<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |idempotency: Idempotency, extensions: Extensions| {
        let run = counter.add();
        async move {
            let first: (i64, String) = idempotency
                .phase("first", async |tx: &mut DB::Connection| {
                    done::<DB>(tx, "first").await?;
                    Ok::<_, TxError>((7, "seven".to_owned()))
                })
                .await?;
            let transfer = idempotency.intent("transfer").call(async |_| Ok(Resource::new("tr_1"))).await?;
            idempotency
                .phase("second", async |tx: &mut DB::Connection| done::<DB>(tx, "second").await)
                .await?;
            if run < 3 {
                return Ok(StatusCode::INTERNAL_SERVER_ERROR.into_response());
            }
            let mut tx = Tx::<DB>::begin(&extensions).await?;
            done::<DB>(&mut tx, "last").await?;
            let body = format!("{first:?} {} {}", transfer.id, idempotency.attempt_number());
            Ok::<_, TxError>((StatusCode::CREATED, body).into_response())
        }
    };
    let node = site.node(handler);
    for _ in 0..2 {
        assert_eq!(node.send().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
    let first = node.send().await;
    assert_eq!((first.status, &first.body[..]), (StatusCode::CREATED, &b"(7, \"seven\") tr_1 3"[..]));
    first.assert_same_replay(&node.send().await);
    assert_eq!(runs.get(), 3);
    for step in ["first", "second", "last"] {
        assert_eq!(site.steps(step).await, 1, "{step}");
    }
}

async fn a_failed_phase_is_rolled_back_and_runs_again<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        async move {
            let step = async |tx: &mut DB::Connection| {
                done::<DB>(tx, "step").await?;
                match run {
                    1 => DB::run(tx, "SELECT * FROM missing").await.map_err(TxError::from),
                    _ => Ok(()),
                }
            };
            idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
        }
    };
    let node = site.node(handler);
    node.send().await.assert_refused(RejectionCode::TransactionFailed);
    assert_eq!(site.steps("step").await, 0);
    assert_eq!(node.send_after_end().await.status, StatusCode::CREATED);
    assert_eq!(site.steps("step").await, 1);
}

async fn a_phase_that_panics_or_is_dropped_is_rolled_back<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        async move {
            let step = async |tx: &mut DB::Connection| {
                done::<DB>(tx, "step").await?;
                match run {
                    1 => panic!("told to"),
                    2 => sleep(Duration::from_secs(60)).await,
                    _ => {}
                }
                Ok::<_, TxError>(())
            };
            idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
        }
    };
    let layer = IdempotencyLayer::new(Arc::clone(&site.store));
    let inside = TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, Duration::from_millis(500));
    let router = Router::new().route("/charges", post(handler)).layer(inside).layer(layer.clone());
    let node = Node { router, handle: layer.handle() };
    node.send().await.assert_refused(RejectionCode::HandlerPanicked);
    assert_eq!(node.send_after_end().await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(node.send_after_end().await.status, StatusCode::CREATED);
    assert_eq!(site.steps("step").await, 1);
}

async fn a_name_is_used_once_in_an_attempt<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        idempotency.phase("step", async |tx: &mut DB::Connection| done::<DB>(tx, "step").await).await?;
        idempotency.phase("step", async |tx: &mut DB::Connection| done::<DB>(tx, "step").await).await?;
        Ok::<_, TxError>(StatusCode::CREATED)
    };
    let node = site.node(handler);
    for _ in 0..2 {
        node.send_after_end().await.assert_refused(RejectionCode::IntentMisused);
    }
    assert_eq!(site.steps("step").await, 1);
    let named = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| done::<DB>(tx, "unnamed").await;
        idempotency.phase("", step).await.map(|()| StatusCode::CREATED)
    };
    let node = site.node(named);
    node.handle.evict(&consumer(), &IdempotencyKey::new("key").unwrap()).await.unwrap();
    node.send().await.assert_refused(RejectionCode::IntentMisused);
    assert_eq!(site.steps("unnamed").await, 0);
}

/// Each of these would wait for the lock that its own request has on the record.
async fn whatever_would_wait_for_itself_is_refused_at_once<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency, extensions: Extensions| {
        let inside = async |tx: &mut DB::Connection| {
            let phase = idempotency.phase("inner", async |tx: &mut DB::Connection| done::<DB>(tx, "x").await);
            let intent = idempotency.intent("call").call(async |_| Ok(Resource::new("never")));
            let codes = [
                phase.await.unwrap_err().code(),
                intent.await.unwrap_err().code(),
                Tx::<DB>::begin(&extensions).await.unwrap_err().code(),
            ];
            assert_eq!(codes, [RejectionCode::IntentMisused; 3]);
            done::<DB>(tx, "outer").await
        };
        idempotency.phase("outer", inside).await?;
        drop(Tx::<DB>::begin(&extensions).await?);
        let phase = idempotency.phase("late", async |tx: &mut DB::Connection| done::<DB>(tx, "x").await);
        assert_eq!(phase.await.unwrap_err().code(), RejectionCode::IntentMisused);
        let intent = idempotency.intent("late").call(async |_| Ok(Resource::new("never"))).await;
        assert_eq!(intent.unwrap_err().code(), RejectionCode::IntentMisused);
        Ok::<_, TxError>(StatusCode::CREATED)
    };
    let node = site.node(handler);
    let answer = timeout(Duration::from_secs(2), node.send()).await.expect("nothing waits");
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    assert_eq!((site.steps("outer").await, site.steps("x").await), (1, 0));
}

async fn a_result_that_cannot_be_stored_or_read_runs_nothing_twice<DB: Db>(site: Site<DB>) {
    let unstorable = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            done::<DB>(tx, "unstorable").await?;
            Ok::<_, TxError>(HashMap::from([((1, 2), 3)]))
        };
        idempotency.phase("unstorable", step).await.map(|_| StatusCode::CREATED)
    };
    let node = site.node(unstorable);
    node.send().await.assert_refused(RejectionCode::IntentMisused);
    assert_eq!(site.steps("unstorable").await, 0);

    let first = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            done::<DB>(tx, "step").await?;
            Ok::<_, TxError>("seven".to_owned())
        };
        idempotency.phase("step", step).await?;
        Ok::<_, TxError>(StatusCode::INTERNAL_SERVER_ERROR)
    };
    let other_version = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            done::<DB>(tx, "step").await?;
            Ok::<_, TxError>(7)
        };
        idempotency.phase("step", step).await.map(|_: i32| StatusCode::CREATED)
    };
    assert_eq!(site.node(first).send_after_end().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    site.node(other_version).send_after_end().await.assert_refused(RejectionCode::IntentMisused);
    assert_eq!(site.steps("step").await, 1);
}

async fn a_phase_that_ends_its_transaction_holds_the_key<DB: Db>(site: Site<DB>) {
    for (step, fails) in [("commits", false), ("commits_and_fails", true)] {
        let handler = move |idempotency: Idempotency| async move {
            let step = async |tx: &mut DB::Connection| {
                done::<DB>(tx, step).await?;
                DB::run(tx, "COMMIT").await?;
                if fails { DB::run(tx, "SELECT * FROM missing").await.map_err(TxError::from) } else { Ok(()) }
            };
            let _ = idempotency.phase("step", step).await;
            StatusCode::CREATED
        };
        let node = site.node(handler);
        node.handle.evict(&consumer(), &IdempotencyKey::new("key").unwrap()).await.unwrap();
        node.send().await.assert_refused(RejectionCode::TransactionEnded);
        node.send_after_end().await.assert_refused(RejectionCode::OutcomeUnknown);
        assert_eq!(site.steps(step).await, 1);
    }
}

/// An application's own error.
#[derive(Debug)]
enum AppError {
    NotEnough,
    Database(TxError),
}

impl From<TxError> for AppError {
    fn from(error: TxError) -> Self {
        Self::Database(error)
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        match self {
            Self::NotEnough => StatusCode::PAYMENT_REQUIRED.into_response(),
            Self::Database(error) => error.into_response(),
        }
    }
}

async fn a_phase_may_fail_with_an_error_of_the_application<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            done::<DB>(tx, "step").await?;
            Err::<(), _>(AppError::NotEnough)
        };
        idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
    };
    let node = site.node(handler);
    let first = node.send().await;
    assert_eq!(first.status, StatusCode::PAYMENT_REQUIRED);
    first.assert_same_replay(&node.send().await);
    assert_eq!(site.steps("step").await, 0);
}

async fn an_attempt_that_has_lost_its_record_finishes_nothing<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency, extensions: Extensions| {
        let handle = extensions.get::<IdempotencyHandle>().unwrap();
        handle.evict(idempotency.consumer(), idempotency.key()).await.unwrap();
        let step = async |tx: &mut DB::Connection| done::<DB>(tx, "step").await;
        idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
    };
    let mut node = site.node(handler);
    node.router = node.router.layer(axum::Extension(node.handle.clone()));
    node.send().await.assert_refused(RejectionCode::TransactionLost);
    assert_eq!(site.steps("step").await, 0);
}

async fn a_phase_keeps_the_record_while_it_is_open_and_renews_its_lease<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            done::<DB>(tx, "step").await?;
            sleep(Duration::from_millis(1500)).await;
            Ok::<_, TxError>(())
        };
        idempotency.phase("step", step).await?;
        idempotency.intent("call").call(async |_| Ok(Resource::new("made"))).await?;
        Ok::<_, TxError>(StatusCode::CREATED)
    };
    let options = TransactionOptions::default()
        .with_time_limit(Duration::from_secs(5))
        .with_idle_timeout(Duration::from_secs(5));
    let node = site
        .node_with(handler, |layer| layer.with_lease(Duration::from_millis(1000)).with_transactions(options));
    let router = node.router.clone();
    let running = tokio::spawn(async move { direct::send(&router, direct::charge("key")).await });
    let key = IdempotencyKey::new("key").unwrap();
    while node.handle.get(&consumer(), &key).await.unwrap().is_none() {
        sleep(Duration::from_millis(10)).await;
    }
    while !running.is_finished() {
        // Another process, which does not know what this one is running.
        let other = site.node(async |_: Idempotency| StatusCode::CREATED).send().await;
        assert!(other.rejection.is_some() || other.is_replay(), "{other:?}");
        sleep(Duration::from_millis(50)).await;
    }
    let answer = running.await.unwrap();
    assert_eq!((answer.status, answer.is_replay()), (StatusCode::CREATED, false), "{answer:?}");
    assert_eq!(site.steps("step").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_that_is_open_for_too_long_is_rolled_back_on_sqlite() {
    let site = Site::<Sqlite>::open().await;
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        async move {
            let step = async |tx: &mut <Sqlite as sqlx::Database>::Connection| {
                done::<Sqlite>(tx, "step").await?;
                sleep(Duration::from_secs(if run == 1 { 60 } else { 0 })).await;
                Ok::<_, TxError>(())
            };
            idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
        }
    };
    let options = TransactionOptions::default().with_time_limit(Duration::from_millis(300));
    let node = site.node_with(handler, |layer| layer.with_transactions(options));
    node.send().await.assert_refused(RejectionCode::TransactionLost);
    assert_eq!(node.send_after_end().await.status, StatusCode::CREATED);
    assert_eq!(site.steps("step").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_savepoint_of_the_step_is_its_own_affair() {
    let site = Site::<Sqlite>::open().await;
    let handler = async |idempotency: Idempotency| {
        let step = async |tx: &mut <Sqlite as sqlx::Database>::Connection| {
            let mut inner = tx.begin().await?;
            done::<Sqlite>(&mut inner, "undone").await?;
            inner.rollback().await?;
            done::<Sqlite>(tx, "done").await
        };
        idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
    };
    assert_eq!(site.node(handler).send().await.status, StatusCode::CREATED);
    assert_eq!((site.steps("undone").await, site.steps("done").await), (0, 1));
    assert!(site.pool.acquire().await.is_ok());
}

#[tokio::test]
async fn a_store_without_recovery_says_so() {
    let handler = async |idempotency: Idempotency| {
        let made = idempotency.intent("call").call(async |_| Ok(Resource::new("never"))).await;
        made.map(|_| StatusCode::CREATED)
    };
    let app: Router =
        Router::new().route("/charges", post(handler)).layer(IdempotencyLayer::new(RecordsAlone::default()));
    direct::send(&app, direct::charge("key")).await.assert_refused(RejectionCode::StoreMisconfigured);
}
