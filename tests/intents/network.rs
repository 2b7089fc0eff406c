//! Intents and phases whose statements, or the replies to them, are lost on the way to PostgreSQL.

use std::{sync::Arc, time::Duration};

use axum::{Router, http::StatusCode, routing::post};
use sqlx::{PgConnection, PgPool, postgres::PgPoolOptions};
use tokio::{task::JoinHandle, time::sleep};
use tower_idempotency::{
    Idempotency, IdempotencyHandle, IdempotencyLayer, PostgresStore, RejectionCode, Resource, TxError,
    intent::IntentFilter, store::Store,
};

use crate::support::{
    direct::{self, Answer},
    postgres::Postgres as Server,
    proxy::{Fault, Proxy},
    served::Count,
};

/// A server, the network before it, and a node whose handler runs one phase and makes one call.
struct Remote {
    _server: Server,
    proxy: Proxy,
    direct: PgPool,
    router: Router,
    handle: IdempotencyHandle,
    /// Behind the network.
    store: Arc<dyn Store>,
    calls: Count,
}

impl Remote {
    async fn start() -> Self {
        let server = Server::start();
        let proxy = Proxy::start(server.address());
        let direct = PgPoolOptions::new().max_connections(2).connect_lazy(&server.url()).unwrap();
        sqlx::raw_sql("CREATE TABLE steps (name text NOT NULL)").execute(&direct).await.unwrap();
        let pool = PgPoolOptions::new().connect_lazy(&server.url_through(proxy.address())).unwrap();
        let store = PostgresStore::new(pool).with_statement_timeout(Duration::from_secs(1));
        let layer = IdempotencyLayer::new(store)
            .with_lease(Duration::from_secs(4))
            .with_store_timeout(Duration::from_secs(2));
        let calls = Count::default();
        let counter = calls.clone();
        let handler = async move |idempotency: Idempotency| {
            let step = async |tx: &mut PgConnection| {
                sqlx::query("INSERT INTO steps VALUES ('step')").execute(tx).await?;
                Ok::<_, TxError>(())
            };
            idempotency.phase("step", step).await?;
            let call = async |_| {
                counter.add();
                Ok(Resource::new(RESOURCE))
            };
            let made = idempotency.intent(INTENT).call(call).await?;
            Ok::<_, TxError>((StatusCode::CREATED, made.id))
        };
        let handle = layer.handle();
        let router = Router::new().route("/charges", post(handler)).layer(layer);
        let store: Arc<dyn Store> = Arc::new(PostgresStore::new(direct.clone()));
        let remote = Self { _server: server, proxy, direct, router, handle, store, calls };
        assert_eq!(remote.send("warm").await.status, StatusCode::CREATED);
        remote
    }

    fn start_request(&self, key: &str) -> JoinHandle<Answer> {
        let (router, key) = (self.router.clone(), key.to_owned());
        tokio::spawn(async move { direct::send(&router, direct::charge(&key)).await })
    }

    async fn send(&self, key: &str) -> Answer {
        self.start_request(key).await.unwrap()
    }

    /// Sends until the request is performed, or its response is there.
    async fn send_until_created(&self, key: &str) -> Answer {
        for _ in 0..300 {
            let answer = self.send(key).await;
            if answer.status == StatusCode::CREATED {
                return answer;
            }
            assert!(answer.status != StatusCode::INTERNAL_SERVER_ERROR, "{answer:?}");
            sleep(Duration::from_millis(100)).await;
        }
        panic!("not performed in 30 s");
    }

    /// Loses what is under way on connections that the fault has struck.
    async fn strike(&self) {
        self.proxy.until(|counts| counts.withheld > 0).await;
        self.proxy.cut();
        self.proxy.until(|counts| counts.withheld == 0).await;
        self.proxy.set(Fault::None);
    }

    async fn steps(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM steps").fetch_one(&self.direct).await.unwrap()
    }

    async fn open_intents(&self) -> usize {
        let recovery = self.store.recovery().unwrap();
        recovery.list_intents(IntentFilter::Open, 10).await.unwrap().len()
    }

    async fn until_no_intent_is_open(&self) {
        for _ in 0..300 {
            if self.open_intents().await == 0 {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("an intent is open after 30 s");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_phase_whose_commit_has_no_reply_is_found_out() {
    let remote = Remote::start().await;
    for (key, fault) in
        [("reply", Fault::HoldRepliesFrom(b"COMMIT")), ("request", Fault::HoldRequestsFrom(b"COMMIT"))]
    {
        let before = (remote.steps().await, remote.calls.get());
        remote.proxy.set(fault);
        let first = remote.start_request(key);
        remote.strike().await;
        let first = first.await.unwrap();
        if first.status != StatusCode::CREATED {
            assert_eq!(first.rejection, Some(RejectionCode::TransactionLost), "{first:?}");
            assert_eq!(remote.steps().await, before.0);
        }
        remote.send_until_created(key).await;
        assert_eq!((remote.steps().await, remote.calls.get()), (before.0 + 1, before.1 + 1), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn an_intent_whose_opening_has_no_reply_is_not_called_and_withdrawn() {
    let remote = Remote::start().await;
    for (key, fault) in [
        ("reply", Fault::HoldRepliesFrom(INTENT_IN_SQL)),
        ("request", Fault::HoldRequestsFrom(INTENT_IN_SQL)),
    ] {
        let before = remote.calls.get();
        remote.proxy.set(fault);
        remote.send(key).await.assert_refused(RejectionCode::StoreUnavailable);
        assert_eq!(remote.calls.get(), before);
        remote.proxy.set(Fault::None);
        // It does not hold the key.
        remote.send_until_created(key).await;
        assert_eq!(remote.calls.get(), before + 1, "{key}");
        assert_eq!(remote.open_intents().await, 0, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_call_that_cannot_be_recorded_yet_is_recorded_later_and_not_repeated() {
    let remote = Remote::start().await;
    for (key, fault) in [
        ("reply", Fault::HoldRepliesFrom(RESOURCE_IN_SQL)),
        ("request", Fault::HoldRequestsFrom(RESOURCE_IN_SQL)),
    ] {
        let before = remote.calls.get();
        remote.proxy.set(fault);
        let first = remote.send(key).await;
        assert_eq!((first.status, first.rejection), (StatusCode::CREATED, None), "{first:?}");
        remote.proxy.set(Fault::None);
        remote.until_no_intent_is_open().await;
        first.assert_same_replay(&remote.send(key).await);
        assert_eq!(remote.calls.get(), before + 1, "{key}");
    }
    remote.handle.drain(Duration::from_secs(30)).await.unwrap();
}

const INTENT: &str = "bank.transfer";
/// The name as the store writes it.
const INTENT_IN_SQL: &[u8] = b"62616e6b2e7472616e73666572";
const RESOURCE: &str = "tr_1";
const RESOURCE_IN_SQL: &[u8] = b"74725f31";
