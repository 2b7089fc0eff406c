//! How little the statements of the PostgreSQL store read and write, however large its tables are.

use std::time::Duration;

use tokio::task::JoinSet;
use tower_idempotency::{
    PostgresStore, Resource,
    intent::IntentFilter,
    store::{
        Fenced, Grouping, IntentFence, IntentUpdate, OpenOutcome, Opening, RenewOutcome, Renewal, Store,
    },
};

use super::{complete, must_exist};
use crate::support::{claim, schema::Schema, win};

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_completes_without_touching_an_index() {
    let schema = Schema::create().await;
    let store = schema.store();
    store.prepare().await.unwrap();
    const RECORDS: i64 = 2_000;
    let mut workers = JoinSet::new();
    for worker in 0..4 {
        let store = store.clone();
        workers.spawn(async move {
            for number in 0..RECORDS / 4 {
                let claim = claim(&format!("{worker}-{number}-{}", "x".repeat(24)));
                win(&store, &claim).await;
                complete(&store, &claim).await;
            }
        });
    }
    workers.join_all().await;
    flush_statistics(&store).await;
    let updates = |column: &str| {
        format!(
            "SELECT {column} FROM pg_stat_user_tables WHERE schemaname = '{{s}}' AND relname = 'idempotency_records'"
        )
    };
    let all = schema.number(&updates("n_tup_upd")).await;
    let hot = schema.number(&updates("n_tup_hot_upd")).await;
    assert!(all > RECORDS * 9 / 10, "only {all} of {RECORDS} completions are counted");
    assert!(hot * 100 > all * 95, "{hot} of {all} completions were HOT");
}

/// Statements of one connection are prepared while the table is empty, those of another when it has grown.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_plans_survive_the_growth_of_the_table() {
    grows(Grouping::off()).await;
}

async fn grows(grouping: Grouping) {
    let schema = Schema::create().await;
    let store = schema.store().with_max_connections(1).with_grouping(grouping);
    store.prepare().await.unwrap();
    schema.run("ALTER TABLE {s}.idempotency_records SET (autovacuum_enabled = off)").await;
    every_statement(&store, "small").await;
    schema
        .run(
            "INSERT INTO {s}.idempotency_records (consumer, key, id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at)
             SELECT 'acme', 'grown-' || n, gen_random_uuid(), '\\x01', 'completed', gen_random_uuid(), 1, 0, 5,
                 now(), now(), now() + (n - 250000) * interval '1 minute'
             FROM generate_series(1, 500000) AS n",
        )
        .await;
    reads_few(&schema, store, grouping, every_statement).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_plans_of_groups_survive_the_growth_of_the_table() {
    grows(Grouping::with_max_rows(1)).await;
}

/// Nothing is known of the tables to the planner, before and after.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_plans_survive_the_growth_of_intents_and_phases() {
    let schema = Schema::create().await;
    let store = schema.store().with_max_connections(1);
    store.prepare().await.unwrap();
    for table in ["records", "intents", "phases"] {
        schema.run(&format!("ALTER TABLE {{s}}.idempotency_{table} SET (autovacuum_enabled = off)")).await;
    }
    every_statement_of_recovery(&store, "small").await;
    schema
        .run(
            "INSERT INTO {s}.idempotency_intents
             SELECT (jsonb_populate_record(i, jsonb_build_object('id', gen_random_uuid(), 'record_id', gen_random_uuid(),
                 'created_at', now() - n * interval '10 minutes'))).*
             FROM {s}.idempotency_intents AS i, generate_series(1, 60000) AS n WHERE i.state = 'finalized'",
        )
        .await;
    schema
        .run(
            "INSERT INTO {s}.idempotency_phases
             SELECT gen_random_uuid(), 'acme', n::text, 'p', gen_random_uuid(), '', now() - n * interval '10 minutes'
             FROM generate_series(1, 30000) AS n",
        )
        .await;
    reads_few(&schema, store, Grouping::off(), every_statement_of_recovery).await;
}

/// Checks it with a store that has its plans already, and with one that makes them for the large tables.
async fn reads_few(
    schema: &Schema,
    planned: PostgresStore,
    grouping: Grouping,
    every: impl AsyncFn(&PostgresStore, &str),
) {
    let fresh = schema.store().with_max_connections(1).with_grouping(grouping);
    for (store, name) in [(planned, "large"), (fresh, "planned")] {
        flush_statistics(&store).await;
        let before = Reads::of(schema).await;
        every(&store, name).await;
        flush_statistics(&store).await;
        Reads::of(schema).await.assert_few_since(&before, name);
    }
}

/// What was read from the store's tables so far.
struct Reads {
    rows: i64,
    entries: i64,
}

impl Reads {
    async fn of(schema: &Schema) -> Self {
        let rows = "SELECT sum(seq_scan * 1000000 + coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))
                    FROM pg_stat_user_tables WHERE schemaname = '{s}' AND relname <> 'idempotency_migrations'";
        let entries = "SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = '{s}'";
        Self { rows: schema.number(rows).await, entries: schema.number(entries).await }
    }

    fn assert_few_since(&self, before: &Self, name: &str) {
        let (rows, entries) = (self.rows - before.rows, self.entries - before.entries);
        assert!(entries > 10, "the statistics were not counted");
        assert!(rows < 5_000 && entries < 5_000, "{name}: read {rows} rows and {entries} index entries");
    }
}

/// Each statement of the store, with a hundred renewals.
async fn every_statement(store: &PostgresStore, name: &str) {
    let claims: Vec<_> = (0..100).map(|number| claim(&format!("{name}-{number}"))).collect();
    for claim in &claims {
        win(store, claim).await;
    }
    must_exist(store, &[claims[0].attempt.key.as_str()]).await;
    let renewals: Vec<_> =
        claims.iter().map(|claim| Renewal::new(claim.attempt.clone(), Duration::from_millis(1))).collect();
    let renewed = store.renew(&renewals).await.unwrap();
    assert!(renewed.iter().all(|outcome| *outcome == RenewOutcome::Renewed), "{renewed:?}");
    tokio::time::sleep(Duration::from_millis(2)).await;
    let takeover = claim(claims[0].attempt.key.as_str());
    win(store, &takeover).await;
    complete(store, &takeover).await;
    for claim in &claims[1..] {
        store.hold(&claim.attempt).await.unwrap();
        store.release(&claim.attempt).await.unwrap();
        store.evict(&claim.attempt.consumer, &claim.attempt.key).await.unwrap();
    }
    store.purge(100).await.unwrap();
}

/// Each statement over intents and phases.
async fn every_statement_of_recovery(store: &PostgresStore, name: &str) {
    let (claim, recovery) = (claim(name), store.recovery().unwrap());
    let record = win(store, &claim).await;
    let opening = Opening::first(claim.attempt.clone(), record, "transfer");
    let opened = recovery.open_intent(&opening).await.unwrap();
    assert!(matches!(opened, OpenOutcome::Opened), "{opened:?}");
    assert_eq!(recovery.count_intents().await.unwrap().open, 1);
    for filter in [IntentFilter::Open, IntentFilter::Dangling] {
        assert_eq!(recovery.list_intents(filter, 10).await.unwrap().len(), 1, "{filter:?}");
    }
    for filter in [IntentFilter::NeedsAttention, IntentFilter::Dead] {
        assert!(recovery.list_intents(filter, 10).await.unwrap().is_empty(), "{filter:?}");
    }
    assert!(
        recovery.take_dangling(&["transfer".to_owned()], 10, Duration::ZERO).await.unwrap().is_empty(),
        "its attempt has its lease"
    );
    assert_eq!(recovery.count_overlooked(&[], Duration::ZERO, 10).await.unwrap(), []);
    assert_eq!(recovery.list_intents(IntentFilter::OfRecord(record), 10).await.unwrap().len(), 1);
    let update = IntentUpdate::Finalize(Resource::new("tr_1"));
    let fence = IntentFence::Call(opening.call);
    assert_eq!(
        recovery.update_intent(opening.upstream_key, fence, &update, None).await.unwrap(),
        Fenced::Applied
    );
    assert!(recovery.get_intent(opening.upstream_key).await.unwrap().is_some());
    assert_eq!(recovery.find_phase(&claim.attempt, record, "p").await.unwrap(), None);
    recovery.purge_settled(Duration::from_secs(100 * 24 * 60 * 60), 100).await.unwrap();
}

/// A connection reports its statistics when it ends a statement a second after its last report.
async fn flush_statistics(store: &PostgresStore) {
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let mut workers = JoinSet::new();
    for number in 0..16 {
        let store = store.clone();
        workers.spawn(async move {
            store.get(&claim("k").attempt.consumer, &claim(&format!("{number}")).attempt.key).await
        });
    }
    workers.join_all().await;
}
