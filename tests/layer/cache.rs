//! Replays that follow each other closely are answered without the store, and never past the moment at which its
//! answer might be another.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::{
    Consumer, IdempotencyLayer, MemoryStore, PostgresStore, Reaper, RejectionCode, ReplayCache,
};

use crate::support::{
    app::{App, layer as app_layer},
    asked::Asked,
    direct::{charge, counting, identity, request, send},
    log::Log,
    postgres::Postgres,
    proxy::{Fault, Proxy},
};

fn on_memory() -> (Asked, IdempotencyLayer) {
    let store = Asked::new(MemoryStore::new());
    (store.clone(), IdempotencyLayer::new(store).with_reaper(Reaper::off()))
}

#[tokio::test]
async fn retries_after_the_first_do_not_ask_the_store() {
    let (store, layer) = on_memory();
    let (app, runs) = counting(layer);
    let (log, _guard) = Log::listen();
    let first = send(&app, charge("k")).await;
    for _ in 0..5 {
        first.assert_same_replay(&send(&app, charge("k")).await);
    }
    assert_eq!((store.claims(), runs.get()), (2, 1));
    assert_eq!(log.lines(&["INFO", "replay", "status=201", "age="]).len(), 5);
}

#[tokio::test]
async fn a_cache_that_is_off_asks_the_store_each_time() {
    let (store, layer) = on_memory();
    let handle_of_before = layer.handle();
    let (app, _) = counting(layer.clone());
    for _ in 0..2 {
        send(&app, charge("k")).await;
    }
    // The layer, its clones and what was made of them before have one cache.
    let (other, _) = counting(layer.with_replay_cache(ReplayCache::off()));
    for app in [&app, &other, &app] {
        assert!(send(app, charge("k")).await.is_replay());
    }
    assert_eq!(store.claims(), 5);
    drop(handle_of_before);
}

#[tokio::test]
async fn a_cached_record_answers_its_own_request_and_consumer_alone() {
    let (store, layer) = on_memory();
    let (app, runs) = counting(layer);
    for _ in 0..2 {
        send(&app, charge("k")).await;
    }
    let other = send(&app, request(http::Method::POST, Some("k"), "1")).await;
    other.assert_refused(RejectionCode::KeyReused);
    assert_eq!(store.claims(), 2);
    let mut of_another = charge("k");
    of_another.extensions_mut().insert(Consumer::new("another").unwrap());
    assert!(!send(&app, of_another).await.is_replay());
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn an_eviction_with_a_handle_of_the_layer_is_seen_immediately() {
    let (_, layer) = on_memory();
    let (handle, (consumer, key)) = (layer.handle(), identity());
    let (app, runs) = counting(layer);
    for round in 1..=3 {
        assert!(!send(&app, charge("k")).await.is_replay());
        assert!(send(&app, charge("k")).await.is_replay() && send(&app, charge("k")).await.is_replay());
        assert_eq!(runs.get(), round);
        assert!(handle.evict(&consumer, &key).await.unwrap());
    }
}

#[tokio::test]
async fn an_eviction_is_seen_by_retries_that_look_while_it_is_made() {
    let (store, layer) = on_memory();
    let (handle, (consumer, key)) = (layer.handle(), identity());
    let (app, runs) = counting(layer);
    send(&app, charge("k")).await;
    store.hold_answers(true);
    let before = crate::support::direct::start(&app, charge("k"));
    store.until_claims(2).await;
    assert!(handle.evict(&consumer, &key).await.unwrap());
    // It is sent after the eviction: what the one before it learns does not answer it.
    let after = crate::support::direct::start(&app, charge("k"));
    store.until_claims(3).await;
    store.hold_answers(false);
    assert!(before.await.unwrap().is_replay());
    assert!(!after.await.unwrap().is_replay());
    assert_eq!(runs.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_eviction_at_another_node_is_seen_after_the_time_to_live() {
    let store = Asked::new(MemoryStore::new());
    let node = || IdempotencyLayer::new(store.clone()).with_reaper(Reaper::off());
    let (app, runs) = counting(node().with_replay_cache(
        ReplayCache::default().with_time_to_live(Duration::from_secs(2)).with_max_bytes(1024 * 1024),
    ));
    for _ in 0..2 {
        send(&app, charge("k")).await;
    }
    let (consumer, key) = identity();
    assert!(node().handle().evict(&consumer, &key).await.unwrap());
    tokio::time::advance(Duration::from_millis(1900)).await;
    assert!(send(&app, charge("k")).await.is_replay());
    tokio::time::advance(Duration::from_millis(100)).await;
    assert!(!send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn a_record_that_expires_soon_is_not_cached() {
    let (store, layer) = on_memory();
    let minute = Duration::from_secs(60);
    let layer = layer.with_max_execution(minute).with_retention(5 * minute);
    let (app, _) = counting(layer);
    for asked in 1..=4 {
        send(&app, charge("k")).await;
        assert_eq!(store.claims(), asked);
    }
}

#[tokio::test]
async fn a_call_that_cannot_reach_the_store_empties_the_cache() {
    let (store, layer) = on_memory();
    let (app, runs) = counting(layer);
    for _ in 0..3 {
        send(&app, charge("k")).await;
    }
    let (consumer, key) = identity();
    // As a failover does that loses what was written last.
    store.behind().evict(&consumer, &key).await.unwrap();
    assert!(send(&app, charge("k")).await.is_replay());
    store.fail_next(1);
    send(&app, charge("another")).await.assert_refused(RejectionCode::StoreUnavailable);
    assert!(!send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 2);
}

/// The connections break while nothing is under way. The next call notices it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_that_lost_records_in_its_outage_is_asked_again() {
    let database = Postgres::start();
    let proxy = Proxy::start(database.address());
    let store = |url: &str| {
        let options = sqlx::postgres::PgPoolOptions::new().max_connections(4);
        PostgresStore::new(options.connect_lazy(url).unwrap())
    };
    let endless = ReplayCache::default().with_time_to_live(Duration::from_secs(600));
    let node = app_layer(store(&database.url_through(proxy.address())))
        .with_reaper(Reaper::off())
        .with_store_timeout(Duration::from_millis(500))
        .with_replay_cache(endless);
    let app = App::new(node);
    let first = app.send("key").await;
    assert!(first.is_first(), "{first:?}");
    assert!(app.send("key").await.is_replay());
    let neighbour = app.beside(app_layer(store(&database.url())).with_reaper(Reaper::off()));
    let key = tower_idempotency::IdempotencyKey::new("key").unwrap();
    neighbour.handle.evict(&crate::support::app::consumer(), &key).await.unwrap();
    proxy.set(Fault::HoldReplies);
    assert!(app.send("key").await.is_replay());
    assert_eq!(app.send("other").await.status, StatusCode::SERVICE_UNAVAILABLE);
    proxy.set(Fault::None);
    let answer =
        crate::support::app::send_until_not(&["store-unavailable", "in-progress"], || app.send("key")).await;
    assert!(answer.is_first() && answer.body != first.body, "{answer:?}");
}
