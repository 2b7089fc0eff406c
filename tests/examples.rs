//! The examples that call a bank.

mod support;

use std::{
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};
use support::{
    database::Database,
    http::RawResponse,
    server::{Program, Server, executable},
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};
use tower_idempotency::{Consumer, IdempotencyKey};

#[tokio::test(flavor = "multi_thread")]
async fn the_server_pays_out_once_sqlite() {
    pays_out_once(Database::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn the_server_pays_out_once_postgres() {
    pays_out_once(Database::postgres().await).await;
}

async fn pays_out_once(database: Database) {
    let server = database.server(&[("UPSTREAM_TIMEOUT_MS", "2000")]);
    for (wish, first) in [("", 201), ("?upstream=4xx", 422), ("?upstream=apply-then-fail", 409)] {
        let key = format!("key{wish}");
        assert_eq!(pay_out(&server, wish, &key).await.status, first, "{wish}");
    }
    assert_eq!(database.payouts("pending").await, 1);
    let answer = until_stored(&server, "?upstream=apply-then-fail", "key?upstream=apply-then-fail").await;
    assert_eq!((answer.status, &answer.json()["transfer"]), (201, &json!("tr_2")));
    let mine = server.get("/payouts", &[]).await.json();
    let payouts = mine.as_array().unwrap().iter();
    let payouts: Vec<_> = payouts.map(|payout| json!([payout["state"], payout["transfer"]])).collect();
    assert_eq!(payouts, [json!(["paid", "tr_1"]), json!(["refused", null]), json!(["paid", "tr_2"])]);
    assert_eq!(server.get("/payouts", &[("x-api-key", "globex-key")]).await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payout_whose_server_was_killed_is_completed_without_its_client_sqlite() {
    is_completed_without_its_client(Database::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_payout_whose_server_was_killed_is_completed_without_its_client_postgres() {
    is_completed_without_its_client(Database::postgres().await).await;
}

async fn is_completed_without_its_client(database: Database) {
    let bank = bank();
    let mut server = abandon(&database, &bank).await;
    holds_no_credential(&database, "/payouts?upstream=timeout");
    server.start_again();
    until(async || database.payouts("paid").await == 1).await;
    holds_no_credential(&database, "tr_1");

    let retry = until_stored(&server, "?upstream=timeout", "abandoned").await;
    assert_eq!((retry.status, &retry.json()["transfer"]), (201, &json!("tr_1")));
    assert_eq!(server.get("/payouts", &[]).await.json(), json!([retry.json()]));
    assert_eq!(transfers(&bank).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payout_whose_consumer_was_revoked_waits_for_an_operator_sqlite() {
    waits_for_an_operator(Database::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_payout_whose_consumer_was_revoked_waits_for_an_operator_postgres() {
    waits_for_an_operator(Database::postgres().await).await;
}

async fn waits_for_an_operator(database: Database) {
    let (bank, operator) = (bank(), database.handle());
    let mut server = abandon(&database, &bank).await;
    let (acme, key) = (Consumer::new("acme").unwrap(), IdempotencyKey::new("abandoned").unwrap());
    let abandoned = operator.get(&acme, &key).await.unwrap().unwrap();
    let url = bank.url("");
    let mut without = database.server(&[&variables(&url)[..], &[("REVOKED", "globex,acme")]].concat());
    until(async || !operator.list_requests(1).await.unwrap().is_empty()).await;
    let [request] = &operator.list_requests(10).await.unwrap()[..] else { panic!("there is one") };
    assert_eq!(request.attention.as_deref(), Some("acme was revoked"));
    let record = operator.get(&acme, &key).await.unwrap().unwrap();
    assert_eq!((record.id, record.attempt_number), (request.record_id, abandoned.attempt_number));
    assert_eq!((database.payouts("pending").await, database.payouts("paid").await), (1, 0));
    assert_eq!(pay_out(&without, "?upstream=timeout", "abandoned").await.status, 401);
    without.kill9();

    server.start_again();
    assert!(operator.send_again(request.record_id).await.unwrap());
    until(async || database.payouts("paid").await == 1).await;
    assert_eq!(transfers(&bank).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_killed_twice_pays_once() {
    let (bank, folder) = (bank(), tempfile::tempdir().unwrap());
    for made in [1, 2] {
        let mut run = start_job(folder.path(), &bank);
        until(async || transfers(&bank).await == made).await;
        run.kill().await.unwrap();
    }
    for _ in 0..2 {
        let run = ended(start_job(folder.path(), &bank)).await;
        let transcript = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "{transcript}{}", String::from_utf8_lossy(&run.stderr));
        for line in ["DE01: tr_1\n", "DE02: tr_2\n", "DE03: tr_3\n"] {
            assert!(transcript.contains(line), "{transcript}");
        }
    }
    assert_eq!(transfers(&bank).await, 3);
    let file = SqliteConnectOptions::new().filename(folder.path().join("job.sqlite"));
    let pool = SqlitePool::connect_with(file).await.unwrap();
    let payouts = sqlx::query_as("SELECT recipient, result FROM payouts ORDER BY recipient");
    let payouts: Vec<(String, String)> = payouts.fetch_all(&pool).await.unwrap();
    let expected = [("DE01", "tr_1"), ("DE02", "tr_2"), ("DE03", "tr_3")];
    assert_eq!(payouts, expected.map(|(recipient, result)| (recipient.to_owned(), result.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demonstration_ends_well() {
    let mut demonstration = Command::new(executable("payout"));
    demonstration.arg("--demo").stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let output = ended(demonstration.spawn().expect("the example can be run")).await;
    let transcript = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{transcript}");
    assert_eq!(transcript.matches("(replay)").count(), 8, "{transcript}");
    assert_eq!(transcript.matches("409 Conflict: outcome-unknown").count(), 5, "{transcript}");
    assert!(transcript.ends_with("payouts: 7\n"), "{transcript}");
}

/// A bank that is still there when who calls it is killed.
fn bank() -> Server {
    Server::start_program(Program::new(executable("payout"), &["--bank"]), None, &[])
}

async fn transfers(bank: &Server) -> usize {
    bank.get("/transfers", &[]).await.text().matches("\"tr_").count()
}

fn variables(bank_url: &str) -> [(&str, &str); 4] {
    [
        ("UPSTREAM_URL", bank_url),
        ("UPSTREAM_TIMEOUT_MS", "2000"),
        ("LEASE_MS", "4000"),
        ("COMPLETER_INTERVAL_MS", "500"),
    ]
}

/// Kills a server while the bank, which has made the transfer, keeps it waiting. The client does not come back.
async fn abandon(database: &Database, bank: &Server) -> Server {
    let mut server = database.server(&variables(&bank.url("")));
    // A slow machine may answer with a 503, after which nothing was done.
    let insist = async {
        loop {
            pay_out(&server, "?upstream=timeout", "abandoned").await;
            sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = until(async || transfers(bank).await == 1) => {}
        () = insist => {}
    }
    server.kill9();
    assert_eq!((database.payouts("pending").await, database.payouts("paid").await), (1, 0));
    server
}

/// Looks at every byte of the database, where it is a file. This is in there.
fn holds_no_credential(database: &Database, this: &str) {
    if let Database::Sqlite(file) = database {
        let bytes = file.bytes();
        let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(holds("acme") && holds(this), "{this} is not in the database");
        assert!(!holds("acme-key"), "the API key is in the database");
    }
}

async fn pay_out(server: &Server, wish: &str, key: &str) -> RawResponse {
    server.post(&format!("/payouts{wish}"), &[("idempotency-key", key)], PAYOUT).await
}

/// Sends until the answer is a replay.
async fn until_stored(server: &Server, wish: &str, key: &str) -> RawResponse {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = pay_out(server, wish, key).await;
        if answer.is_replay() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{}", answer.text());
        sleep(Duration::from_millis(100)).await;
    }
}

/// A run of the job, whose calls the bank does not answer when it gets them first. Dropped, it is killed.
fn start_job(folder: &Path, bank: &Server) -> Child {
    let mut job = Command::new(executable("job"));
    job.arg("2031-01-31").current_dir(folder).env("UPSTREAM_URL", bank.url("")).env("UPSTREAM", "timeout");
    job.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    job.spawn().expect("the example can be run")
}

async fn ended(program: Child) -> Output {
    let output = tokio::time::timeout(Duration::from_secs(90), program.wait_with_output()).await;
    output.expect("it ends").expect("its output can be read")
}

async fn until(condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(Instant::now() < deadline, "waited 60 s in vain");
        sleep(Duration::from_millis(20)).await;
    }
}

const PAYOUT: &str = r#"{"recipient": "DE02", "amount": 2000}"#;
