//! A store that is gone, loses replies or hangs, before a claim and between a handler and its completion.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use tower_idempotency::{
    IdempotencyLayer, MemoryStore, PostgresStore, Reaper, ResultPolicy,
    store::{AttemptId, Record, RecordState},
};

use crate::support::{
    app::{Answer, App, at_once, layer, send_until_not},
    postgres::Postgres,
    proxy::{Fault, Proxy},
    watched::Watched,
};

/// A node, the server that keeps its records, and the network between them.
struct Node {
    app: App,
    proxy: Proxy,
    database: Postgres,
}

impl Node {
    fn start(configure: impl Fn(IdempotencyLayer) -> IdempotencyLayer) -> Self {
        let database = Postgres::start();
        let proxy = Proxy::start(database.address());
        let layer =
            configure(layer(store(&database.url_through(proxy.address()))).with_reaper(Reaper::off()));
        Self { app: App::new(layer), proxy, database }
    }

    /// A node that has performed a request already, and so has open connections.
    async fn warm(configure: impl Fn(IdempotencyLayer) -> IdempotencyLayer) -> Self {
        let node = Self::start(configure);
        node.app.handle.prepare().await.unwrap();
        assert_eq!(node.once_back("warm").await.status, 201);
        // A connection goes back to its pool a moment after its last answer.
        tokio::time::sleep(Duration::from_millis(500)).await;
        node
    }

    /// Another node, whose network is in order.
    fn neighbour(&self) -> App {
        self.app.beside(layer(store(&self.database.url())).with_reaper(Reaper::off()))
    }

    /// Sends until there is another answer than that the store cannot be reached.
    async fn once_back(&self, key: &str) -> Answer {
        send_until_not(&["store-unavailable", "in-progress"], || self.app.send(key)).await
    }

    async fn until_record(&self, key: &str, wanted: impl Fn(Option<&Record>) -> bool) {
        let neighbour = self.neighbour();
        let reached = async {
            while !wanted(neighbour.record(key).await.as_ref()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), reached).await;
        assert!(waited.is_ok(), "the record is still {:?}", neighbour.record(key).await);
    }
}

fn store(url: &str) -> PostgresStore {
    let options = sqlx::postgres::PgPoolOptions::new().max_connections(8);
    let store = PostgresStore::new(options.connect_lazy(url).unwrap());
    store.with_statement_timeout(Duration::from_secs(2))
}

fn is_completed(record: Option<&Record>) -> bool {
    record.is_some_and(|record| matches!(record.state, RecordState::Completed { .. }))
}

/// A lease that is not over before the test is: what is free before that was released.
const LONG: Duration = Duration::from_secs(100);

/// Renewals that fail must not be what gives a key back.
fn patient(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer.with_lease(LONG).with_store_timeout(Duration::from_millis(500))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn without_a_store_requests_are_refused_and_work_again_as_soon_as_it_is_back() {
    let node = Node::start(|layer| layer.with_store_timeout(Duration::from_secs(3)));
    for (round, key) in ["cold", "warm"].into_iter().enumerate() {
        node.database.stop_immediate();
        for answer in at_once(5, |_| send(&node.app, key)).await {
            answer.assert_refused("store-unavailable");
            assert_eq!((answer.status, answer.retry_after.is_some()), (503, true));
        }
        assert_eq!(node.app.runs(), round);
        node.database.start_again();
        let answer = node.app.send(key).await;
        assert!(answer.is_first(), "{answer:?}");
        let retry = node.app.send(key).await;
        assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_claim_whose_reply_came_too_late_is_released() {
    a_claim_that_nobody_waits_for_is_released(patient).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_claim_whose_reply_came_too_late_is_released_and_not_held() {
    a_claim_that_nobody_waits_for_is_released(|layer| {
        patient(layer).with_policy(ResultPolicy::at_most_once())
    })
    .await;
}

async fn a_claim_that_nobody_waits_for_is_released(configure: impl Fn(IdempotencyLayer) -> IdempotencyLayer) {
    let node = Node::warm(configure).await;
    node.proxy.set(Fault::HoldRepliesFrom(b"late"));
    node.app.send("late").await.assert_refused("store-unavailable");
    assert_eq!(node.app.runs(), 1);
    // The key is taken, and nobody knows.
    node.until_record("late", |record| record.is_some()).await;
    node.proxy.set(Fault::None);
    let answer = send_until_not(&["in-progress"], || node.app.send("late")).await;
    assert!(answer.is_first(), "{answer:?}");
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_claim_whose_reply_was_lost_runs_once_or_leaves_the_key_free() {
    let node = Node::warm(|layer| patient(layer).with_policy(ResultPolicy::at_most_once())).await;
    node.proxy.set(Fault::HoldRepliesFrom(b"lost"));
    let request = node.app.start("lost");
    node.proxy.until(|counts| counts.withheld > 0).await;
    node.until_record("lost", |record| record.is_some()).await;
    let accepted = node.proxy.counts().accepted;
    node.proxy.cut();
    // The repeated claim comes on a new connection, and its reply is kept too.
    node.proxy.until(|counts| counts.accepted > accepted).await;
    node.proxy.set(Fault::None);
    let answer = request.await.unwrap();
    assert!(answer.is_first() || answer.is_refused("store-unavailable"), "{answer:?}");
    let retry = node.once_back("lost").await;
    assert!(if answer.is_first() { retry.is_replay() } else { retry.is_first() }, "{answer:?} {retry:?}");
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_claim_whose_reply_was_lost_with_the_server_leaves_the_key_free() {
    let node = Node::warm(|layer| patient(layer).with_policy(ResultPolicy::at_most_once())).await;
    node.proxy.set(Fault::HoldRepliesFrom(b"lost"));
    let request = node.app.start("lost");
    node.proxy.until(|counts| counts.withheld > 0).await;
    node.until_record("lost", |record| record.is_some()).await;
    node.database.stop_immediate();
    node.proxy.cut();
    node.proxy.until(|counts| counts.withheld == 0).await;
    node.proxy.set(Fault::None);
    request.await.unwrap().assert_refused("store-unavailable");
    node.database.start_again();
    let answer = node.once_back("lost").await;
    assert!(answer.is_first(), "{answer:?}");
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_claim_that_a_frozen_server_performs_after_everybody_gave_up_is_released() {
    let node = Node::warm(|layer| patient(layer).with_policy(ResultPolicy::at_most_once())).await;
    node.database.pause();
    node.app.send("key").await.assert_refused("store-unavailable");
    // The store gives its connection up, the server will still find the claim on it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    node.database.resume();
    let answer = node.once_back("key").await;
    assert!(answer.is_first(), "{answer:?}");
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_response_reaches_its_client_when_the_store_is_gone_and_is_stored_later() {
    let node = Node::warm(|layer| layer.with_lease(Duration::from_secs(2))).await;
    node.app.close();
    let request = node.app.start("key");
    node.app.until_started(2).await;
    node.database.stop_immediate();
    node.app.open();
    let answer = request.await.unwrap();
    assert!(answer.is_first(), "{answer:?}");
    // Longer than the lease.
    let outage = Instant::now();
    while outage.elapsed() < Duration::from_secs(2) {
        let duplicate = node.app.send("key").await;
        assert!(matches!(duplicate.status, 503 | 409), "{duplicate:?}");
    }
    node.database.start_again();
    let retry = node.once_back("key").await;
    assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
    assert_eq!(node.app.runs(), 2);
    node.until_record("key", is_completed).await;
    node.app.handle.drain(Duration::from_secs(10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_result_that_is_not_stored_frees_the_key_when_the_store_is_back() {
    let node = Node::warm(|layer| layer.with_lease(Duration::from_secs(4))).await;
    node.app.close();
    let request = node.app.start("key");
    node.app.until_started(2).await;
    node.app.answer_with(StatusCode::INTERNAL_SERVER_ERROR);
    node.database.stop_immediate();
    node.app.open();
    let answer = request.await.unwrap();
    assert_eq!((answer.status, answer.code.as_deref()), (500, None), "{answer:?}");
    node.database.start_again();
    node.until_record("key", |record| record.is_none()).await;
    node.app.answer_with(StatusCode::CREATED);
    let retry = node.app.send("key").await;
    assert!(retry.is_first(), "{retry:?}");
    assert_eq!(node.app.runs(), 3);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_lease_that_lapsed_in_an_outage_is_renewed_by_its_owner() {
    let node = Node::warm(|layer| layer.with_store_timeout(Duration::from_millis(500))).await;
    node.app.close();
    let request = node.app.start("key");
    node.app.until_started(2).await;
    let owner = owner(&node.neighbour().record("key").await.unwrap());
    node.database.stop_immediate();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    node.database.start_again();
    let renewed = |record: Option<&Record>| {
        let state = &record.expect("nobody deletes it").state;
        matches!(state, RecordState::InProgress { lease_remaining, .. } if !lease_remaining.is_zero())
    };
    node.until_record("key", renewed).await;
    let neighbour = node.neighbour();
    for app in [&node.app, &neighbour] {
        app.send("key").await.assert_refused("in-progress");
    }
    assert_eq!(self::owner(&neighbour.record("key").await.unwrap()), owner);
    node.app.open();
    let answer = request.await.unwrap();
    assert!(answer.is_first(), "{answer:?}");
    let retry = neighbour.send("key").await;
    assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn duplicates_during_and_after_an_outage_do_not_run_beside_their_handler() {
    let node = Node::warm(|layer| layer.with_store_timeout(Duration::from_millis(500))).await;
    node.app.close();
    let request = node.app.start("key");
    node.app.until_started(2).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let duplicates = tokio::spawn({
        let (app, stop) = (node.app.clone(), stop.clone());
        async move {
            while !stop.is_cancelled() {
                let duplicate = app.send("key").await;
                assert!(matches!(duplicate.status, 503 | 409), "{duplicate:?}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    });
    node.database.stop_immediate();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    node.database.start_again();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.cancel();
    duplicates.await.unwrap();
    node.app.open();
    assert!(request.await.unwrap().is_first());
    assert!(node.once_back("key").await.is_replay());
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_that_hangs_leaves_no_task_behind() {
    let node = Node::warm(|layer| layer.with_store_timeout(Duration::from_millis(300))).await;
    node.database.pause();
    for answer in at_once(20, |_| send(&node.app, "key")).await {
        answer.assert_refused("store-unavailable");
        assert_eq!((answer.status, answer.retry_after.is_some()), (503, true));
    }
    node.database.resume();
    assert_eq!(node.app.runs(), 1);
    let answer = node.once_back("key").await;
    assert!(answer.is_first(), "{answer:?}");
    node.app.handle.drain(Duration::from_secs(10)).await.unwrap();
    assert_eq!(node.app.runs(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_attempts_keep_their_leases_by_a_few_renewals() {
    let store = Watched::new(MemoryStore::new());
    let app = App::new(layer(store.clone()));
    let neighbour = app.beside(layer(store.clone()));
    app.close();
    let requests = tokio::spawn({
        let app = app.clone();
        async move { at_once(50, |number| send_numbered(&app, number)).await }
    });
    app.until_started(50).await;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        for number in 0..50 {
            neighbour.send(&number.to_string()).await.assert_refused("in-progress");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // One attempt alone needs nine.
    let renewals = store.renewals();
    assert!((3..50).contains(&renewals), "{renewals} calls");
    app.open();
    assert!(requests.await.unwrap().iter().all(Answer::is_first));
    for number in 0..50 {
        let record = app.record(&number.to_string()).await.unwrap();
        assert_eq!((record.attempt_number, is_completed(Some(&record))), (1, true));
    }
    assert_eq!(app.runs(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_does_not_take_over_what_it_is_running_itself() {
    let store = Watched::new(MemoryStore::new());
    let app = App::new(layer(store.clone()));
    app.close();
    let request = app.start("key");
    app.until_started(1).await;
    store.fail_renewals(true);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    app.send("key").await.assert_refused("in-progress");
    store.fail_renewals(false);
    app.open();
    let answer = request.await.unwrap();
    assert!(answer.is_first(), "{answer:?}");
    assert!(app.send("key").await.is_replay());
    assert_eq!(app.runs(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_hangs_does_not_cost_the_lease() {
    a_completion_that_is_late_does_not_cost_the_lease(Watched::hang_completions).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_fails_does_not_cost_the_lease() {
    a_completion_that_is_late_does_not_cost_the_lease(Watched::fail_completions).await;
}

async fn a_completion_that_is_late_does_not_cost_the_lease(break_store: fn(&Watched<MemoryStore>, bool)) {
    let store = Watched::new(MemoryStore::new());
    let app = App::new(layer(store.clone()));
    let neighbour = app.beside(layer(store.clone()));
    break_store(&store, true);
    let answer = app.send("key").await;
    assert!(answer.is_first(), "{answer:?}");
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        neighbour.send("key").await.assert_refused("in-progress");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    break_store(&store, false);
    let retry = send_until_not(&["in-progress"], || neighbour.send("key")).await;
    assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
    assert_eq!(app.runs(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_counted_from_the_claim_and_not_from_its_answer() {
    let records = MemoryStore::new();
    let store = Watched::new(records.clone());
    let app = App::new(layer(store.clone()));
    let neighbour = app.beside(layer(records));
    app.close();
    store.hold_claims(true);
    let request = app.start("key");
    tokio::time::sleep(Duration::from_millis(600)).await;
    store.hold_claims(false);
    app.until_started(1).await;
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(600) {
        neighbour.send("key").await.assert_refused("in-progress");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    app.open();
    assert!(request.await.unwrap().is_first());
    assert_eq!(app.runs(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_took_most_of_its_lease_is_given_back() {
    let store = Watched::new(MemoryStore::new());
    let app = App::new(layer(store.clone()));
    store.hold_claims(true);
    app.send("key").await.assert_refused("store-unavailable");
    store.hold_claims(false);
    let answer = send_until_not(&["in-progress"], || app.send("key")).await;
    assert!(answer.is_first(), "{answer:?}");
    assert_eq!(app.runs(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_performed_after_everybody_gave_up_is_released() {
    let store = Watched::new(MemoryStore::new());
    let layer = patient(layer(store.clone())).with_policy(ResultPolicy::at_most_once());
    let app = App::new(layer);
    store.delay_claims(true);
    app.send("key").await.assert_refused("store-unavailable");
    store.delay_claims(false);
    // The last of them is carried out, after the first release.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let answer = send_until_not(&["in-progress"], || app.send("key")).await;
    assert!(answer.is_first(), "{answer:?}");
    assert_eq!(app.runs(), 1);
    app.send("other").await;
    app.handle.drain(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_hangs_does_not_cost_other_attempts_their_leases() {
    let store = Watched::new(MemoryStore::new());
    let short = layer(store.clone());
    let long = short.clone().with_lease(LONG).with_renewal_interval(Duration::from_millis(100));
    let app = App::new(short);
    let patient = app.beside(long);
    let neighbour = app.beside(layer(store.clone()));
    app.close();
    store.hang_next_renewal();
    let first = patient.start("long");
    let hangs = async {
        while !store.renewal_hangs() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), hangs).await.expect("a renewal");
    let second = app.start("short");
    app.until_started(2).await;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        neighbour.send("short").await.assert_refused("in-progress");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    app.open();
    assert!(first.await.unwrap().is_first() && second.await.unwrap().is_first());
    assert_eq!(app.runs(), 2);
}

fn owner(record: &Record) -> AttemptId {
    record.attempt.expect("an attempt owns it")
}

fn send(app: &App, key: &'static str) -> impl Future<Output = Answer> + Send + use<> {
    let app = app.clone();
    async move { app.send(key).await }
}

fn send_numbered(app: &App, number: usize) -> impl Future<Output = Answer> + Send + use<> {
    let app = app.clone();
    async move { app.send(&number.to_string()).await }
}
