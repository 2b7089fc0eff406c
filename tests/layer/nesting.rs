//! Several layers around one handler.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{HeaderName, StatusCode},
    routing::post,
};
use tower_idempotency::{
    Consumer, ConsumerExtractor, Fingerprinter, Idempotency, IdempotencyLayer, IntentLog, MemoryStore,
    RejectionCode,
    jobs::LogOutcome,
    store::{IntoStore, RecordFilter, Store},
};
use tracing::instrument::WithSubscriber;

use crate::support::{
    direct::{Answer, charge, send, waiting, with_store},
    log::Log,
    schema::Schema,
    served::{Count, layer},
    sqlite::SqliteFile,
};

const WARNING: &str = "an IdempotencyLayer around this one has the same table";

fn counted(runs: &Count) -> Router {
    let runs = runs.clone();
    let handler = move || async move { (StatusCode::CREATED, format!("run {}", runs.add())) };
    Router::new().route("/charges", post(handler))
}

async fn in_time(app: &Router, request: Request) -> Answer {
    let answer = tokio::time::timeout(Duration::from_secs(30), send(app, request)).await;
    answer.expect("no layer waits for another")
}

/// Sends a request and a retry, and sees one run.
async fn assert_one_run(app: &Router, runs: &Count, name: &str) {
    let before = runs.get();
    let first = in_time(app, charge("k")).await;
    assert_eq!((first.status, first.is_replay()), (StatusCode::CREATED, false), "{name}: {first:?}");
    assert!(in_time(app, charge("k")).await.is_replay(), "{name}");
    assert_eq!(runs.get(), before + 1, "{name}");
}

#[tokio::test]
async fn two_layers_over_one_table_run_the_handler_once_and_warn_once() {
    let (log, runs) = (Log::default(), Count::default());
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let over = || IdempotencyLayer::new(Arc::clone(&store));
    let app = counted(&runs).layer(over()).layer(over());
    let work = async {
        assert_one_run(&app, &runs, "two").await;
        assert_eq!(in_time(&app, charge("other")).await.status, StatusCode::CREATED);
    };
    work.with_subscriber(log.subscriber()).await;
    assert_eq!(log.lines(&[WARNING]).len(), 1, "{:?}", log.lines(&[]));
}

#[tokio::test]
async fn layers_over_one_table_with_other_settings_run_the_handler_once() {
    let (store, outer) = with_store();
    let over = || IdempotencyLayer::new(Arc::clone(&store));
    let shared = |name| ConsumerExtractor::shared(Consumer::new(name).unwrap());
    let inner: [(&str, IdempotencyLayer); 7] = [
        ("plain", over()),
        ("a clone", outer.clone()),
        ("required", over().required()),
        ("another fingerprint", over().with_fingerprint(Fingerprinter::default().keyed(1, "secret"))),
        ("another header", over().with_key_header(HeaderName::from_static("x-token"))),
        ("another consumer", over().with_consumer(shared("inner"))),
        ("one place", over().with_max_in_flight(1)),
    ];
    for (name, inner) in inner {
        let runs = Count::default();
        let inner = if name == "another consumer" { inner } else { inner.with_consumer(shared(name)) };
        let app = counted(&runs).layer(inner).layer(outer.clone().with_consumer(shared(name)));
        assert_one_run(&app, &runs, name).await;
    }
}

#[tokio::test]
async fn three_layers_of_which_two_share_a_table_run_the_handler_once() {
    let (store, own) = with_store();
    let runs = Count::default();
    for (name, inner) in [("a clone", own.clone()), ("its own", IdempotencyLayer::new(Arc::clone(&store)))] {
        let shared = ConsumerExtractor::shared(Consumer::new(name).unwrap());
        let app = counted(&runs).layer(inner.with_consumer(shared.clone()));
        let app = app.layer(layer()).layer(own.clone().with_consumer(shared));
        assert_one_run(&app, &runs, name).await;
    }
}

#[tokio::test]
async fn a_layer_over_another_table_guards_inside_of_the_outer_one() {
    let (log, runs) = (Log::default(), Count::default());
    let inner = layer();
    let handle = inner.handle();
    let app = counted(&runs).layer(inner).layer(layer());
    assert_one_run(&app, &runs, "two tables").with_subscriber(log.subscriber()).await;
    assert_eq!(handle.list(RecordFilter::Completed, 9).await.unwrap().len(), 1);
    assert!(log.lines(&[WARNING]).is_empty());
}

#[tokio::test]
async fn a_nested_router_with_a_layer_of_its_own_runs_once() {
    let (store, outer) = with_store();
    let runs = Count::default();
    let nested = counted(&runs).layer(IdempotencyLayer::new(store));
    let app = Router::new().nest("/v1", nested).layer(outer);
    let pay = || {
        let mut request = charge("k");
        *request.uri_mut() = "/v1/charges".parse().unwrap();
        request
    };
    assert_eq!(in_time(&app, pay()).await.body, "run 1");
    assert!(in_time(&app, pay()).await.is_replay());
}

#[tokio::test]
async fn without_a_free_place_the_inner_layer_passes_what_the_outer_one_guards() {
    let (store, outer) = with_store();
    let (app, runs) =
        waiting(IdempotencyLayer::new(Arc::clone(&store)).with_max_in_flight(1), Duration::from_millis(300));
    // One place of the inner layer is taken by a request that only it guards.
    let busy = crate::support::direct::begin(&app, charge("busy"), &runs).await;
    let guarded = app.clone().layer(outer);
    assert_eq!(in_time(&guarded, charge("k")).await.status, StatusCode::OK);
    busy.await.unwrap();
}

#[tokio::test]
async fn two_pools_of_one_sqlite_file_run_once() {
    let file = SqliteFile::new();
    two_stores_of_one_database_run_once(file.store(), file.store()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn two_pools_of_one_postgres_schema_run_once() {
    let schema = Schema::create().await;
    two_stores_of_one_database_run_once(schema.store(), schema.store()).await;
}

async fn two_stores_of_one_database_run_once(outer: impl IntoStore, inner: impl IntoStore) {
    let runs = Count::default();
    let app = counted(&runs).layer(IdempotencyLayer::new(inner)).layer(IdempotencyLayer::new(outer));
    assert_one_run(&app, &runs, "two pools").await;
}

#[tokio::test]
async fn a_log_inside_is_told_that_its_key_is_the_requests_own() {
    let (store, outer) = with_store();
    let log = IntentLog::new(store);
    let handler = move |idempotency: Idempotency| async move {
        let outcome = log.attempt(idempotency.consumer(), idempotency.key(), "payout").await;
        assert!(matches!(outcome, Ok(LogOutcome::OtherArguments)), "{outcome:?}");
    };
    let app = Router::new().route("/charges", post(handler)).layer(outer);
    assert_eq!(in_time(&app, charge("k")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_duplicate_of_a_request_that_two_layers_guard_is_refused() {
    let (store, outer) = with_store();
    let (app, runs) = waiting(IdempotencyLayer::new(store), Duration::from_millis(300));
    let app = app.layer(outer);
    let first = crate::support::direct::begin(&app, charge("k"), &runs).await;
    in_time(&app, charge("k")).await.assert_refused(RejectionCode::InProgress);
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert_eq!(runs.get(), 1);
}
