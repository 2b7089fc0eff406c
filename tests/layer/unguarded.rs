//! Handlers that need an attempt, for requests that no layer guards.

use axum::{
    Router,
    extract::Request,
    http::{HeaderName, Method, StatusCode},
    response::IntoResponse,
    routing::any,
};
use sqlx::Sqlite;
use tower_idempotency::{Idempotency, IdempotencyLayer, MemoryStore, RejectionCode, Tx, layer::StoreOutage};

use crate::support::{
    direct::{Answer, request, send},
    log::Log,
    served::layer,
};

/// Handlers that need an attempt, and the same that can do without.
fn app() -> Router {
    async fn key(idempotency: Option<Idempotency>) -> impl IntoResponse {
        (StatusCode::CREATED, if idempotency.is_some() { "guarded" } else { "none" })
    }

    Router::new()
        .route("/charges", any(|_: Idempotency| async { (StatusCode::CREATED, "guarded") }))
        .route("/tx", any(|_: Tx<Sqlite>| async { StatusCode::CREATED }))
        .route("/option", any(key))
        .route("/option/tx", any(|tx: Option<Tx<Sqlite>>| async move { format!("{}", tx.is_some()) }))
}

const PATHS: [&str; 4] = ["/charges", "/tx", "/option", "/option/tx"];

fn to(path: &str, mut request: Request) -> Request {
    *request.uri_mut() = path.parse().unwrap();
    request
}

/// Sends the request with a key to each path.
async fn answers(app: &Router, method: Method) -> Vec<Answer> {
    let mut answers = Vec::new();
    for path in PATHS {
        answers.push(send(app, to(path, request(method.clone(), Some("k"), ""))).await);
    }
    answers
}

#[track_caller]
fn assert_not_guarded(answers: &[Answer]) {
    for answer in answers {
        answer.assert_refused(RejectionCode::NotGuarded);
        assert_eq!(
            (answer.status, answer.problem()["retryable"].as_bool()),
            (StatusCode::INTERNAL_SERVER_ERROR, Some(false))
        );
    }
}

#[tokio::test]
async fn a_layer_that_is_missing_is_named() {
    let (log, _guard) = Log::listen();
    for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
        assert_not_guarded(&answers(&app(), method).await);
    }
    assert_eq!(log.lines(&["ERROR", "no IdempotencyLayer"]).len(), 16);
}

#[tokio::test]
async fn a_layer_that_was_added_before_the_route_is_named() {
    let (log, _guard) = Log::listen();
    let added_before = Router::new().route("/other", any(|| async {})).layer(layer()).merge(app());
    assert_not_guarded(&answers(&added_before, Method::POST).await);
    assert_eq!(log.lines(&["ERROR", "Router::layer after Router::route"]).len(), 4);
}

#[tokio::test]
async fn a_method_that_is_not_guarded_is_named() {
    let (log, _guard) = Log::listen();
    let app = app().layer(layer());
    for method in [Method::PUT, Method::DELETE] {
        assert_not_guarded(&answers(&app, method).await);
    }
    assert_eq!(log.lines(&["ERROR", "with_methods"]).len(), 8);
    let guarded = self::app().layer(layer().with_methods([Method::PUT]));
    assert_eq!(answers(&guarded, Method::PUT).await[0].status, StatusCode::CREATED);
}

#[tokio::test]
async fn a_safe_method_needs_no_attempt() {
    for app in [app(), app().layer(layer())] {
        let answers = answers(&app, Method::GET).await;
        assert_not_guarded(&answers[..2]);
        assert_eq!((&answers[2].body[..], &answers[3].body[..]), (&b"none"[..], &b"false"[..]));
    }
}

#[tokio::test]
async fn a_disabled_layer_leaves_optional_attempts_out() {
    let (log, _guard) = Log::listen();
    let app = app().layer(layer().disabled());
    for method in [Method::POST, Method::PUT] {
        let answers = answers(&app, method).await;
        assert_not_guarded(&answers[..2]);
        assert_eq!((&answers[2].body[..], &answers[3].body[..]), (&b"none"[..], &b"false"[..]));
    }
    assert_eq!(log.lines(&["ERROR", "is disabled"]).len(), 4);
}

#[tokio::test]
async fn a_key_in_a_header_of_the_application_is_seen_by_its_layer() {
    let header = HeaderName::from_static("x-request-key");
    let send_with = async |app: &Router, method: Method, name: &HeaderName| {
        let mut request = request(method, None, "");
        request.headers_mut().insert(name, "k".parse().unwrap());
        send(app, request).await
    };
    let (log, _guard) = Log::listen();
    let app = app().layer(layer().with_key_header(header.clone()));
    assert_eq!(send_with(&app, Method::POST, &header).await.status, StatusCode::CREATED);
    assert_not_guarded(&[send_with(&app, Method::PUT, &header).await]);
    assert_eq!(log.lines(&["ERROR", "with_methods"]).len(), 1);
    // The layer is there: the client has used another header.
    let standard = HeaderName::from_static("idempotency-key");
    for method in [Method::POST, Method::PUT] {
        send_with(&app, method, &standard).await.assert_refused(RejectionCode::KeyMissing);
    }
}

#[tokio::test]
async fn without_a_key_the_key_is_missing() {
    for app in [app(), app().layer(layer()), app().layer(layer().disabled())] {
        for method in [Method::POST, Method::PUT] {
            for path in &PATHS[..2] {
                let answer = send(&app, to(path, request(method.clone(), None, ""))).await;
                answer.assert_refused(RejectionCode::KeyMissing);
            }
            for path in &PATHS[2..] {
                let answer = send(&app, to(path, request(method.clone(), None, ""))).await;
                assert!(answer.status.is_success(), "{answer:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_store_that_is_away_is_no_missing_key() {
    let away = IdempotencyLayer::new(MemoryStore::new().with_max_records(0))
        .with_store_outage(StoreOutage::RunUnprotected);
    let answers = answers(&app().layer(away), Method::POST).await;
    for answer in &answers[..2] {
        answer.assert_refused(RejectionCode::StoreUnavailable);
        assert_eq!(answer.problem()["retryable"], true);
    }
    assert_eq!((&answers[2].body[..], &answers[3].body[..]), (&b"none"[..], &b"false"[..]));
}
