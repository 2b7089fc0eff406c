//! Servers that are killed, frozen, ended and have a wrong clock while a request runs.

use std::{process::Command, time::Duration};

use tower_idempotency::{
    Consumer, IdempotencyKey,
    store::{RecordState, Resolution, ResolveOutcome, StoredBody, StoredResponse},
};

use crate::support::{
    app::{Answer, send_until_not},
    database::Database,
    http::{RawConnection, request},
    server::Server,
};

/// Writes its charge at once. Long enough for its server to be killed in it, and shorter than the lease, after which
/// PostgreSQL ends a transaction that does nothing.
const SLOW: &str = "/charges?delay_ms=2000";
const LEASE: (&str, &str) = ("LEASE_MS", "3000");
/// For SQLite, where a transaction may otherwise be open for a third of the lease.
const LIMIT: (&str, &str) = ("TRANSACTION_LIMIT_MS", "60000");

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_server_was_killed_runs_again_after_the_lease_sqlite() {
    a_request_whose_server_was_killed_runs_again_after_the_lease(Database::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_request_whose_server_was_killed_runs_again_after_the_lease_postgres() {
    a_request_whose_server_was_killed_runs_again_after_the_lease(Database::postgres().await).await;
}

async fn a_request_whose_server_was_killed_runs_again_after_the_lease(database: Database) {
    let mut first = database.server(&[LEASE, LIMIT]);
    let second = database.server(&[LEASE, LIMIT]);
    let _client = start(&first).await;
    database.until_charging(1).await;
    first.kill9();
    charge(&second).await.assert_refused("in-progress");
    assert_eq!(database.charges().await, 0);
    let again = send_until_not(&["in-progress"], || charge(&second)).await;
    assert!(again.is_first(), "{again:?}");
    assert_only_charge(&second, &again).await;
    first.start_again();
    for server in [&first, &second] {
        let retry = charge(server).await;
        assert!(retry.is_replay() && retry.body == again.body, "{retry:?}");
    }
    assert_only_charge(&first, &again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_server_was_killed_is_held_until_it_is_resolved_sqlite() {
    a_request_whose_server_was_killed_is_held_until_it_is_resolved(Database::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_request_whose_server_was_killed_is_held_until_it_is_resolved_postgres() {
    a_request_whose_server_was_killed_is_held_until_it_is_resolved(Database::postgres().await).await;
}

async fn a_request_whose_server_was_killed_is_held_until_it_is_resolved(database: Database) {
    let variables = [LEASE, LIMIT, ("ABANDONED", "hold")];
    let mut first = database.server(&variables);
    let second = database.server(&variables);
    let _client = start(&first).await;
    database.until_charging(1).await;
    first.kill9();
    let operator = database.handle();
    let (consumer, key) = acme();
    let resolve = |resolution| operator.resolve(&consumer, &key, resolution);
    assert_eq!(resolve(Resolution::Release).await.unwrap(), ResolveOutcome::InProgress);
    charge(&second).await.assert_refused("in-progress");
    let held = send_until_not(&["in-progress"], || charge(&second)).await;
    held.assert_refused("outcome-unknown");
    assert_eq!(held.status, 409);
    first.start_again();
    charge(&first).await.assert_refused("outcome-unknown");
    assert_eq!(database.charges().await, 0);

    assert_eq!(resolve(Resolution::Release).await.unwrap(), ResolveOutcome::Resolved);
    let again = charge(&second).await;
    assert!(again.is_first(), "{again:?}");
    let retry = charge(&first).await;
    assert!(retry.is_replay() && retry.body == again.body, "{retry:?}");
    assert_only_charge(&first, &again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_give_the_answer_of_a_killed_server_sqlite() {
    let database = Database::sqlite();
    let variables = [LEASE, LIMIT, ("ABANDONED", "hold")];
    let mut first = database.server(&variables);
    let _client = start(&first).await;
    database.until_charging(1).await;
    first.kill9();
    first.start_again();
    send_until_not(&["in-progress"], || charge(&first)).await.assert_refused("outcome-unknown");
    let (consumer, key) = acme();
    let found = StoredResponse::new(http::StatusCode::CREATED, http::HeaderMap::new(), "{}");
    let resolution = Resolution::complete(&found);
    let outcome = database.handle().resolve(&consumer, &key, resolution).await.unwrap();
    assert_eq!(outcome, ResolveOutcome::Resolved);
    let retry = charge(&first).await;
    assert!(retry.is_replay() && retry.body == "{}", "{retry:?}");
    assert_eq!(database.charges().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_frozen_in_its_transaction_lets_nobody_write_and_then_completes_it_sqlite() {
    let database = Database::sqlite();
    let variables = [LEASE, LIMIT, ("STORE_TIMEOUT_MS", "1000")];
    let (first, second) = (database.server(&variables), database.server(&variables));
    let mut client = start(&first).await;
    database.until_charging(1).await;
    first.stop();
    let kept_out = send_until_not(&["in-progress"], || charge(&second)).await;
    kept_out.assert_refused("store-unavailable");
    assert_eq!(database.charges().await, 0);
    first.cont();
    let late = Answer::from(client.read().await);
    assert!(late.is_first(), "{late:?}");
    assert_stays(&database, &[&first, &second], &late, Attempts { made: 1, abandoned: 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_that_was_frozen_answers_with_its_successors_response_postgres() {
    let database = Database::postgres().await;
    let (first, second) = (database.server(&[LEASE]), database.server(&[LEASE]));
    let mut client = start(&first).await;
    database.until_charging(1).await;
    first.stop();
    let successor = send_until_not(&["in-progress"], || charge(&second)).await;
    assert!(successor.is_first(), "{successor:?}");
    first.cont();
    let late = Answer::from(client.read().await);
    assert!(late.is_replay() && late.body == successor.body, "{late:?}");
    assert_stays(&database, &[&first, &second], &successor, TAKEN_OVER).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_that_wakes_up_while_its_successor_runs_does_not_contradict_it_postgres() {
    let database = Database::postgres().await;
    let (first, second) = (database.server(&[LEASE]), database.server(&[LEASE]));
    let mut client = start(&first).await;
    database.until_charging(1).await;
    first.stop();
    let successor = async { send_until_not(&["in-progress"], || charge(&second)).await };
    let wake = async {
        database.until_charging(2).await;
        first.cont();
        Answer::from(client.read().await)
    };
    let (successor, late) = tokio::join!(successor, wake);
    assert!(successor.is_first(), "{successor:?}");
    // Its own handler may end before its successor's or after it. The server has ended its transaction either way.
    let replayed = late.is_replay() && late.body == successor.body;
    assert!(replayed || late.is_refused("transaction-lost"), "{late:?}");
    assert_stays(&database, &[&first, &second], &successor, TAKEN_OVER).await;
}

/// Checks that all servers replay this answer, that it is stored and that its charge is the only one.
async fn assert_stays(database: &Database, servers: &[&Server], answer: &Answer, attempts: Attempts) {
    for server in servers {
        let retry = charge(server).await;
        assert!(retry.is_replay() && retry.body == answer.body, "{retry:?}");
        assert_only_charge(server, answer).await;
    }
    let (consumer, key) = acme();
    let record = database.handle().get(&consumer, &key).await.unwrap().unwrap();
    let StoredBody::Kept { data, .. } = record.response().unwrap().unwrap().body else {
        panic!("{record:?}")
    };
    assert_eq!(data, answer.body);
    assert_eq!(Attempts { made: record.attempt_number, abandoned: record.abandoned }, attempts);
}

/// Checks that the charge that the answer tells of is there, and no other.
async fn assert_only_charge(server: &Server, answer: &Answer) {
    let charge: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(server.get("/charges", &[]).await.json(), serde_json::json!([charge]));
}

/// How often the handler of a request was run.
#[derive(Debug, PartialEq)]
struct Attempts {
    made: u32,
    abandoned: u16,
}

const TAKEN_OVER: Attempts = Attempts { made: 2, abandoned: 1 };

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_asked_to_end_finishes_the_request_of_a_client_that_has_left_sqlite() {
    let database = Database::sqlite();
    ends_after_the_request_of_a_client_that_has_left(&database).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_that_is_asked_to_end_finishes_the_request_of_a_client_that_has_left_postgres() {
    let database = Database::postgres().await;
    ends_after_the_request_of_a_client_that_has_left(&database).await;
}

async fn ends_after_the_request_of_a_client_that_has_left(database: &Database) {
    let mut server = database.server(&[LEASE, LIMIT]);
    let client = start(&server).await;
    database.until_charging(1).await;
    client.reset();
    let status = server.terminate();
    assert_eq!(status.code(), Some(0), "{}", server.log());
    let (consumer, key) = acme();
    let record = database.handle().get(&consumer, &key).await.unwrap().unwrap();
    assert!(matches!(record.state, RecordState::Completed { .. }), "{record:?}");
    server.start_again();
    let retry = charge(&server).await;
    assert!(retry.is_replay(), "{retry:?}");
    assert_eq!(database.charges().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_server_whose_clock_is_ahead_cannot_take_a_live_lease_postgres() {
    let database = Database::postgres().await;
    let first = database.server(&[LEASE, LIMIT]);
    let preload = clock_ahead_by_two_minutes();
    let ahead =
        [LEASE, ("LD_PRELOAD", &preload), ("FAKETIME", "+120s"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    let second = database.server(&ahead);
    let mut client = start(&first).await;
    database.until_charging(1).await;
    let retry = async { send_until_not(&["in-progress"], || charge(&second)).await };
    let (retry, first_answer) = tokio::join!(retry, client.read());
    let first_answer = Answer::from(first_answer);
    assert!(first_answer.is_first() && retry.is_replay(), "{first_answer:?} {retry:?}");
    assert_eq!(retry.body, first_answer.body);
    assert_eq!(database.charges().await, 1);

    // The clock is really ahead: a charge says when it was made.
    let created_at = |answer: Answer| {
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap()["created_at"].as_i64()
    };
    let other = Answer::from(second.charge("/charges", "other").await);
    assert!(created_at(other) > created_at(first_answer).map(|at| at + 100));
}

/// The library that the program `faketime` loads.
fn clock_ahead_by_two_minutes() -> String {
    let output = Command::new("faketime").args(["-f", "+120s", "printenv", "LD_PRELOAD"]).output();
    let output = output.expect("faketime is installed; scripts/test does that");
    String::from_utf8(output.stdout).expect("a path is UTF-8").trim().to_owned()
}

/// Sends the request and leaves it running.
async fn start(server: &Server) -> RawConnection {
    let mut client = RawConnection::open(server.address()).await;
    let headers = [
        ("content-type", "application/json"),
        ("connection", "close"),
        ("x-api-key", "acme-key"),
        ("idempotency-key", "key"),
    ];
    client.send(request("POST", SLOW, &headers, r#"{"amount":2000,"currency":"usd"}"#)).await;
    client
}

/// Sends the same request again.
async fn charge(server: &Server) -> Answer {
    tokio::time::timeout(Duration::from_secs(60), server.charge(SLOW, "key")).await.expect("an answer").into()
}

fn acme() -> (Consumer, IdempotencyKey) {
    (Consumer::new("acme").unwrap(), IdempotencyKey::new("key").unwrap())
}
