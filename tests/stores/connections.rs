//! The store's own connections: who closes them, which options they follow, and what no hook can change.

use std::{fs, path::Path, sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request, routing::post};
use bytes::Bytes;
use sqlx::{
    Executor, PgPool, SqlitePool,
    postgres::PgPoolOptions,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};
use tower::ServiceExt;
use tower_idempotency::{
    IdempotencyKey, IdempotencyLayer, PostgresStore, SqliteStore,
    store::{ClaimOutcome, CompleteOutcome, ConnectionMode, Store, StoreErrorKind},
};

use crate::{
    own_database::OwnDatabase,
    support::{
        claim, postgres::Postgres as Server, required_env, schema::Schema, sqlite::SqliteFile, wait_for, win,
    },
};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_leaves_no_session_after_a_close() {
    let database = OwnDatabase::create().await;
    let handle = IdempotencyLayer::new(database.store()).handle();
    handle.prepare().await.unwrap();
    assert_eq!(database.sessions().await, 1);
    handle.close().await;
    database.must_drop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_leaves_no_session_after_a_drain_that_has_served_requests() {
    let database = OwnDatabase::create().await;
    let layer = IdempotencyLayer::new(database.store());
    let handle = layer.handle();
    send_many(&layer).await;
    handle.drain(Duration::from_secs(10)).await.unwrap();
    database.must_drop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_leaves_no_session_when_the_layer_is_dropped() {
    let database = OwnDatabase::create().await;
    let layer = IdempotencyLayer::new(database.store());
    send_many(&layer).await;
    assert!(database.sessions().await > 0);
    drop(layer);
    database.must_drop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_closes_its_connections_with_the_given_pool() {
    let database = OwnDatabase::create().await;
    let pool = database.pool();
    let layer = IdempotencyLayer::new(pool.clone());
    send_many(&layer).await;
    pool.close().await;
    database.must_drop().await;
    drop(layer);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_drained_layer_leaves_the_store_to_the_others_over_it() {
    let database = OwnDatabase::create().await;
    let store = database.store();
    let [one, two] = [(); 2].map(|()| IdempotencyLayer::new(store.clone()));
    let mut claims = JoinSet::new();
    for key in 0..64 {
        let store = store.clone();
        claims.spawn(async move { win(&store, &claim(&format!("{key}"))).await });
    }
    one.handle().drain(Duration::from_secs(10)).await.unwrap();
    claims.join_all().await;
    win(&store, &claim("later")).await;
    two.handle().drain(Duration::from_secs(10)).await.unwrap();
    database.must_drop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_close_waits_for_the_calls_that_are_under_way() {
    let database = OwnDatabase::create().await;
    let store = database.store();
    store.prepare().await.unwrap();
    let pool = database.pool();
    let mut other = pool.begin().await.unwrap();
    other.execute("LOCK TABLE idempotency_records").await.unwrap();
    let waiting = store.clone();
    let claiming = tokio::spawn(async move { waiting.claim(&claim("k")).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let closing = store.clone();
    let closed = tokio::spawn(async move { closing.close().await });
    other.rollback().await.unwrap();
    assert!(matches!(claiming.await.unwrap().unwrap(), ClaimOutcome::Won { .. }));
    closed.await.unwrap();
    pool.close().await;
    database.must_drop().await;
}

/// As `#[sqlx::test]` does it: the pools of all tests take their permits from one.
#[tokio::test(flavor = "multi_thread", worker_threads = 16)]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_takes_no_permits_from_the_parent_of_the_given_pool() {
    let all = PgPoolOptions::new().max_connections(20).connect_lazy_with(crate::support::schema::server());
    let threads = Arc::new(Semaphore::new(12));
    let mut tests = JoinSet::new();
    for _ in 0..32 {
        let (all, threads) = (all.clone(), Arc::clone(&threads));
        tests.spawn(async move {
            let _thread = threads.acquire().await.unwrap();
            let database = OwnDatabase::create().await;
            let options = PgPoolOptions::new().max_connections(5).parent(all);
            let pool = options.connect_lazy_with(database.options());
            // As many permits as there are for everybody, held while the store works.
            let held = pool.acquire().await.unwrap();
            let layer = IdempotencyLayer::new(pool.clone());
            send_many(&layer).await;
            drop(held);
            pool.close().await;
            database.must_drop().await;
        });
    }
    tests.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_parent_that_has_no_permits_left_does_not_stop_the_store() {
    let database = OwnDatabase::create().await;
    let all = PgPoolOptions::new().max_connections(1).connect_lazy_with(database.options());
    let _held = all.acquire().await.unwrap();
    let pool = PgPoolOptions::new().max_connections(1).parent(all.clone());
    let store = PostgresStore::new(pool.connect_lazy_with(database.options()));
    win(&store, &claim("k")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_follows_a_password_that_changes() {
    let server = Server::start();
    let admin = PgPool::connect(&server.url()).await.unwrap();
    admin.execute(SCRAM_FOR_APP).await.unwrap();
    let options = |password| {
        server.url().parse::<sqlx::postgres::PgConnectOptions>().unwrap().username("app").password(password)
    };
    let pool = PgPoolOptions::new().max_connections(4).connect_lazy_with(options("one"));
    let store = PostgresStore::new(pool.clone());
    win(&store, &claim("before")).await;

    admin.execute("ALTER ROLE app PASSWORD 'two'").await.unwrap();
    admin
        .execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'")
        .await
        .unwrap();
    // The application has not heard of it: an idle connection is gone, a new one is refused.
    assert_eq!(store.claim(&claim("lost")).await.unwrap_err().kind(), StoreErrorKind::Ambiguous);
    let refused = store.claim(&claim("lost")).await.unwrap_err();
    assert!(refused.to_string().contains("set_connect_options"), "{refused}");
    pool.set_connect_options(options("two"));
    win(&store, &claim("after")).await;
}

#[tokio::test]
async fn sqlite_follows_the_options_of_the_given_pool() {
    let [one, two] = [(); 2].map(|()| SqliteFile::new());
    let pool = one.pool();
    let store = SqliteStore::new(pool.clone());
    store.prepare().await.unwrap();
    store.close().await;
    SqliteStore::new(two.pool()).migrate().await.unwrap();
    pool.set_connect_options(two.options());
    win(&store, &claim("k")).await;
    let records = "SELECT count(*) FROM idempotency_records";
    assert_eq!(sqlx::query_scalar::<_, i64>(records).fetch_one(&two.pool()).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn no_hook_of_the_given_pool_undoes_what_the_store_relies_on() {
    let schema = Schema::create().await;
    schema.store().migrate().await.unwrap();
    schema
        .run(
            "CREATE TABLE {s}.seen (settings text);
            CREATE FUNCTION {s}.note() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO {s}.seen SELECT concat_ws(' ', current_setting('plan_cache_mode'),
                    current_setting('enable_seqscan'), current_setting('enable_indexscan'),
                    current_setting('bytea_output'), current_setting('statement_timeout'),
                    current_setting('default_transaction_isolation'), current_setting('client_encoding'));
                RETURN NEW;
            END $$;
            CREATE TRIGGER note BEFORE INSERT ON {s}.idempotency_records FOR EACH ROW EXECUTE FUNCTION {s}.note()",
        )
        .await;
    let options = PgPoolOptions::new().max_connections(2).after_connect(|connection, _| {
        Box::pin(async move {
            connection
                .execute(
                    "SET plan_cache_mode = auto; SET enable_seqscan = on; SET enable_indexscan = off;
                    SET enable_bitmapscan = on; SET jit = on; SET bytea_output = escape; SET statement_timeout = 5000;
                    SET default_transaction_isolation = serializable; SET DateStyle = 'SQL, DMY';
                    SET IntervalStyle = sql_standard; SET TimeZone = 'Asia/Kolkata';
                    SET standard_conforming_strings = off; SET extra_float_digits = 0; SET row_security = off;
                    SET search_path = pg_temp; SET client_encoding = 'LATIN1'",
                )
                .await?;
            Ok(())
        })
    });
    let options = options
        .before_acquire(|_, _| Box::pin(async { Ok(false) }))
        .after_release(|_, _| Box::pin(async { Ok(false) }));
    let pool = options.connect_lazy_with(crate::support::schema::server());
    let store = PostgresStore::new(pool).with_schema(&schema.name).unwrap();
    works(&store).await;
    let seen: Vec<String> = sqlx::query_scalar(schema.sql("SELECT DISTINCT settings FROM {s}.seen"))
        .fetch_all(&schema.pool)
        .await
        .unwrap();
    assert_eq!(seen, ["force_generic_plan off on hex 9s read committed UTF8"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn no_setting_of_the_database_changes_what_the_store_reads() {
    for mode in [ConnectionMode::Direct, ConnectionMode::TransactionPooler] {
        let database = OwnDatabase::create().await;
        for setting in [
            "bytea_output = 'escape'",
            "\"DateStyle\" = 'SQL, DMY'",
            "\"IntervalStyle\" = 'sql_standard'",
            "\"TimeZone\" = 'Asia/Kolkata'",
            "standard_conforming_strings = off",
            "extra_float_digits = -15",
            "default_transaction_isolation = 'serializable'",
            "backslash_quote = off",
        ] {
            database.run(&format!("ALTER DATABASE {{d}} SET {setting}")).await.unwrap();
        }
        works(&database.store().with_connection_mode(mode)).await;
    }
    let database = OwnDatabase::create().await;
    database.run("ALTER DATABASE {d} SET bytea_output = 'escape'").await.unwrap();
    let bouncer: sqlx::postgres::PgConnectOptions = required_env("TEST_PGBOUNCER_URL").parse().unwrap();
    let pool = PgPoolOptions::new().connect_lazy_with(bouncer.database(&database.name));
    works(&PostgresStore::new(pool).with_connection_mode(ConnectionMode::TransactionPooler)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_consumer_that_the_encoding_lacks_is_refused_alone() {
    for mode in [ConnectionMode::Direct, ConnectionMode::TransactionPooler] {
        let encoding = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'";
        let database = OwnDatabase::create_with(encoding).await;
        let store = database.store().with_connection_mode(mode);
        let warnings = store.prepare().await.unwrap();
        assert!(warnings.iter().any(|warning| warning.contains("UTF8")), "{warnings:?}");
        works(&store).await;
        crate::support::must_name(&store.claim(&claim_of("顧客")).await.unwrap_err(), "UTF8");
        win(&store, &claim_of("Müller")).await;
        let record =
            store.get(&consumer("Müller"), &IdempotencyKey::new("k").unwrap()).await.unwrap().unwrap();
        assert_eq!(record.consumer, consumer("Müller"));
    }
    for mode in [ConnectionMode::Direct, ConnectionMode::TransactionPooler] {
        let database =
            OwnDatabase::create_with("ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
                .await;
        let store = database.store().with_connection_mode(mode);
        win(&store, &claim_of("顧客")).await;
        let record = store.get(&consumer("顧客"), &IdempotencyKey::new("k").unwrap()).await.unwrap().unwrap();
        assert_eq!(record.consumer, consumer("顧客"));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_without_a_free_connection_is_named_and_recovers() {
    let database = OwnDatabase::create().await;
    let role = format!("r_{}", database.name);
    for limit in ["ALTER ROLE {r} CONNECTION LIMIT 0", "ALTER DATABASE {d} CONNECTION LIMIT 0"] {
        database.store().migrate().await.unwrap();
        let sql = format!(
            "DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN; GRANT pg_write_all_data, pg_read_all_data TO {role}"
        );
        database.run(&sql).await.unwrap();
        database.run(&limit.replace("{r}", &role)).await.unwrap();
        let pool = PgPoolOptions::new().connect_lazy_with(database.options().username(&role));
        let store = PostgresStore::new(pool);
        let refused =
            timeout(Duration::from_secs(8), store.claim(&claim(limit))).await.expect("it does not hang");
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), StoreErrorKind::Unavailable, "{refused:?}");
        assert!(refused.to_string().contains("max_connections"), "{refused}");
        database.run(&limit.replace("{r}", &role).replace("LIMIT 0", "LIMIT -1")).await.unwrap();
        win(&store, &claim(limit)).await;
    }
    database.must_drop_by_force().await;
    database.run(&format!("DROP ROLE {role}")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_leaves_the_database_file_alone_after_a_close() {
    let (folder, pool) = sqlite();
    let layer = IdempotencyLayer::new(pool.clone());
    send_many(&layer).await;
    pool.close().await;
    layer.handle().close().await;
    assert_eq!(files(folder.path()), ["app.db"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_leaves_the_database_file_alone_after_a_drain() {
    let (folder, pool) = sqlite();
    let layer = IdempotencyLayer::new(pool);
    send_many(&layer).await;
    layer.handle().drain(Duration::from_secs(10)).await.unwrap();
    assert_eq!(files(folder.path()), ["app.db"]);
    // The handle still answers, and closes again.
    layer.handle().list(tower_idempotency::store::RecordFilter::Held, 1).await.unwrap();
    layer.handle().close().await;
    assert_eq!(files(folder.path()), ["app.db"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_leaves_the_database_file_alone_when_the_layer_is_dropped_or_the_pool_closed() {
    for drops in [true, false] {
        let (folder, pool) = sqlite();
        let mut layer = Some(IdempotencyLayer::new(pool.clone()));
        send_many(layer.as_ref().unwrap()).await;
        if drops {
            layer = None;
        } else {
            pool.close().await;
        }
        let only = || (files(folder.path()) == ["app.db"]).then_some(());
        tokio::task::block_in_place(|| wait_for("the files beside the database to go", only));
        drop(layer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_refuses_a_pool_that_chooses_another_journal_mode() {
    use sqlx::sqlite::SqliteJournalMode::{Delete, Memory, Off, Persist, Truncate};
    for mode in [Delete, Memory, Off, Persist, Truncate] {
        let file = SqliteFile::new();
        must_refuse(SqlitePoolOptions::new(), file.options().journal_mode(mode), "journal_mode").await;
    }
    let hook = SqlitePoolOptions::new().after_connect(|connection, _| {
        Box::pin(async { connection.execute("PRAGMA journal_mode = DELETE").await.map(drop) })
    });
    must_refuse(hook, SqliteFile::new().options(), "journal_mode").await;
    let file = SqliteFile::new();
    let wal = file.options().journal_mode(sqlx::sqlite::SqliteJournalMode::Wal);
    win(&SqliteStore::new(SqlitePool::connect_lazy_with(wal)), &claim("k")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_refuses_a_pool_that_keeps_the_file_for_itself() {
    for opened_before in [false, true] {
        let file = SqliteFile::new();
        let exclusive = file.options().locking_mode(sqlx::sqlite::SqliteLockingMode::Exclusive);
        let hook = SqlitePoolOptions::new().after_connect(|connection, _| {
            Box::pin(async { connection.execute("PRAGMA locking_mode = EXCLUSIVE").await.map(drop) })
        });
        for (options, connect) in [(SqlitePoolOptions::new(), exclusive), (hook, file.options())] {
            let pool = options.max_connections(1).connect_lazy_with(connect);
            if opened_before {
                pool.execute("CREATE TABLE IF NOT EXISTS t (a); INSERT INTO t VALUES (1)").await.unwrap();
            }
            let store = SqliteStore::new(pool.clone());
            crate::support::must_name(&store.prepare().await.unwrap_err(), "EXCLUSIVE");
            store.close().await;
            pool.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_works_whatever_the_hooks_of_the_given_pool_set() {
    let file = SqliteFile::new();
    let options = SqlitePoolOptions::new().max_connections(2).after_connect(|connection, _| {
        Box::pin(async {
            let pragmas = "PRAGMA synchronous = OFF; PRAGMA busy_timeout = 0; PRAGMA query_only = ON;
                PRAGMA foreign_keys = OFF; PRAGMA recursive_triggers = ON; PRAGMA case_sensitive_like = ON";
            connection.execute(pragmas).await.map(drop)
        })
    });
    let options = options
        .before_acquire(|_, _| Box::pin(async { Ok(false) }))
        .after_release(|_, _| Box::pin(async { Ok(false) }));
    let pool =
        options.connect_lazy_with(file.options().pragma("query_only", "ON").busy_timeout(Duration::ZERO));
    works(&SqliteStore::new(pool)).await;
}

async fn must_refuse(options: SqlitePoolOptions, connect: SqliteConnectOptions, reason: &str) {
    let store = SqliteStore::new(options.connect_lazy_with(connect));
    crate::support::must_name(&store.prepare().await.unwrap_err(), reason);
}

/// Every kind of statement succeeds, and what is stored is read as it was.
async fn works(store: &impl Store) {
    let done = claim("done");
    win(store, &done).await;
    let response = Bytes::from((0..=255).collect::<Vec<u8>>());
    let completed = store.complete(&done.attempt, response.clone()).await.unwrap();
    assert!(matches!(completed, CompleteOutcome::Completed), "{completed:?}");
    let ClaimOutcome::Exists(record) = store.claim(&claim("done")).await.unwrap() else {
        panic!("it exists")
    };
    assert_eq!(record.fingerprint, done.fingerprint);
    assert!(
        matches!(&record.state, tower_idempotency::store::RecordState::Completed { response: stored, .. } if *stored == response),
        "{record:?}"
    );
    let held = claim("held");
    win(store, &held).await;
    let renewal = tower_idempotency::store::Renewal::new(held.attempt.clone(), Duration::from_secs(30));
    store.renew(&[renewal]).await.unwrap();
    store.hold(&held.attempt).await.unwrap();
    let recovery = store.recovery().unwrap();
    recovery.take_dangling(&["bank".to_owned()], 10, Duration::from_secs(1)).await.unwrap();
    store.purge(10).await.unwrap();
    assert!(store.evict(&held.attempt.consumer, &held.attempt.key).await.unwrap());
}

/// Sends 16 requests simultaneously, which open several connections.
async fn send_many(layer: &IdempotencyLayer) {
    let router = Router::new().route("/", post(|| async { "done" })).layer(layer.clone());
    let mut requests = JoinSet::new();
    for key in 0..16 {
        let request = Request::post("/").header("idempotency-key", key.to_string());
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(consumer("acme"));
        requests.spawn(router.clone().oneshot(request));
    }
    for response in requests.join_all().await {
        let response = response.unwrap();
        assert_eq!(response.status(), 200, "{response:?}");
    }
}

fn consumer(name: &str) -> tower_idempotency::Consumer {
    tower_idempotency::Consumer::new(name).unwrap()
}

fn claim_of(name: &str) -> tower_idempotency::store::Claim {
    let mut claim = claim("k");
    claim.attempt = tower_idempotency::store::Attempt::new(consumer(name), IdempotencyKey::new("k").unwrap());
    claim
}

fn sqlite() -> (tempfile::TempDir, SqlitePool) {
    let folder = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new().filename(folder.path().join("app.db")).create_if_missing(true);
    (folder, SqlitePoolOptions::new().max_connections(4).connect_lazy_with(options))
}

fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// Lets the account `app` in with its password only.
const SCRAM_FOR_APP: &str = "
    CREATE ROLE app LOGIN PASSWORD 'one';
    GRANT ALL ON SCHEMA public TO app;
    DO $$ BEGIN
        EXECUTE format($q$ COPY (VALUES ('host all app 127.0.0.1/32 scram-sha-256'), ('host all all 127.0.0.1/32 trust'))
            TO %L $q$, current_setting('hba_file'));
    END $$;
    SELECT pg_reload_conf()";
