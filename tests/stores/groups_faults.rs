//! Groups in which something goes wrong: no call pays for another.

use std::time::Duration;

use bytes::Bytes;
use sqlx::{PgConnection, Postgres, Transaction};
use tokio::task::{JoinHandle, JoinSet};
use tower_idempotency::{
    Consumer, IdempotencyKey, PostgresStore, StoreError,
    store::{Attempt, Claim, ClaimOutcome, CompleteOutcome, Fingerprint, Grouping, Store, StoreErrorKind},
};

use crate::{
    groups::claim_all,
    own_database::OwnDatabase,
    support::{claim, postgres::Postgres as Server, schema::Schema, win},
};

/// A row that the database refuses fails alone, and so does one that its encoding lacks.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_poisonous_row_harms_no_other() {
    let encoding = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'";
    let database = OwnDatabase::create_with(encoding).await;
    let store = database.store().with_grouping(Grouping::default());
    store.prepare().await.unwrap();
    let sql = "ALTER TABLE idempotency_records ADD CHECK (key <> 'poison')";
    sqlx::raw_sql(sql).execute(&database.pool()).await.unwrap();
    let mut claims: Vec<_> = (0..20).map(|number| spawn(&store, claim(&format!("{number}")))).collect();
    let refused = [spawn(&store, claim("poison")), spawn(&store, claim_of("顧客", "k"))];
    claims.extend((20..40).map(|number| spawn(&store, claim(&format!("{number}")))));
    for claimed in claims {
        must_win(claimed).await;
    }
    let [poison, unknown] = refused;
    assert_eq!(poison.await.unwrap().unwrap_err().kind(), StoreErrorKind::Internal);
    assert_eq!(unknown.await.unwrap().unwrap_err().kind(), StoreErrorKind::Misconfigured);
}

/// While a transaction has a record locked, the other calls of its group are answered.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_locked_record_delays_no_other() {
    let schema = Schema::create().await;
    let store = schema.store().with_grouping(Grouping::default());
    let owned: Vec<_> = (0..20).map(|number| claim(&format!("{number}"))).collect();
    claim_all(&store, &owned).await;
    let mut lapsed = claim("lapsed");
    lapsed.lease = Duration::from_millis(1);
    win(&store, &lapsed).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let mut transaction = schema.pool.begin().await.unwrap();
    lock(&schema, &mut transaction, "10").await;
    lock(&schema, &mut transaction, "lapsed").await;

    let contended = spawn(&store, claim("fresh"));
    let contended = [contended, spawn(&store, claim("lapsed")), spawn(&store, claim("lapsed"))];
    let mut completions: Vec<_> = owned.iter().map(|claim| complete(&store, claim)).collect();
    let locked = completions.remove(10);
    for completed in completions {
        assert!(matches!(completed.await.unwrap().unwrap(), CompleteOutcome::Completed));
    }
    let [fresh, lapsed, again] = contended;
    must_win(fresh).await;
    for contended in [lapsed, again] {
        assert!(matches!(contended.await.unwrap().unwrap(), ClaimOutcome::Contended));
    }
    assert!(!locked.is_finished(), "it is completed although its record is locked");
    transaction.rollback().await.unwrap();
    assert!(matches!(locked.await.unwrap().unwrap(), CompleteOutcome::Completed));
}

/// While another transaction has added a key and not committed it, the other claims of a group are won.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_key_that_is_being_added_delays_no_other() {
    let schema = Schema::create().await;
    let store = schema.store().with_grouping(Grouping::default());
    store.prepare().await.unwrap();
    let mut transaction = schema.pool.begin().await.unwrap();
    insert(&schema, &mut transaction, "adding").await;

    let mut others: Vec<_> = (0..20).map(|number| spawn(&store, claim(&format!("{number}")))).collect();
    let adding = spawn(&store, claim("adding"));
    others.extend((20..40).map(|number| spawn(&store, claim(&format!("{number}")))));
    for other in others {
        must_win(other).await;
    }
    assert!(!adding.is_finished(), "it is claimed although another transaction is adding it");
    transaction.rollback().await.unwrap();
    must_win(adding).await;
}

/// The statement of one call hangs: those that wait for it do not wait for its end. Neither do those whose leader has
/// gone.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_statement_that_hangs_and_a_leader_that_is_gone_stall_no_other() {
    let schema = Schema::create().await;
    let store = schema.store().with_max_connections(16).with_grouping(Grouping::default());
    store.prepare().await.unwrap();
    close_gate(&schema).await;
    let hanging = spawn(&store, claim("hangs"));
    tokio::task::yield_now().await;
    // It waits first, so it leads. Its statement hangs at the last of its keys.
    let leader = spawn(&store, claim("y"));
    let followers = [spawn(&store, claim("w")), spawn(&store, claim("x")), spawn(&store, claim("z"))];
    tokio::time::sleep(Duration::from_millis(300)).await;
    must_win(spawn(&store, claim("later"))).await;
    leader.abort();
    assert!(leader.await.unwrap_err().is_cancelled());
    must_win(spawn(&store, claim("latest"))).await;
    open_gate(&schema).await;
    for claimed in followers.into_iter().chain([hanging]) {
        must_win(claimed).await;
    }
}

/// A leader's runtime is shut down while those of another one wait for it.
#[test]
#[ignore = "needs PostgreSQL: run scripts/test"]
fn a_runtime_that_goes_down_leaves_no_call_waiting() {
    let [one, two] = [(); 2].map(|()| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    });
    let (schema, store) = one.block_on(async {
        let schema = Schema::create().await;
        let store = schema.store().with_max_connections(16).with_grouping(Grouping::default());
        store.prepare().await.unwrap();
        close_gate(&schema).await;
        (schema, store)
    });
    let spawn_after = |runtime: &tokio::runtime::Runtime, key: &str| {
        let _runtime = runtime.enter();
        let claimed = spawn(&store, claim(key));
        std::thread::sleep(Duration::from_millis(5));
        claimed
    };
    let hanging = spawn_after(&one, "hangs");
    let _leader = spawn_after(&two, "y");
    let followers = [spawn_after(&one, "x"), spawn_after(&one, "z")];
    std::thread::sleep(Duration::from_millis(300));
    two.shutdown_background();
    one.block_on(async {
        open_gate(&schema).await;
        for claimed in followers.into_iter().chain([hanging]) {
            must_win(claimed).await;
        }
        drop(schema);
    });
}

/// Each call of a group on a server that is frozen learns that its outcome is unknown, and none tries a second time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_frozen_server_is_asked_once() {
    let server = tokio::task::block_in_place(Server::start);
    let pool = sqlx::PgPool::connect_lazy(&server.url()).unwrap();
    let timeout = Duration::from_secs(2);
    let store = PostgresStore::new(pool).with_statement_timeout(timeout).with_grouping(Grouping::default());
    win(&store, &claim("first")).await;
    server.pause();
    let claims: Vec<_> = (0..40).map(|number| claim(&format!("{number}"))).collect();
    let claimed: Vec<_> = claims.iter().map(|claim| spawn(&store, claim.clone())).collect();
    for claimed in claimed {
        let error = tokio::time::timeout(2 * timeout, claimed).await.expect("it asked again").unwrap();
        assert!(error.unwrap_err().is_retryable());
    }
    server.resume();
    for outcome in claim_all(&store, &claims).await {
        assert!(matches!(outcome, ClaimOutcome::Won { attempt_number: 1, .. }), "{outcome:?}");
    }
}

/// Of two consumers, the one that comes last is in the first group.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_storm_of_one_consumer_does_not_starve_another() {
    let schema = Schema::create().await;
    let store = schema.store().with_grouping(Grouping::with_max_rows(4));
    store.prepare().await.unwrap();
    let mut claims = JoinSet::new();
    for number in 0..40 {
        let (store, claim) = (store.clone(), claim_of("storm", &format!("{number}")));
        claims.spawn(async move { store.claim(&claim).await.unwrap() });
    }
    let (last, calm) = (store.clone(), claim_of("calm", "k"));
    claims.spawn(async move { last.claim(&calm).await.unwrap() });
    claims.join_all().await;
    let before = "SELECT count(*) FROM {s}.idempotency_records AS r, {s}.idempotency_records AS calm
                  WHERE calm.consumer = 'calm' AND r.xmin::text::bigint < calm.xmin::text::bigint";
    let before = schema.number(before).await;
    // The statement that was under way, and one more if that took long.
    assert!(before <= 5, "{before} of 40 went before");
}

fn spawn(store: &PostgresStore, claim: Claim) -> JoinHandle<Result<ClaimOutcome, StoreError>> {
    let store = store.clone();
    tokio::spawn(async move { store.claim(&claim).await })
}

fn complete(store: &PostgresStore, claim: &Claim) -> JoinHandle<Result<CompleteOutcome, StoreError>> {
    let (store, attempt) = (store.clone(), claim.attempt.clone());
    tokio::spawn(async move { store.complete(&attempt, Bytes::from_static(b"done")).await })
}

async fn must_win(claimed: JoinHandle<Result<ClaimOutcome, StoreError>>) {
    let outcome = tokio::time::timeout(Duration::from_secs(8), claimed).await.expect("an answer");
    let outcome = outcome.unwrap().unwrap();
    assert!(matches!(outcome, ClaimOutcome::Won { .. }), "{outcome:?}");
}

fn claim_of(consumer: &str, key: &str) -> Claim {
    let (consumer, key) = (Consumer::new(consumer).unwrap(), IdempotencyKey::new(key).unwrap());
    Claim::new(Attempt::new(consumer, key), Fingerprint::from_bytes("fingerprint"))
}

async fn lock(schema: &Schema, transaction: &mut Transaction<'static, Postgres>, key: &str) {
    run(
        schema,
        transaction,
        &format!("SELECT FROM {{s}}.idempotency_records WHERE key = '{key}' FOR UPDATE"),
    )
    .await;
}

/// Claims of the keys `hangs` and `z` hang until the gate is opened, whatever locks they may wait for.
async fn close_gate(schema: &Schema) {
    let sql = "
        CREATE TABLE {s}.gate AS SELECT TRUE AS closed;
        CREATE FUNCTION {s}.wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            WHILE EXISTS (SELECT FROM {s}.gate) LOOP PERFORM pg_sleep(0.02); END LOOP;
            RETURN NEW;
        END $$;
        CREATE TRIGGER gate BEFORE INSERT ON {s}.idempotency_records
            FOR EACH ROW WHEN (NEW.key IN ('hangs', 'z')) EXECUTE FUNCTION {s}.wait()";
    schema.run(sql).await;
}

async fn open_gate(schema: &Schema) {
    schema.run("DELETE FROM {s}.gate").await;
}

/// Inserts a record whose transaction stays open: a claim of the key waits for it.
async fn insert(schema: &Schema, transaction: &mut Transaction<'static, Postgres>, key: &str) {
    let sql = format!(
        "INSERT INTO {{s}}.idempotency_records (consumer, key, id, fingerprint, state, attempt_number, abandoned,
             max_abandoned, lease_until, created_at, expires_at)
         VALUES ('acme', '{key}', gen_random_uuid(), '', 'held', 1, 0, 5, now(), now(), now())"
    );
    run(schema, transaction, &sql).await;
}

async fn run(schema: &Schema, connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(schema.sql(sql)).execute(connection).await.unwrap();
}
