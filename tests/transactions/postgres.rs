//! What only PostgreSQL does: settings of a session, isolation, pools of connections.

use std::{sync::Arc, time::Duration};

use axum::{http::StatusCode, response::Response};
use sqlx::{
    AssertSqlSafe, Connection, PgPool, Postgres, Row,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{sync::Barrier, time::sleep};
use tower_idempotency::{
    IdempotencyLayer, PostgresStore, RejectionCode, TransactionOptions, Tx,
    layer::Strategy,
    store::{ConnectionMode, IsolationLevel},
};
use uuid::Uuid;

use crate::{
    bank::{Answered, Bank, CHARGE, Db, End, LONG, Node, charge, charge_once, unique},
    support::{direct::Answer, required_env},
};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_statement_that_failed_spoils_the_transaction_even_if_the_handler_succeeds() {
    let bank = Bank::<Postgres>::open().await;
    let handler = |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        Postgres::run(&mut tx, "INSERT INTO charges (amount) VALUES (NULL)").await.unwrap_err();
        unique(StatusCode::CREATED)
    };
    let node = bank.node(bank.layer(), handler);
    bank.check(&node, RejectionCode::TransactionFailed, 0, End::Released).await;
    let handler = |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        Postgres::run(&mut tx, "SELECT 1 / 0").await.unwrap_err();
        unique(StatusCode::UNPROCESSABLE_ENTITY)
    };
    bank.check(&bank.node(bank.layer(), handler), 422, 0, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn whatever_the_handler_sets_the_record_is_completed() {
    for setting in [
        "SET search_path TO nowhere",
        "SET LOCAL search_path TO pg_catalog",
        "SET LOCAL statement_timeout = '2s'; SET LOCAL lock_timeout = '1ms'",
        "SET LOCAL enable_indexscan = off; SET LOCAL enable_seqscan = on",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "SET LOCAL standard_conforming_strings = off; SET LOCAL bytea_output = 'escape'",
    ] {
        let (bank, node) = bank_after(setting).await;
        bank.check(&node, 201, 1, End::Stored).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_gives_up_its_role_or_all_settings_is_rolled_back() {
    let role = format!("r_{}", Uuid::new_v4().simple());
    let watcher = Bank::<Postgres>::open().await;
    watcher.run(&format!("CREATE ROLE {role}")).await;
    for setting in ["SET ROLE", "SET LOCAL ROLE"] {
        let (bank, node) = bank_after(&format!("{setting} {role}")).await;
        bank.check(&node, Answered::Final(RejectionCode::TransactionFailed), 0, End::Released).await;
    }
    let (bank, node) = bank_after("RESET ALL").await;
    bank.check(&node, RejectionCode::TransactionFailed, 0, End::Released).await;
    let (bank, node) = bank_after(&format!("SET LOCAL ROLE {role}; RESET ROLE")).await;
    bank.check(&node, 201, 1, End::Stored).await;
    watcher.run(&format!("DROP ROLE {role}")).await;
}

/// A handler that charges and then sends a statement, on a pool of one connection: what is set for the session meets the
/// next user.
async fn bank_after(setting: &str) -> (Bank<Postgres>, Node) {
    println!("{setting}");
    let bank = Bank::<Postgres>::open().await.with_connections(1);
    let setting = setting.to_owned();
    let handler = move |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        Postgres::run(&mut tx, &setting).await.unwrap();
        unique(StatusCode::CREATED)
    };
    let node = bank.node(bank.layer(), handler);
    (bank, node)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn at_every_isolation_level_a_handler_may_outlive_its_lease() {
    use IsolationLevel::{ReadCommitted, RepeatableRead, Serializable};

    let levels = [None, Some(ReadCommitted), Some(RepeatableRead), Some(Serializable)];
    let runs: Vec<_> = levels.map(|level| tokio::spawn(outlive_the_lease(level))).into();
    for run in runs {
        run.await.unwrap();
    }
}

async fn outlive_the_lease(level: Option<IsolationLevel>) {
    let bank = Bank::<Postgres>::open().await;
    let options = TransactionOptions::default().with_idle_timeout(LONG).with_statement_timeout(LONG);
    let options = level.into_iter().fold(options, TransactionOptions::with_isolation);
    let layer = || bank.layer().with_lease(Duration::from_secs(1)).with_transactions(options.clone());
    let handler = |mut tx: Tx<Postgres>| async move {
        Postgres::run(&mut tx, "UPDATE accounts SET balance = balance - 20 WHERE id = 1").await.unwrap();
        sleep(Duration::from_secs(3)).await;
        charge_once(tx).await
    };
    let node = bank.node(layer(), handler);
    let neighbour = bank.node(layer(), handler);
    let first = node.start("k");
    while !first.is_finished() {
        // The first may arrive before the request that it is to repeat.
        if node.runs.get() > 0 {
            let retry = neighbour.send("k").await;
            assert!(retry.rejection == Some(RejectionCode::InProgress) || retry.is_replay(), "{retry:?}");
        }
        sleep(Duration::from_millis(50)).await;
    }
    let first = first.await.unwrap();
    assert_eq!((first.status, first.rejection), (StatusCode::CREATED, None), "{level:?}");
    first.assert_same_replay(&neighbour.send("k").await);
    assert_eq!((bank.charges().await, node.runs.get(), neighbour.runs.get()), (1, 1, 0));
    assert_eq!(bank.number("SELECT balance FROM accounts WHERE id = 1").await, 80);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn of_two_serializable_handlers_that_contradict_each_other_one_is_told_to_try_again() {
    let bank = Bank::<Postgres>::open().await;
    let barrier = Arc::new(Barrier::new(2));
    // Each sees 200 in both accounts, of which at least 100 must stay.
    let withdraw = |account: u8| {
        let barrier = Arc::clone(&barrier);
        bank.node(serializable(&bank), move |mut tx: Tx<Postgres>| async move {
            let sum = Postgres::number(&mut tx, "SELECT sum(balance) FROM accounts").await.unwrap();
            barrier.wait().await;
            if sum < 200 {
                return unique(StatusCode::UNPROCESSABLE_ENTITY);
            }
            let withdrawal = format!("UPDATE accounts SET balance = balance - 100 WHERE id = {account}");
            answer_to(Postgres::run(&mut tx, &withdrawal).await)
        })
    };
    let nodes = [withdraw(1), withdraw(2)];
    let answers = [nodes[0].start("0"), nodes[1].start("1")];
    one_fails_and_tries_again(nodes, answers).await;
    assert_eq!(bank.number("SELECT sum(balance) FROM accounts").await, 100);
    // The retry charges.
    assert_eq!(bank.charges().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn of_two_handlers_in_a_deadlock_one_is_told_to_try_again() {
    let bank = Bank::<Postgres>::open().await;
    let barrier = Arc::new(Barrier::new(2));
    let transfer = |from: u8, to: u8| {
        let barrier = Arc::clone(&barrier);
        bank.node(bank.layer(), move |mut tx: Tx<Postgres>| async move {
            let take = format!("UPDATE accounts SET balance = balance - 10 WHERE id = {from}");
            Postgres::run(&mut tx, &take).await.unwrap();
            barrier.wait().await;
            let give = format!("UPDATE accounts SET balance = balance + 10 WHERE id = {to}");
            answer_to(Postgres::run(&mut tx, &give).await)
        })
    };
    let nodes = [transfer(1, 2), transfer(2, 1)];
    let answers = [nodes[0].start("0"), nodes[1].start("1")];
    one_fails_and_tries_again(nodes, answers).await;
    assert_eq!(bank.number("SELECT sum(balance) FROM accounts").await, 200);
    assert_eq!(bank.number("SELECT max(balance) FROM accounts").await, 110);
    assert_eq!(bank.charges().await, 1);
}

async fn one_fails_and_tries_again(nodes: [Node; 2], answers: [tokio::task::JoinHandle<Answer>; 2]) {
    let mut failed = 0;
    for (number, (node, answer)) in nodes.iter().zip(answers).enumerate() {
        let (answer, key) = (answer.await.unwrap(), number.to_string());
        if answer.status != StatusCode::CREATED {
            let own = answer.status == StatusCode::INTERNAL_SERVER_ERROR && answer.rejection.is_none();
            assert!(own || answer.rejection == Some(RejectionCode::TransactionConflict), "{answer:?}");
            assert_eq!(answer.rejection.is_some(), answer.headers.contains_key("retry-after"));
            node.until(&key, End::Released).await;
            assert_eq!(node.send(&key).await.status, StatusCode::CREATED);
            failed += 1;
        }
        assert!(node.send(&key).await.is_replay());
    }
    assert_eq!(failed, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn serializable_handlers_of_different_keys_rarely_collide() {
    let bank = Bank::<Postgres>::open().await.with_connections(32);
    let earlier = bank.node(bank.layer(), charge_once::<Postgres>);
    assert_eq!(earlier.send("earlier").await.status, StatusCode::CREATED);
    // Keys that share a page of the index collide now and then, so there are many pages.
    bank.run(
        "INSERT INTO idempotency_records
         SELECT (jsonb_populate_record(r, jsonb_build_object('key', gen_random_uuid(), 'id', gen_random_uuid()))).*
         FROM idempotency_records AS r, generate_series(1, 50000)",
    )
    .await;
    bank.run("DELETE FROM charges").await;
    bank.run("ANALYZE").await;
    let tasks: Vec<_> = (0..200)
        .map(|_| {
            let node = bank.node(serializable(&bank), |mut tx: Tx<Postgres>| async move {
                charge(&mut tx).await;
                sleep(Duration::from_millis(20)).await;
                unique(StatusCode::CREATED)
            });
            node.start(Uuid::new_v4())
        })
        .collect();
    let mut conflicts = 0;
    for task in tasks {
        let answer = task.await.unwrap();
        let conflict = answer.rejection == Some(RejectionCode::TransactionConflict);
        assert!(conflict || answer.status == StatusCode::CREATED, "{answer:?}");
        conflicts += i64::from(conflict);
    }
    println!("{conflicts} of 200 serializable handlers collided");
    assert_eq!(bank.charges().await, 200 - conflicts);
    assert!(conflicts < 50, "{conflicts} of 200");
}

fn serializable(bank: &Bank<Postgres>) -> IdempotencyLayer {
    let options = TransactionOptions::default().with_isolation(IsolationLevel::Serializable);
    bank.layer().with_transactions(options)
}

fn answer_to(written: Result<(), sqlx::Error>) -> Response {
    unique(written.map_or(StatusCode::INTERNAL_SERVER_ERROR, |()| StatusCode::CREATED))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_pool_of_one_connection_serves_many_handlers() {
    let bank = Bank::<Postgres>::open().await.with_connections(1);
    let node = bank.node(bank.layer(), charge_once::<Postgres>);
    let answers: Vec<_> = (0..10).map(|number| node.start(number.to_string())).collect();
    for answer in answers {
        assert_eq!(answer.await.unwrap().status, StatusCode::CREATED);
    }
    assert_eq!((bank.charges().await, bank.pool.size()), (10, 1));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn what_somebody_left_in_a_connection_of_the_pool_is_not_committed() {
    for left in [STALE, "BEGIN; SELECT count(*) FROM charges", "BEGIN; SELECT 1 FROM accounts FOR UPDATE"] {
        let bank = Bank::<Postgres>::open().await.with_connections(1);
        leave_open(&bank.pool, left).await;
        bank.check(&bank.node(bank.layer(), charge_once::<Postgres>), 201, 1, End::Stored).await;
        leave_open(&bank.pool, left).await;
        bank.check(&bank.node(serializable(&bank), charge_once::<Postgres>), 201, 1, End::Stored).await;
        assert_eq!(bank.number("SELECT sum(amount) FROM charges").await, 4000, "{left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_connection_that_somebody_left_in_a_failed_transaction_is_used_again() {
    let bank = Bank::<Postgres>::open().await.with_connections(1);
    let mut connection = bank.pool.acquire().await.unwrap();
    Postgres::run(&mut connection, "BEGIN; SELECT 1 / 0").await.unwrap_err();
    drop(connection);
    let node = bank.node(bank.layer(), charge_once::<Postgres>);
    bank.check(&node, 201, 1, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_guarded_pool_closes_connections_that_were_left_in_a_transaction() {
    let bank = Bank::<Postgres>::open().await;
    let options = PostgresStore::guard_pool(PgPoolOptions::new().max_connections(1));
    let pool = options.connect_lazy_with(bank.pool.connect_options().as_ref().clone());
    let process = "SELECT pg_backend_pid()";
    let process_of = async || Postgres::number(&mut *pool.acquire().await.unwrap(), process).await.unwrap();
    let first = process_of().await;
    assert_eq!(process_of().await, first);
    leave_open(&pool, STALE).await;
    let second = process_of().await;
    assert_ne!(second, first);
    Postgres::run(&mut *pool.acquire().await.unwrap(), CHARGE).await.unwrap();
    assert_eq!(bank.number("SELECT sum(amount) FROM charges").await, 2000);
    assert_eq!(process_of().await, second);
}

/// Gives a connection back to its pool inside of a transaction.
async fn leave_open(pool: &PgPool, statements: &str) {
    let mut connection = pool.acquire().await.unwrap();
    Postgres::run(&mut connection, statements).await.unwrap();
    assert!(!connection.is_in_transaction(), "sqlx would roll it back");
}

const STALE: &str = "BEGIN; INSERT INTO charges (amount) VALUES (666)";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn behind_a_transaction_pooler_no_prepared_statement_is_left_behind() {
    let bank = Bank::<Postgres>::open().await;
    let options: PgConnectOptions = required_env("TEST_PGBOUNCER_URL").parse().unwrap();
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect_lazy_with(options.statement_cache_capacity(0).extra_float_digits(None));
    let store = PostgresStore::new(pool.clone()).with_schema(&bank.home.name).unwrap();
    let store = store.with_connection_mode(ConnectionMode::TransactionPooler);
    let strategies = [Strategy::Claimed, Strategy::SingleTransaction];
    for (status, strategy) in
        [201, 422, 500].into_iter().flat_map(|status| strategies.map(|way| (status, way)))
    {
        let insert = Arc::new(format!("INSERT INTO {}.charges (amount) VALUES ($1)", bank.home.name));
        let layer = IdempotencyLayer::new(store.clone()).with_lease(LONG).with_strategy(strategy);
        let handler = async move |mut tx: Tx<Postgres>| {
            let charge = sqlx::query(AssertSqlSafe(insert.as_str())).bind(2000).persistent(false);
            charge.execute(&mut *tx).await.unwrap();
            unique(StatusCode::from_u16(status).unwrap())
        };
        let router = axum::Router::new().route("/charges", axum::routing::post(handler));
        let node = Node::new(layer, router, Default::default());
        let answers: Vec<_> = (0..20)
            .map(|number| node.start(format!("{strategy:?}-{status}-{number}").to_lowercase()))
            .collect();
        for (number, answer) in answers.into_iter().enumerate() {
            let (answer, key) =
                (answer.await.unwrap(), format!("{strategy:?}-{status}-{number}").to_lowercase());
            assert_eq!((answer.status.as_u16(), answer.rejection), (status, None), "{:?}", answer.body);
            match status {
                500 => assert_eq!(node.end(&key).await, Some(End::Released)),
                _ => answer.assert_same_replay(&node.send(&key).await),
            }
        }
    }
    assert_eq!(bank.charges().await, 40);
    let options = pool.connect_options().as_ref().clone();
    let all = PgPoolOptions::new().max_connections(10).connect_lazy_with(options);
    // Each is in a transaction, so that the pooler gives it a server connection of its own.
    let mut connections = Vec::new();
    for _ in 0..10 {
        let mut connection = all.acquire().await.unwrap();
        Postgres::run(&mut connection, "BEGIN").await.unwrap();
        let statement = "SELECT count(*)::text AS prepared FROM pg_prepared_statements WHERE name <> ''";
        let row = sqlx::raw_sql(statement).fetch_one(&mut *connection).await.unwrap();
        assert_eq!(row.get::<&str, _>("prepared"), "0");
        connections.push(connection);
    }
}
