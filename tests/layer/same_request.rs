//! What counts as the same request, and what a mismatch says about the parts that differ.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderName, Method, StatusCode},
};
use tower_idempotency::{Fingerprinter, IdempotencyLayer, RejectionCode};

use crate::support::{
    direct::{counting, send, with_store},
    log::Log,
    process::in_a_process_of_its_own,
    served::layer,
};

/// A request with the key `k`.
fn sent(method: Method, uri: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request {
    let mut builder = Request::builder().method(method).uri(uri).header("idempotency-key", "k");
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(body.into()).unwrap()
}

/// Sends the requests one after the other, and returns what the second is told.
async fn mismatch(layer: IdempotencyLayer, first: Request, second: Request) -> String {
    let (app, runs) = counting(layer);
    assert_eq!(send(&app, first).await.status, StatusCode::CREATED);
    let answer = send(&app, second).await;
    answer.assert_refused(RejectionCode::KeyReused);
    assert_eq!(runs.get(), 1);
    answer.problem()["detail"].as_str().unwrap().to_owned()
}

#[test]
fn a_mismatch_says_which_part_differs() {
    // Which events are of interest is known to all threads, and other tests change it.
    in_a_process_of_its_own("same_request::a_mismatch_says_which_part_differs", each_part_is_named());
}

async fn each_part_is_named() {
    const JSON: &[(&str, &str)] = &[("content-type", "application/json"), ("x-tenant", "secret-1")];
    let first = || sent(Method::POST, "/charges?n=1", JSON, "{}");
    let others = [
        (sent(Method::PATCH, "/charges?n=1", JSON, "{}"), "another method."),
        (sent(Method::POST, "/charges?n=2", JSON, "{}"), "another query."),
        (sent(Method::POST, "/charges", JSON, "{}"), "another query."),
        (sent(Method::POST, "/charges?n=1", JSON, "{ }"), "another body."),
        (
            sent(
                Method::POST,
                "/charges?n=1",
                &[("content-type", "application/json; charset=utf-8"), ("x-tenant", "secret-1")],
                "{}",
            ),
            "another content type.",
        ),
        (
            sent(
                Method::POST,
                "/charges?n=1",
                &[("content-type", "application/json"), ("x-tenant", "secret-2")],
                "{}",
            ),
            "another header x-tenant.",
        ),
        (sent(Method::POST, "/charges?n=1", &JSON[..1], "{}"), "another header x-tenant."),
        (sent(Method::PATCH, "/charges", JSON, "{ }"), "another method and query."),
    ];
    for (second, part) in others {
        let (log, _guard) = Log::listen();
        let fingerprinter = Fingerprinter::default().add_header(HeaderName::from_static("x-tenant"));
        let detail = mismatch(layer().with_fingerprint(fingerprinter), first(), second).await;
        assert!(detail.contains(part) && !detail.contains("secret"), "{detail}");
        let line = log.one(&["INFO", "mismatch"]);
        let part = part.trim_start_matches("another ").trim_end_matches('.');
        assert!(line.contains(&format!("difference={part}")) && !line.contains("secret"), "{line}");
    }
}

#[tokio::test]
async fn a_mismatch_of_the_path_says_so() {
    let (app, runs) = counting(layer());
    let app = axum::Router::new().nest("/v1", app.clone()).nest("/v2", app);
    assert_eq!(send(&app, sent(Method::POST, "/v1/charges", &[], "1")).await.status, StatusCode::CREATED);
    let answer = send(&app, sent(Method::POST, "/v2/charges", &[], "1")).await;
    answer.assert_refused(RejectionCode::KeyReused);
    assert!(answer.problem()["detail"].as_str().unwrap().contains("another path."), "{answer:?}");
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_form_or_a_compressed_body_that_is_made_again_gets_a_hint() {
    let form = |boundary: &str| {
        let content_type = format!("Multipart/form-data; boundary={boundary}");
        sent(Method::POST, "/charges", &[("content-type", &content_type)], format!("--{boundary}--"))
    };
    let detail = mismatch(layer(), form("a"), form("b")).await;
    assert!(detail.contains("content type") && detail.contains("another boundary"), "{detail}");
    let zipped = |body: &'static str| sent(Method::POST, "/charges", &[("content-encoding", "gzip")], body);
    let detail = mismatch(layer(), zipped("1"), zipped("2")).await;
    assert!(detail.contains("another body.") && detail.contains("compressed again"), "{detail}");
}

#[tokio::test]
async fn a_record_of_the_first_version_of_fingerprints_is_replayed_and_its_mismatch_names_the_possibilities()
{
    use sha2::{Digest, Sha256};
    use tower_idempotency::{
        Consumer, IdempotencyKey,
        store::{Attempt, Claim, Fingerprint, StoredResponse},
    };
    let (store, layer) = with_store();
    let field = |bytes: &[u8]| [&(bytes.len() as u64).to_be_bytes(), bytes].concat();
    let options = Sha256::digest([field(&[]), field(b"hash"), field(b"bytes")].concat());
    let request = ["POST", "/charges", "", "2000"].map(|part| field(part.as_bytes())).concat();
    let fingerprint = [&[1], &options[..4], &[0; 4], &Sha256::digest(request)[..]].concat();
    let attempt = Attempt::new(Consumer::anonymous(), IdempotencyKey::new("k").unwrap());
    let claim = Claim::new(attempt.clone(), Fingerprint::from_bytes(fingerprint));
    store.claim(&claim).await.unwrap();
    let response = StoredResponse::new(StatusCode::CREATED, axum::http::HeaderMap::new(), "old");
    store.complete(&attempt, response.encode()).await.unwrap();

    let (app, runs) = counting(layer);
    let replay = send(&app, sent(Method::POST, "/charges", &[], "2000")).await;
    assert!(replay.is_replay() && replay.body == "old", "{replay:?}");
    let answer = send(&app, sent(Method::POST, "/charges", &[], "3000")).await;
    answer.assert_refused(RejectionCode::KeyReused);
    let detail = answer.problem()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("another method, path, query, content type or body."), "{detail}");
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn a_body_that_is_no_json_is_another_request_than_one_that_is() {
    let layer = || layer().with_fingerprint(Fingerprinter::default().canonical_json(["/at"]).unwrap());
    let post = |body: &'static str| sent(Method::POST, "/charges", &[], body);
    for (first, second) in [
        (r#"{"a":1}"#, r#"{"a":1,}"#),
        (r#"{"a":1}"#, r#"{"a":01}"#),
        (r#"{"a":1}"#, r#"{"a":1}x"#),
        (r#"{"a":1}"#, r#"{"a":1/**/}"#),
        (r#"{"a":1}"#, "\u{feff}{\"a\":1}"),
        (r#"{"a":1}"#, r#"{"a":1,"a":1}"#),
        (r#"{"a":1}"#, r#"{"a":1,"at":{,}}"#),
        (r#"{"a":1}"#, r#"{"a":1,"at":[1,]}"#),
        (r#"{"a":[1]}"#, r#"{"a":[1,]}"#),
        ("{\"a\":\"x\\ty\"}", "{\"a\":\"x\ty\"}"),
    ] {
        let detail = mismatch(layer(), post(first), post(second)).await;
        assert!(detail.contains("another body."), "{second}: {detail}");
        mismatch(layer(), post(second), post(first)).await;
    }
    let (app, runs) = counting(layer());
    assert_eq!(send(&app, post(r#"{"a":1,"at":2}"#)).await.status, StatusCode::CREATED);
    assert!(send(&app, post(" {\"at\":3, \"\\u0061\" : 1}\n")).await.is_replay());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn blank_keys_are_refused() {
    let (app, runs) = counting(layer());
    for key in ["\"   \"", "\" \";a=1", "\"\"", " ", "\"\t\""] {
        let mut request = sent(Method::POST, "/charges", &[], "");
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        send(&app, request).await.assert_refused(RejectionCode::KeyInvalid);
    }
    assert_eq!(runs.get(), 0);
}
