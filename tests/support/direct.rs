//! Applications in this process, called without a socket.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use bytes::Bytes;
use http_body_util::BodyExt;
use tokio::task::JoinHandle;
use tower::ServiceExt;
use tower_idempotency::{
    Consumer, IdempotencyKey, IdempotencyLayer, MemoryStore, Reaper, Rejection, RejectionCode,
    store::{Attempt, Claim, ClaimOutcome, Fingerprint, Store},
};

use super::{
    app::consumer,
    served::{Count, layer},
};

/// An application whose answer tells the number of the run.
pub fn counting(layer: IdempotencyLayer) -> (Router, Count) {
    answering(layer, |run| (StatusCode::CREATED, format!("run {run}")).into_response())
}

/// An application whose handler gets the number of the run.
pub fn answering(layer: IdempotencyLayer, answer: fn(usize) -> Response) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move || async move { answer(counter.add()) };
    (Router::new().route("/charges", any(handler)).layer(layer), runs)
}

/// An application whose handler takes as long as it is told to.
pub fn waiting(layer: IdempotencyLayer, wait: Duration) -> (Router, Count) {
    answering_after(layer, wait, |run| format!("run {run}").into_response())
}

/// An application whose handler gets the number of the run, and answers after that long.
pub fn answering_after(
    layer: IdempotencyLayer,
    wait: Duration,
    answer: fn(usize) -> Response,
) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move || async move {
        let run = counter.add();
        tokio::time::sleep(wait).await;
        answer(run)
    };
    (Router::new().route("/charges", any(handler)).layer(layer), runs)
}

/// A layer and its store, which keeps what has expired.
pub fn with_store() -> (Arc<dyn Store>, IdempotencyLayer) {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    (Arc::clone(&store), IdempotencyLayer::new(store).with_reaper(Reaper::off()))
}

/// What a client got.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Why it was refused, if it was.
    pub rejection: Option<RejectionCode>,
}

impl Answer {
    pub fn is_replay(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    /// Checks that this is no replay, and that the other answer is one and differs in nothing else.
    #[track_caller]
    pub fn assert_same_replay(&self, replay: &Self) {
        assert!(replay.is_replay() && !self.is_replay(), "{self:?} {replay:?}");
        let mut headers = replay.headers.clone();
        headers.remove("idempotent-replayed");
        assert_eq!((self.status, &self.headers, &self.body), (replay.status, &headers, &replay.body));
    }

    /// The body of a refusal.
    #[track_caller]
    pub fn problem(&self) -> serde_json::Value {
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(self.headers[header::CACHE_CONTROL], "no-store");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Checks the refusal and every member of its body.
    #[track_caller]
    pub fn assert_refused(&self, code: RejectionCode) {
        assert_eq!(self.rejection, Some(code), "{} {:?}", self.status, self.body);
        let problem = self.problem();
        assert_eq!(problem["code"], code.as_str());
        assert_eq!(problem["status"], self.status.as_u16());
        assert_eq!(self.status, code.status());
        assert!(
            !problem["title"].as_str().unwrap().is_empty()
                && problem["type"].as_str().unwrap().starts_with("http")
        );
        assert!(problem["detail"].is_string() && problem["retryable"].is_boolean());
        assert!(!self.is_replay());
    }
}

/// Sends the request, and reads the answer to its end.
pub async fn send(app: &Router, request: Request) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
        rejection: parts.extensions.get::<Rejection>().map(Rejection::code),
    }
}

/// Sends the request in a task of its own.
pub fn start(app: &Router, request: Request) -> JoinHandle<Answer> {
    let app = app.clone();
    tokio::spawn(async move { send(&app, request).await })
}

/// Sends the request in a task of its own, and returns once its handler runs.
pub async fn begin(app: &Router, request: Request, runs: &Count) -> JoinHandle<Answer> {
    let before = runs.get();
    let answer = start(app, request);
    while runs.get() == before {
        tokio::task::yield_now().await;
    }
    answer
}

pub fn request(method: Method, key: Option<&str>, body: impl Into<Body>) -> Request {
    let mut builder = Request::builder().method(method).uri("/charges");
    if let Some(key) = key {
        builder = builder.header("idempotency-key", key);
    }
    builder.body(body.into()).unwrap()
}

/// The request with this key that most tests send.
pub fn charge(key: &str) -> Request {
    request(Method::POST, Some(key), "2000")
}

/// Whose record [`charge("k")`](charge) makes.
pub fn identity() -> (Consumer, IdempotencyKey) {
    (consumer(), IdempotencyKey::new("k").unwrap())
}

/// The fingerprint that the layer computes for [`charge`].
pub async fn fingerprint_of_charge() -> Fingerprint {
    let layer = layer();
    let handle = layer.handle();
    send(&counting(layer).0, charge("k")).await;
    let (consumer, key) = identity();
    handle.get(&consumer, &key).await.unwrap().unwrap().fingerprint
}

/// Claims the key of [`charge("k")`](charge) for another node.
pub async fn claim(store: &dyn Store, fingerprint: Fingerprint) -> Attempt {
    claim_for(store, fingerprint, Duration::from_secs(30)).await
}

/// Has another node claim the key of [`charge("k")`](charge) and let its lease run out.
pub async fn abandon(store: &dyn Store) {
    let lease = Duration::from_millis(1);
    claim_for(store, fingerprint_of_charge().await, lease).await;
    tokio::time::sleep(lease * 20).await;
}

async fn claim_for(store: &dyn Store, fingerprint: Fingerprint, lease: Duration) -> Attempt {
    let (consumer, key) = identity();
    let mut claim = Claim::new(Attempt::new(consumer, key), fingerprint);
    claim.lease = lease;
    let outcome = store.claim(&claim).await.unwrap();
    assert!(matches!(outcome, ClaimOutcome::Won { .. }), "{outcome:?}");
    claim.attempt
}
