//! What the PostgreSQL store promises beyond the contract of every store: tables, names, locks and poolers.

mod plans;

use std::time::{Duration, Instant};

use bytes::Bytes;
use sqlx::{Executor, PgPool, postgres::PgPoolOptions};
use tokio::task::JoinSet;
use tower_idempotency::{
    PostgresStore,
    store::{
        Claim, ClaimOutcome, CompleteOutcome, ConnectionMode, RenewOutcome, Renewal, Store, StoreErrorKind,
        TableCreation,
    },
};

use crate::support::{
    claim, free_port, must_name, names_to_quote,
    schema::{PooledSchema, Schema, server},
    win,
};

#[tokio::test]
async fn postgres_rejects_names_that_would_need_quoting() {
    for name in names_to_quote() {
        let store = PostgresStore::new(PgPool::connect_lazy("postgres://localhost").unwrap());
        assert!(store.clone().with_table_prefix(&name).is_err(), "{name:?}");
        assert!(store.with_schema(&name).is_err(), "{name:?}");
    }
}

/// Without this the rules of the conformance suite for intents would check nothing.
#[tokio::test]
async fn postgres_keeps_intents() {
    let store = PostgresStore::new(PgPool::connect_lazy("postgres://localhost").unwrap());
    assert!(store.recovery().is_some());
}

#[tokio::test]
async fn postgres_that_cannot_be_reached_is_unavailable() {
    let port = free_port();
    let store =
        PostgresStore::new(PgPool::connect_lazy(&format!("postgres://u@127.0.0.1:{port}/d")).unwrap());
    let error = store.claim(&claim("k")).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_migrates_twice_and_from_many_stores_at_once() {
    let schema = Schema::create().await;
    let mut stores = JoinSet::new();
    for _ in 0..8 {
        let store = schema.store();
        stores.spawn(async move { store.migrate().await });
    }
    for migrated in stores.join_all().await {
        migrated.unwrap();
    }
    schema.store().migrate().await.unwrap();
    assert_eq!(schema.number("SELECT count(*) FROM {s}.idempotency_migrations").await, 2);
    win(&schema.store(), &claim("k")).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_uses_the_names_it_is_given() {
    let schema = Schema::create().await;
    let longest = "p".repeat(40);
    for prefix in ["select", longest.as_str()] {
        let store = schema.store().with_table_prefix(prefix).unwrap();
        win(&store, &claim("k")).await;
        assert_eq!(schema.number(&format!("SELECT count(*) FROM {{s}}.{prefix}_records")).await, 1);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_keeps_to_the_schema_that_was_current_at_first() {
    let schema = Schema::create().await;
    let quoted = Schema::create_named(&format!("Mixed 'Case\" {}", schema.name).replace('"', "")).await;
    let odd = Schema::create_named(&format!("tenant:{{now}} :key {}", schema.name)).await;
    for schema in [&schema, &quoted, &odd] {
        let path = format!("\"{}\"", schema.name);
        let pool = PgPoolOptions::new().connect_lazy_with(server().options([("search_path", path)]));
        let store = PostgresStore::new(pool);
        win(&store, &claim("k")).await;
        let rows = format!("SELECT count(*) FROM \"{}\".idempotency_records", schema.name);
        assert_eq!(schema.number(&rows).await, 1);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_says_which_file_to_run_when_it_may_not() {
    let schema = Schema::create().await;
    let store = schema.store().with_table_creation(TableCreation::Manual);
    must_name(&store.prepare().await.unwrap_err(), "migrations/postgres/0001_records.sql");
    for (file, next) in FILES.into_iter().zip([Some("0002_intents.sql"), None]) {
        schema.run(&format!("BEGIN; SET LOCAL search_path = \"{{s}}\"; {file}; COMMIT")).await;
        match next {
            Some(next) => must_name(&store.prepare().await.unwrap_err(), next),
            None => drop(store.prepare().await.unwrap()),
        }
    }
    win(&store, &claim("k")).await;
    schema.run("INSERT INTO {s}.idempotency_migrations (version) VALUES (999)").await;
    must_name(&schema.store().prepare().await.unwrap_err(), "999");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_needs_no_right_to_create_tables_once_they_are_there() {
    let schema = Schema::create().await;
    let role = format!("r_{}", schema.name);
    schema.store().migrate().await.unwrap();
    schema.run(&format!("CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {{s}} TO {role}")).await;
    let store = || {
        let pool = PgPoolOptions::new().connect_lazy_with(server().username(&role));
        PostgresStore::new(pool).with_schema(&schema.name).unwrap()
    };
    must_name(&store().claim(&claim("k")).await.unwrap_err(), "SELECT, INSERT, UPDATE, DELETE");
    schema.run(&format!("GRANT SELECT ON {{s}}.idempotency_migrations TO {role}")).await;
    let rights = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA";
    schema.run(&format!("GRANT {rights} {{s}} TO {role}")).await;
    win(&store(), &claim("k")).await;
    schema.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_refuses_read_only_servers_and_reports_lossy_ones() {
    let schema = Schema::create().await;
    let with = |setting: (&str, &str)| {
        let pool = PgPoolOptions::new().connect_lazy_with(server().options([setting]));
        PostgresStore::new(pool).with_schema(&schema.name).unwrap()
    };
    let error = with(("default_transaction_read_only", "on")).prepare().await.unwrap_err();
    must_name(&error, "read-only");
    let warnings = with(("synchronous_commit", "off")).prepare().await.unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("synchronous_commit")), "{warnings:?}");
    let warnings = with(("synchronous_commit", "on")).prepare().await.unwrap();
    assert!(!warnings.iter().any(|warning| warning.contains("synchronous_commit")), "{warnings:?}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_duplicates_neither_write_nor_wait() {
    let schema = Schema::create().await;
    let store = schema.store();
    let (live, done) = (claim("live"), claim("done"));
    win(&store, &live).await;
    win(&store, &done).await;
    complete(&store, &done).await;
    must_exist(&store, &["live", "done"]).await;
    // A row that was locked, even by a statement that then changed nothing, remembers by whom.
    assert_eq!(schema.number("SELECT sum(xmax::text::bigint) FROM {s}.idempotency_records").await, 0);

    let mut owner = schema.pool.begin().await.unwrap();
    owner.execute(schema.sql("UPDATE {s}.idempotency_records SET completed_at = now()")).await.unwrap();
    let begun = Instant::now();
    must_exist(&store, &["live", "done"]).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "duplicates waited for {:?}", begun.elapsed());
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_claims_and_renewals_skip_locked_rows() {
    let schema = Schema::create().await;
    let store = schema.store();
    let mut lapsed = claim("lapsed");
    lapsed.lease = Duration::from_millis(1);
    let owned = claim("owned");
    win(&store, &lapsed).await;
    win(&store, &owned).await;
    let mut other = schema.pool.begin().await.unwrap();
    let lock = "SELECT FROM {s}.idempotency_records WHERE key = 'lapsed' FOR UPDATE";
    other.execute(schema.sql(lock)).await.unwrap();

    let begun = Instant::now();
    let outcome = store.claim(&claim("lapsed")).await.unwrap();
    assert!(matches!(outcome, ClaimOutcome::Contended), "{outcome:?}");
    let lost = claim("owned");
    let renewals =
        [&lapsed, &owned, &lost].map(|claim| Renewal::new(claim.attempt.clone(), Duration::from_secs(30)));
    let renewed = store.renew(&renewals).await.unwrap();
    assert_eq!(renewed, [RenewOutcome::Skipped, RenewOutcome::Renewed, RenewOutcome::Lost]);
    assert_eq!(store.purge(10).await.unwrap(), 0);
    assert!(begun.elapsed() < Duration::from_secs(1), "something waited for {:?}", begun.elapsed());

    other.rollback().await.unwrap();
    win(&store, &claim("lapsed")).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_cancels_a_statement_at_its_time() {
    let schema = Schema::create().await;
    gives_up(&schema, schema.store(), StoreErrorKind::Unavailable).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn pgbouncer_leaves_a_statement_alone_at_its_time() {
    let pooled = PooledSchema::create().await;
    gives_up(&pooled.0, pooled.store(), StoreErrorKind::Ambiguous).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_survives_the_loss_of_its_connections() {
    let schema = Schema::create().await;
    let pool =
        PgPoolOptions::new().max_connections(4).connect_lazy_with(server().application_name(&schema.name));
    let store = PostgresStore::new(pool).with_schema(&schema.name).unwrap();
    let mut claims = JoinSet::new();
    for key in 0..16 {
        let store = store.clone();
        claims.spawn(async move { win(&store, &claim(&format!("{key}"))).await });
    }
    claims.join_all().await;
    schema.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{s}'").await;
    let next = claim("next");
    let error = store.claim(&next).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Ambiguous, "{error:?}");
    // One repetition is enough, however many idle connections there were.
    win(&store, &next).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_purges_in_bounded_batches_on_many_nodes() {
    let schema = Schema::create().await;
    let store = schema.store();
    store.prepare().await.unwrap();
    schema
        .run(
            "INSERT INTO {s}.idempotency_records (consumer, key, id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at)
             SELECT 'acme', state || n, gen_random_uuid(), '\\x01', replace(state, 'live', 'in_progress'),
                 gen_random_uuid(), 1, 0, 5, now() + interval '1 hour', now(), now() - n * interval '1 second'
             FROM generate_series(1, 20000) AS n, unnest('{completed,held,live}'::text[]) AS state
             WHERE state = 'completed' OR n <= 100",
        )
        .await;
    let mut nodes = JoinSet::new();
    for _ in 0..4 {
        let store = schema.store();
        nodes.spawn(async move {
            let mut purged = 0;
            loop {
                match store.purge(1_000).await.unwrap() {
                    0 => return purged,
                    count => {
                        assert!(count <= 1_000, "{count} records in one batch");
                        purged += count;
                    }
                }
            }
        });
    }
    assert_eq!(nodes.join_all().await.into_iter().sum::<u64>(), 20_000);
    assert_eq!(schema.number("SELECT count(*) FROM {s}.idempotency_records").await, 200);
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn pgbouncer_serves_many_simultaneous_claims() {
    let pooled = PooledSchema::create().await;
    let stores: Vec<_> = (0..4).map(|_| pooled.store()).collect();
    let mut claims = JoinSet::new();
    for number in 0..100 {
        for store in &stores {
            let store = store.clone();
            claims.spawn(async move {
                let claim = claim(&format!("it's \\ $1 {number}"));
                let won = matches!(store.claim(&claim).await.unwrap(), ClaimOutcome::Won { .. });
                if won {
                    complete(&store, &claim).await;
                }
                usize::from(won)
            });
        }
    }
    assert_eq!(claims.join_all().await.into_iter().sum::<usize>(), 100);
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn pgbouncer_without_its_mode_is_refused() {
    let pooled = PooledSchema::create().await;
    let store = pooled.store().with_connection_mode(ConnectionMode::Direct);
    must_name(&store.prepare().await.unwrap_err(), "TransactionPooler");
}

/// A claim that waits for a lock on the table fails as `kind` after its time.
async fn gives_up(schema: &Schema, store: PostgresStore, kind: StoreErrorKind) {
    let store = store.with_statement_timeout(Duration::from_millis(300)).with_max_connections(1);
    win(&store, &claim("first")).await;
    let mut other = schema.pool.begin().await.unwrap();
    other.execute(schema.sql("LOCK TABLE {s}.idempotency_records")).await.unwrap();
    let stuck = claim("stuck");
    let begun = Instant::now();
    let error = store.claim(&stuck).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(2), "gave up after {:?}", begun.elapsed());
    other.rollback().await.unwrap();
    win(&store, &stuck).await;
}

async fn complete(store: &impl Store, claim: &Claim) {
    let response: Vec<u8> = uuid::Uuid::new_v4().as_bytes().iter().cycle().take(600).copied().collect();
    let outcome = store.complete(&claim.attempt, Bytes::from(response)).await.unwrap();
    assert!(matches!(outcome, CompleteOutcome::Completed), "{outcome:?}");
}

async fn must_exist(store: &impl Store, keys: &[&str]) {
    for key in keys {
        let outcome = store.claim(&claim(key)).await.unwrap();
        assert!(matches!(outcome, ClaimOutcome::Exists(_)), "{key}: {outcome:?}");
    }
}

/// Records of the first release go on where they were.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_migrates_tables_that_are_in_use() {
    let schema = Schema::create().await;
    schema.run(&format!("BEGIN; SET LOCAL search_path = \"{{s}}\"; {}; COMMIT", FILES[0])).await;
    schema
        .run(
            "INSERT INTO {s}.idempotency_records (consumer, key, id, fingerprint, state, attempt, attempt_number, abandoned,
                max_abandoned, lease_until, created_at, expires_at)
            VALUES ('acme', 'k', gen_random_uuid(), 'fingerprint', 'in_progress', gen_random_uuid(), 1, 0, 5,
                now() - interval '1 s', now(), now() + interval '1 day')",
        )
        .await;
    let ClaimOutcome::Won { attempt_number, .. } = schema.store().claim(&claim("k")).await.unwrap() else {
        panic!("the record is taken over")
    };
    assert_eq!(attempt_number, 2);
}

const FILES: [&str; 2] = [
    include_str!("../../migrations/postgres/0001_records.sql"),
    include_str!("../../migrations/postgres/0002_intents.sql"),
];
