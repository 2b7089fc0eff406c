//! The examples that call a bank.

mod support;

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use support::{
    database::Database,
    http::RawResponse,
    server::{Server, executable},
};
use tokio::time::sleep;

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
    let answer = until_stored(&server, "?upstream=apply-then-fail", "key?upstream=apply-then-fail").await;
    assert_eq!((answer.status, &answer.json()["transfer"]), (201, &json!("tr_2")));
    let mine = server.get("/payouts", &[]).await.json();
    let transfers: Vec<_> =
        mine.as_array().unwrap().iter().map(|payout| payout["transfer"].clone()).collect();
    assert_eq!(transfers, ["tr_1", "tr_2"]);
    assert_eq!(server.get("/payouts", &[("x-api-key", "globex-key")]).await.json(), json!([]));
}

async fn pay_out(server: &Server, wish: &str, key: &str) -> RawResponse {
    let path = format!("/payouts{wish}");
    server.post(&path, &[("idempotency-key", key)], r#"{"recipient": "DE02", "amount": 2000}"#).await
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

#[test]
fn the_demonstration_ends_well() {
    let mut demonstration = Command::new(executable("payout"));
    let output = demonstration.arg("--demo").stdin(Stdio::null()).output().expect("the example can be run");
    let transcript = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{transcript}");
    assert_eq!(transcript.matches("(replay)").count(), 8, "{transcript}");
    assert_eq!(transcript.matches("409 Conflict: outcome-unknown").count(), 5, "{transcript}");
    assert!(transcript.ends_with("payouts: 7\n"), "{transcript}");
}
