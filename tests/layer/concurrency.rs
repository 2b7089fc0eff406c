//! Many requests with one key at once: one is performed.

use std::{sync::Arc, time::Duration};

use tower_idempotency::{
    IdempotencyKey, Reaper, ReplayCache,
    store::{Attempt, Claim, ClaimOutcome, ConnectionMode, IntoStore, RecordState, Store},
};

use crate::support::{
    app::{Answer, App, assert_one_run, at_once, consumer, layer, over, send_until_not},
    database::Database,
    schema::Schema,
    sqlite::SqliteFile,
    watched::Watched,
};

const MANY: usize = 100;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_at_once_run_once_sqlite() {
    let file = SqliteFile::new();
    a_hundred_at_once_run_once(file.store()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_hundred_at_once_run_once_postgres() {
    a_hundred_at_once_run_once(Schema::create().await.store()).await;
}

async fn a_hundred_at_once_run_once(store: impl IntoStore) {
    let app = App::new(layer(store));
    for (round, key) in ["a", "b", "c"].into_iter().enumerate() {
        let body = assert_one_run(&at_once(MANY, |_| send(&app, key)).await);
        assert_eq!(app.runs(), round + 1);
        for answer in at_once(MANY, |_| send(&app, key)).await {
            assert!(answer.is_replay() && answer.body == body, "{answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_hundred_at_once_at_two_servers_run_once() {
    let database = Database::postgres().await;
    let servers = Arc::new([database.server(&[]), database.server(&[])]);
    let charge = |number: usize| {
        let servers = Arc::clone(&servers);
        async move { Answer::from(servers[number % 2].charge("/charges?delay_ms=50", "key").await) }
    };
    let body = assert_one_run(&at_once(MANY, charge).await);
    for answer in at_once(MANY, charge).await {
        assert!(answer.is_replay() && answer.body == body, "{answer:?}");
    }
    assert_eq!(database.charges().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_while_the_record_expires_run_once_sqlite() {
    let file = SqliteFile::new();
    a_hundred_while_the_record_expires_run_once(file.store()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_hundred_while_the_record_expires_run_once_postgres() {
    a_hundred_while_the_record_expires_run_once(Schema::create().await.store()).await;
}

async fn a_hundred_while_the_record_expires_run_once(store: impl IntoStore) {
    let kept_for_a_day = layer(store);
    let soon_expired = kept_for_a_day.clone().with_max_execution(Duration::from_secs(1));
    let app = App::new(soon_expired.with_retention(Duration::from_secs(2)));
    let old = app.send("key").await;
    assert!(old.is_first());
    let app = app.beside(kept_for_a_day);
    sleep_until_shortly_before(app.record("key").await.unwrap().expires_at).await;
    let answers = over(Duration::from_millis(200), MANY, |_| send(&app, "key")).await;
    let is_old = |answer: &Answer| answer.is_replay() && answer.body == old.body;
    assert!(is_old(&answers[0]), "{:?}", answers[0]);
    let new: Vec<_> = answers.into_iter().filter(|answer| !is_old(answer)).collect();
    let body = assert_one_run(&new);
    assert_eq!(app.runs(), 2);
    let retry = app.send("key").await;
    assert!(retry.is_replay() && retry.body == body, "{retry:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_while_the_lease_of_a_dead_owner_ends_run_once_sqlite() {
    let file = SqliteFile::new();
    a_hundred_while_the_lease_of_a_dead_owner_ends_run_once(Arc::new(file.store())).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_hundred_while_the_lease_of_a_dead_owner_ends_run_once_postgres() {
    a_hundred_while_the_lease_of_a_dead_owner_ends_run_once(Arc::new(Schema::create().await.store())).await;
}

async fn a_hundred_while_the_lease_of_a_dead_owner_ends_run_once(store: Arc<dyn Store>) {
    let app = App::new(layer(Arc::clone(&store)));
    let nodes = [app.clone(), app.beside(layer(Arc::clone(&store)))];
    claim_like_requests(&app, &*store, "key", Duration::from_secs(1)).await;
    let lease = lease_of(&app, "key").await;
    tokio::time::sleep(lease.saturating_sub(Duration::from_millis(50))).await;
    let answers = over(Duration::from_millis(200), MANY, |number| send(&nodes[number % 2], "key")).await;
    let body = assert_one_run(&answers);
    assert_eq!(app.runs(), 2);
    let record = app.record("key").await.unwrap();
    assert_eq!((record.attempt_number, record.abandoned), (2, 1));
    let retry = app.send("key").await;
    assert!(retry.is_replay() && retry.body == body, "{retry:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_hundred_at_two_servers_while_the_lease_of_a_killed_one_ends_run_once() {
    let database = Database::postgres().await;
    let variables = [("LEASE_MS", "2000")];
    let mut owner = database.server(&variables);
    let servers = Arc::new([database.server(&variables), database.server(&variables)]);
    let body = r#"{"amount":2000,"currency":"usd"}"#;
    let address = owner.address();
    let path = "/charges?delay_ms=800";
    let headers =
        [("content-type", "application/json"), ("x-api-key", "acme-key"), ("idempotency-key", "key")];
    let mut client = crate::support::http::RawConnection::open(address).await;
    client.send(crate::support::http::request("POST", path, &headers, body)).await;
    database.until_charging(1).await;
    owner.kill9();
    let charge = |number: usize| {
        let servers = Arc::clone(&servers);
        async move { Answer::from(servers[number % 2].charge(path, "key").await) }
    };
    let body = assert_one_run(&over(Duration::from_millis(2500), MANY, charge).await);
    let retry = charge(0).await;
    assert!(retry.is_replay() && retry.body == body, "{retry:?}");
    assert_eq!(database.charges().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn statements_prepared_on_an_empty_table_use_the_index_when_it_has_grown() {
    let schema = Schema::create().await;
    // Every retry asks the store.
    let layer = |store| layer(store).with_replay_cache(ReplayCache::off());
    let direct = App::new(layer(schema.store().with_max_connections(2)));
    let pooled =
        schema.store().with_connection_mode(ConnectionMode::TransactionPooler).with_max_connections(2);
    let pooled = direct.beside(layer(pooled));
    direct.handle.prepare().await.unwrap();
    // The planner knows that the table is empty, and is not told when it has grown.
    schema.run("ALTER TABLE {s}.idempotency_records SET (autovacuum_enabled = off)").await;
    schema.run("VACUUM ANALYZE {s}.idempotency_records").await;
    // Two at once, so that every connection has prepared its statements.
    for (app, key) in [(&direct, "early"), (&pooled, "early-too")] {
        assert!(send_many(app, key).await.iter().all(Answer::is_first));
    }
    schema.run(&completed_records("live", 500_000, "1 day")).await;
    let scanned = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE schemaname = '{s}' AND relname = 'idempotency_records'";
    let searches = scanned.replace("seq_tup_read", "idx_scan");
    let searched = schema.number(&searches).await;
    for (app, key) in [(&direct, "late"), (&pooled, "late-too")] {
        let (answers, retries) = (send_many(app, key).await, send_many(app, key).await);
        assert!(answers.iter().all(Answer::is_first));
        for (answer, retry) in answers.iter().zip(&retries) {
            assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
        }
    }
    // The server adds up once a second what its processes have counted.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while schema.number(&searches).await < searched + 2 * i64::try_from(MANY).unwrap() {
        assert!(std::time::Instant::now() < deadline, "the claims have not used an index");
        tokio::time::sleep(Duration::from_millis(100)).await;
        direct.send("late-0").await;
        pooled.send("late-too-0").await;
    }
    // One scan would read them all; those of the empty table have read a few rows.
    let rows = schema.number(scanned).await;
    assert!(rows < 100_000, "{rows} rows were read by scans of the table");
    assert_eq!(direct.runs(), 4 * MANY);
}

/// Requests with keys of their own, which do not share a claim.
async fn send_many(app: &App, key: &'static str) -> Vec<Answer> {
    let send = |number| {
        let app = app.clone();
        async move { app.send(&format!("{key}-{number}")).await }
    };
    at_once(MANY, send).await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_million_expired_records_are_purged_by_two_nodes_while_requests_run() {
    let schema = Schema::create().await;
    let store = Watched::new(schema.store());
    let purging =
        |store: Watched<_>| layer(store).with_reaper(Reaper::every(Duration::from_millis(100), 5000));
    let app = App::new(layer(store.clone()).with_reaper(Reaper::off()));
    let kept = app.send("kept").await;
    claim_like_requests(&app, &store, "running", Duration::from_secs(600)).await;
    let held = claim_like_requests(&app, &store, "held", Duration::from_secs(600)).await;
    store.hold(&held).await.unwrap();
    let expire = "UPDATE {s}.idempotency_records SET expires_at = now() - interval '1 hour'";
    schema.run(&format!("{expire} WHERE key IN ('running', 'held')")).await;
    schema.run(&completed_records("old", 1_000_000, "-1 hour")).await;

    let nodes = [app.beside(purging(store.clone())), app.beside(purging(store.clone()))];
    let expired = "SELECT count(*) FROM (SELECT FROM {s}.idempotency_records WHERE expires_at <= now() AND \
                   state = 'completed' LIMIT 1) AS one";
    let deadline = std::time::Instant::now() + Duration::from_secs(120);
    for round in 0_usize.. {
        for (number, node) in nodes.iter().enumerate() {
            let fresh = node.send(&format!("fresh-{round}-{number}")).await;
            assert!(fresh.is_first(), "{fresh:?}");
            let retry = node.send("kept").await;
            assert!(retry.is_replay() && retry.body == kept.body, "{retry:?}");
            node.send("running").await.assert_refused("in-progress");
            node.send("held").await.assert_refused("outcome-unknown");
            // A key whose old record is expired, purged or being purged.
            let reused = format!("old-{}", 1_000_000 - 2 * round - number);
            let reused = send_until_not(&["in-progress"], || node.send(&reused)).await;
            assert!(reused.is_first(), "{reused:?}");
        }
        if schema.number(expired).await == 0 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "expired records are left");
    }
    assert!(matches!(app.record("running").await.unwrap().state, RecordState::InProgress { .. }));
    assert_eq!(app.record("held").await.unwrap().state, RecordState::Held);
    assert!((1..=5000).contains(&store.most_purged()), "{}", store.most_purged());
    for node in nodes {
        node.handle.drain(Duration::from_secs(10)).await.unwrap();
    }
}

/// Inserts completed records of the requests' consumer.
fn completed_records(key: &str, count: u32, expires_in: &str) -> String {
    format!(
        "INSERT INTO {{s}}.idempotency_records (consumer, key, id, fingerprint, state, attempt, attempt_number, abandoned,
            max_abandoned, lease_until, created_at, expires_at, completed_at, response)
         SELECT E'\\x1fanonymous', '{key}-' || n, gen_random_uuid(), '\\x00', 'completed', gen_random_uuid(), 1, 0, 5,
            now() - interval '1 day', now() - interval '1 day', now() + interval '{expires_in}', now(), '\\x00'
         FROM generate_series(1, {count}) AS n"
    )
}

/// Claims a key as an owner that then dies: with the fingerprint of the application's requests.
async fn claim_like_requests(app: &App, store: &dyn Store, key: &str, lease: Duration) -> Attempt {
    let example = app.send("example").await;
    assert_eq!(example.status, 201, "{example:?}");
    let fingerprint = app.record("example").await.unwrap().fingerprint;
    let attempt = Attempt::new(consumer(), IdempotencyKey::new(key).unwrap());
    let mut claim = Claim::new(attempt.clone(), fingerprint);
    claim.lease = lease;
    assert!(matches!(store.claim(&claim).await.unwrap(), ClaimOutcome::Won { .. }));
    attempt
}

async fn lease_of(app: &App, key: &str) -> Duration {
    let state = app.record(key).await.unwrap().state;
    let RecordState::InProgress { lease_remaining, .. } = state else { panic!("{state:?}") };
    lease_remaining
}

async fn sleep_until_shortly_before(instant: std::time::SystemTime) {
    let left = instant.duration_since(std::time::SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(left.saturating_sub(Duration::from_millis(50))).await;
}

fn send(app: &App, key: &'static str) -> impl Future<Output = Answer> + Send + use<> {
    let app = app.clone();
    async move { app.send(key).await }
}
