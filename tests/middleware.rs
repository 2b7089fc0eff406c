//! The decision table, row by row, on the memory store and without a socket.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request},
    http::{HeaderName, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, post},
};
use bytes::Bytes;
use http_body_util::BodyExt;
use tower::ServiceExt;
use tower_idempotency::{
    Attempt, Claim, ClaimOutcome, Consumer, ConsumerExtractor, Directive, Fingerprinter, Idempotency,
    IdempotencyKey, IdempotencyLayer, KeySyntax, MemoryStore, RecordFilter, RecordState, Rejection,
    RejectionCode, Resolution, ResolveOutcome, ResultPolicy, Store, StoreOutage, StoredResponse,
};

/// Counts how often a handler ran.
#[derive(Clone, Default)]
struct Runs(Arc<AtomicUsize>);

impl Runs {
    fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

fn layer() -> IdempotencyLayer {
    IdempotencyLayer::new(MemoryStore::new())
}

/// An application whose answer tells the number of the run.
fn counting(layer: IdempotencyLayer) -> (Router, Runs) {
    answering(layer, |run| (StatusCode::CREATED, format!("run {run}")).into_response())
}

fn answering(layer: IdempotencyLayer, answer: fn(usize) -> Response) -> (Router, Runs) {
    let runs = Runs::default();
    let counter = runs.clone();
    let handler = move || async move { answer(counter.add()) };
    (Router::new().route("/charges", any(handler.clone())).route("/other", any(handler)).layer(layer), runs)
}

/// An application whose handler takes as long as it is told to.
fn waiting(layer: IdempotencyLayer, wait: Duration) -> (Router, Runs) {
    let runs = Runs::default();
    let counter = runs.clone();
    let handler = move || async move {
        let run = counter.add();
        tokio::time::sleep(wait).await;
        format!("run {run}")
    };
    (Router::new().route("/charges", post(handler)).layer(layer), runs)
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Bytes,
    rejection: Option<RejectionCode>,
}

impl Answer {
    fn is_replay(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    fn problem(&self) -> serde_json::Value {
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(self.headers[header::CACHE_CONTROL], "no-store");
        serde_json::from_slice(&self.body).unwrap()
    }

    #[track_caller]
    fn assert_refused(&self, code: RejectionCode) {
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

async fn send(app: &Router, request: Request) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
        rejection: parts.extensions.get::<Rejection>().map(Rejection::code),
    }
}

fn request(method: Method, key: Option<&str>, body: &'static str) -> Request {
    let mut builder = Request::builder().method(method).uri("/charges");
    if let Some(key) = key {
        builder = builder.header("idempotency-key", key);
    }
    builder.body(Body::from(body)).unwrap()
}

fn charge(key: &str) -> Request {
    request(Method::POST, Some(key), "2000")
}

fn acme() -> (Consumer, IdempotencyKey) {
    (Consumer::new("anonymous").unwrap(), IdempotencyKey::new("k").unwrap())
}

#[tokio::test]
async fn row_1_a_method_that_is_not_guarded_passes_even_with_a_malformed_key() {
    for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE] {
        let (app, runs) = counting(layer().required());
        for _ in 0..2 {
            let answer = send(&app, request(method.clone(), Some("a,b"), "")).await;
            assert_eq!(answer.status, StatusCode::CREATED, "{method}");
        }
        assert_eq!(runs.count(), 2);
    }
}

#[tokio::test]
async fn row_2_without_a_key_the_store_is_not_touched() {
    let layer = IdempotencyLayer::new(unreachable_store());
    let (app, runs) = counting(layer);
    for _ in 0..2 {
        assert_eq!(send(&app, request(Method::POST, None, "")).await.status, StatusCode::CREATED);
    }
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn row_3_a_required_key_that_is_missing_is_refused() {
    let (app, runs) = counting(layer().required());
    let answer = send(&app, request(Method::POST, None, "")).await;
    answer.assert_refused(RejectionCode::KeyMissing);
    assert_eq!(answer.problem()["title"], "Idempotency-Key is missing");
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn row_4_malformed_and_repeated_keys_are_refused() {
    let (app, runs) = counting(layer());
    for key in ["", " ", "a,b", "a b", "\"a", "\"\"", "ä"] {
        send(&app, request(Method::POST, Some(key), "")).await.assert_refused(RejectionCode::KeyInvalid);
    }
    let mut twice = charge("k");
    twice.headers_mut().append("idempotency-key", "k".parse().unwrap());
    send(&app, twice).await.assert_refused(RejectionCode::KeyInvalid);
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn row_5_a_consumer_that_cannot_be_told_is_refused() {
    let (app, runs) = counting(layer());
    let mut request = charge("k");
    request.headers_mut().insert("x-api-key", "secret".parse().unwrap());
    send(&app, request).await.assert_refused(RejectionCode::ConsumerUnidentified);
    let (app, more) = counting(layer().with_consumer(ConsumerExtractor::extension()));
    send(&app, charge("k")).await.assert_refused(RejectionCode::ConsumerUnidentified);
    assert_eq!(runs.count() + more.count(), 0);
}

#[tokio::test]
async fn row_6_a_body_over_the_limit_is_refused_and_nothing_is_claimed() {
    let layer = layer().with_request_body_limit(4);
    let handle = layer.handle();
    let (app, runs) = counting(layer);
    send(&app, request(Method::POST, Some("k"), "12345"))
        .await
        .assert_refused(RejectionCode::RequestTooLarge);
    let chunked = Body::from_stream(futures_stream(["123", "45"]));
    let request = Request::post("/charges").header("idempotency-key", "k").body(chunked).unwrap();
    send(&app, request).await.assert_refused(RejectionCode::RequestTooLarge);
    assert!(handle.list(RecordFilter::All, 10).await.unwrap().is_empty());
    assert_eq!(runs.count(), 0);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn row_6_a_body_that_breaks_off_is_refused_and_nothing_is_claimed() {
    let layer = layer();
    let handle = layer.handle();
    let (app, runs) = counting(layer);
    let broken = http_body_util::StreamBody::new(stream([
        Ok(http_body::Frame::data(Bytes::from("20"))),
        Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
    ]));
    let request = Request::post("/charges").header("idempotency-key", "k").body(Body::new(broken)).unwrap();
    send(&app, request).await.assert_refused(RejectionCode::RequestIncomplete);
    assert!(handle.list(RecordFilter::All, 10).await.unwrap().is_empty());
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn row_6_all_bodies_together_have_a_limit_and_room_is_given_back() {
    let (app, runs) = counting(layer().with_request_body_limit(6).with_request_buffer_limit(6));
    let (mut sender, slow) = http_body_util::channel::Channel::<Bytes, Infallible>::new(1);
    let upload = Request::post("/charges").header("idempotency-key", "slow").body(Body::new(slow)).unwrap();
    let upload = tokio::spawn(send_owned(app.clone(), upload));
    for chunk in ["1234", "", ""] {
        // The channel has room for one chunk: the third one fits when the first was taken.
        sender.send_data(Bytes::from(chunk)).await.unwrap();
    }
    send(&app, charge("k")).await.assert_refused(RejectionCode::Overloaded);
    drop(sender);
    assert_eq!(upload.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(send(&app, charge("later")).await.status, StatusCode::CREATED);
    assert_eq!(runs.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn row_6_a_body_that_does_not_arrive_in_time_is_refused() {
    let (app, runs) = counting(layer());
    let (_sender, never) = http_body_util::channel::Channel::<Bytes, Infallible>::new(1);
    let request = Request::post("/charges").header("idempotency-key", "k").body(Body::new(never)).unwrap();
    send(&app, request).await.assert_refused(RejectionCode::RequestTimeout);
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn row_7_an_unavailable_store_refuses_unless_told_otherwise() {
    let (app, runs) = counting(IdempotencyLayer::new(unreachable_store()));
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::StoreUnavailable);
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    assert_eq!(runs.count(), 0);
    let open = IdempotencyLayer::new(unreachable_store()).with_store_outage(StoreOutage::RunUnprotected);
    let (app, runs) = counting(open);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn row_8_another_request_under_the_key_is_refused_in_every_state() {
    let (store, layer) = with_store();
    let (app, runs) = counting(layer);
    let other = || request(Method::POST, Some("k"), "3000");

    let fingerprint = fingerprint_of_charge().await;
    let (consumer, key) = acme();
    let attempt = Attempt::new(consumer.clone(), key.clone());
    claim(&store, &attempt, &fingerprint).await;
    send(&app, other()).await.assert_refused(RejectionCode::KeyReused);

    store.hold(&attempt).await.unwrap();
    let before = store.get(&consumer, &key).await.unwrap();
    send(&app, other()).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!(store.get(&consumer, &key).await.unwrap(), before);

    store.evict(&consumer, &key).await.unwrap();
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    let answer = send(&app, other()).await;
    answer.assert_refused(RejectionCode::KeyReused);
    assert_eq!(answer.problem()["title"], "Idempotency-Key is already used");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn row_8_another_request_does_not_take_an_abandoned_key_over() {
    let (store, layer) = with_store();
    let (app, runs) = counting(layer);
    let (consumer, key) = acme();
    let attempt = Attempt::new(consumer, key);
    let mut claim = Claim::new(attempt, fingerprint_of_charge().await);
    claim.lease = Duration::from_millis(1);
    store.claim(&claim).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    send(&app, request(Method::POST, Some("k"), "3000")).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!(runs.count(), 0);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn row_9_a_duplicate_of_a_running_request_gets_409_at_once() {
    let (app, runs) = waiting(layer(), Duration::from_millis(500));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::InProgress);
    assert_eq!(answer.problem()["title"], "A request is outstanding for this Idempotency-Key");
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    assert!(!first.is_finished());
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn row_10_a_held_record_answers_outcome_unknown_until_it_is_resolved() {
    let layer = layer();
    let handle = layer.handle();
    let (app, runs) = answering(layer, |run| {
        let mut response = format!("run {run}").into_response();
        if run == 1 {
            response.extensions_mut().insert(Directive::Hold);
        }
        response
    });
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    send(&app, charge("k")).await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(handle.list(RecordFilter::Held, 10).await.unwrap().len(), 1);

    let (consumer, key) = acme();
    let known = StoredResponse::new(StatusCode::ACCEPTED, http::HeaderMap::new(), "known");
    let outcome = handle.resolve(&consumer, &key, Resolution::complete(&known)).await.unwrap();
    assert_eq!(outcome, ResolveOutcome::Resolved);
    let answer = send(&app, charge("k")).await;
    assert!(answer.is_replay());
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::ACCEPTED, &b"known"[..]));
    assert_eq!(runs.count(), 1);
    assert!(handle.evict(&consumer, &key).await.unwrap());
    assert_eq!(send(&app, charge("k")).await.body, "run 2");
}

#[tokio::test]
async fn row_11_a_completed_record_is_replayed() {
    let (app, runs) = counting(layer());
    let first = send(&app, charge("k")).await;
    let replay = send(&app, charge("\"k\"")).await;
    assert!(!first.is_replay() && replay.is_replay());
    assert_eq!((first.status, first.body), (replay.status, replay.body));
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn row_12_a_response_that_was_not_kept_is_told_and_not_run_again() {
    let (app, runs) = answering(layer().with_response_body_limit(8), |_| {
        (StatusCode::CREATED, [(header::LOCATION, "/charges/1")], "123456789").into_response()
    });
    assert_eq!(send(&app, charge("k")).await.body, "123456789");
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::ResponseNotKept);
    assert_eq!(answer.problem()["original_status"], 201);
    assert_eq!(answer.problem()["original_location"], "/charges/1");
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn row_13_absent_expired_and_abandoned_keys_run() {
    let layer = layer()
        .with_max_execution(Duration::from_millis(100))
        .with_lease(Duration::from_millis(100))
        .with_retention(Duration::from_millis(200));
    let (app, runs) = counting(layer);
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after_expiry = send(&app, request(Method::POST, Some("k"), "another request")).await;
    assert_eq!(after_expiry.body, "run 2");
    assert!(!after_expiry.is_replay());
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn results_that_are_not_stored_release_the_key() {
    let (app, runs) = answering(layer(), |run| match run {
        1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        2 => StatusCode::TOO_MANY_REQUESTS.into_response(),
        _ => StatusCode::PAYMENT_REQUIRED.into_response(),
    });
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::PAYMENT_REQUIRED);
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.count(), 3);
}

#[tokio::test]
async fn a_panic_is_500_at_once_and_the_next_retry_runs() {
    let (app, runs) = answering(layer(), |run| match run {
        1 => panic!("the handler breaks"),
        _ => "fine".into_response(),
    });
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::HandlerPanicked);
    assert_eq!(answer.problem()["retryable"], true);
    assert_eq!(send(&app, charge("k")).await.body, "fine");
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn at_most_once_stores_5xx_and_holds_after_a_panic() {
    let (app, runs) = answering(layer().with_policy(ResultPolicy::at_most_once()), |run| match run {
        1 => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        _ => panic!("the handler breaks"),
    });
    assert_eq!(send(&app, charge("stored")).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(send(&app, charge("stored")).await.is_replay());
    let answer = send(&app, charge("held")).await;
    answer.assert_refused(RejectionCode::HandlerPanicked);
    assert_eq!(answer.problem()["retryable"], false);
    send(&app, charge("held")).await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn an_error_of_the_inner_service_reaches_the_caller_and_releases_the_key() {
    let runs = Runs::default();
    let counter = runs.clone();
    let inner = tower::service_fn(move |_: http::Request<_>| {
        let run = counter.add();
        async move {
            match run {
                1 => Err(std::io::Error::other("inner error")),
                _ => Ok(http::Response::new(Body::from("fine"))),
            }
        }
    });
    let service = tower::ServiceBuilder::new().layer(layer()).service(inner);
    assert_eq!(service.clone().oneshot(charge("k")).await.unwrap_err().to_string(), "inner error");
    assert_eq!(service.clone().oneshot(charge("k")).await.unwrap().status(), StatusCode::OK);
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn a_handler_over_max_execution_is_told_then_cancelled() {
    let told = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&told);
    let handler = move |idempotency: Idempotency| async move {
        idempotency.cancelled().await;
        seen.store(usize::from(idempotency.is_cancelled()), Ordering::SeqCst);
        std::future::pending::<()>().await;
    };
    let layer = layer().with_max_execution(Duration::from_millis(200));
    let handle = layer.handle();
    let app = Router::new().route("/charges", post(handler)).layer(layer);
    send(&app, charge("k")).await.assert_refused(RejectionCode::MaxExecutionExceeded);
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert!(handle.list(RecordFilter::All, 1).await.unwrap().is_empty(), "the key was not released");
}

#[tokio::test]
async fn consumers_with_equal_keys_do_not_meet() {
    let (app, runs) = counting(layer().with_consumer(ConsumerExtractor::extension()));
    let from = |consumer: &str, key: &str| {
        let mut request = charge(key);
        request.extensions_mut().insert(Consumer::new(consumer).unwrap());
        request
    };
    for (consumer, key) in [("acme", "k"), ("globex", "k"), ("a", "b:c"), ("a:b", "c")] {
        let answer = send(&app, from(consumer, key)).await;
        assert_eq!(answer.status, StatusCode::CREATED);
        assert!(!answer.is_replay());
    }
    assert_eq!(runs.count(), 4);
    assert!(send(&app, from("a:b", "c")).await.is_replay());
}

#[tokio::test]
async fn in_a_nested_router_the_original_path_counts() {
    let runs = Runs::default();
    let counter = runs.clone();
    let version = Router::new()
        .route("/pay/{id}", post(move |Path(_): Path<String>| async move { counter.add().to_string() }));
    let guarded = version.layer(layer());
    let app = Router::new().nest("/v1", guarded.clone()).nest("/v2", guarded);
    let pay = |path: &str| Request::post(path).header("idempotency-key", "k").body(Body::empty()).unwrap();
    assert_eq!(send(&app, pay("/v1/pay/7")).await.body, "1");
    send(&app, pay("/v2/pay/7")).await.assert_refused(RejectionCode::KeyReused);
    assert!(send(&app, pay("/v1/pay/7")).await.is_replay());
}

#[tokio::test]
async fn a_derived_key_joins_equal_requests_within_its_window() {
    let (app, runs) = counting(layer().required().with_derived_key(Duration::from_millis(300)));
    assert_eq!(send(&app, request(Method::POST, None, "1")).await.body, "run 1");
    assert!(send(&app, request(Method::POST, None, "1")).await.is_replay());
    assert_eq!(send(&app, request(Method::POST, None, "2")).await.body, "run 2");
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(send(&app, request(Method::POST, None, "1")).await.body, "run 3");
    assert_eq!(runs.count(), 3);
}

#[tokio::test]
async fn names_methods_and_refusals_are_configurable() {
    let layer = layer()
        .with_key_header(HeaderName::from_static("x-request-token"))
        .with_replay_marker(HeaderName::from_static("x-replayed"))
        .with_methods([Method::PUT])
        .with_key_syntax(KeySyntax::uuid())
        .with_renderer(|rejection: &Rejection| {
            let mut response = http::Response::new(Bytes::from(rejection.code().as_str()));
            *response.status_mut() = StatusCode::IM_A_TEAPOT;
            response
        });
    let (app, _) = counting(layer);
    let put =
        |token: &str| Request::put("/charges").header("x-request-token", token).body(Body::empty()).unwrap();
    let token = "8e03978e-40d5-43dd-bc93-6894a57f9324";
    assert_eq!(send(&app, put(token)).await.body, "run 1");
    assert_eq!(send(&app, put(token)).await.headers["x-replayed"], "true");
    let refused = send(&app, put("no-uuid")).await;
    assert_eq!((refused.status, &refused.body[..]), (StatusCode::IM_A_TEAPOT, &b"key-invalid"[..]));
    assert_eq!(refused.headers[header::CACHE_CONTROL], "no-store");
    assert_eq!(send(&app, charge("k")).await.body, "run 2");
}

#[tokio::test]
async fn fingerprints_of_other_schemes_are_read_or_told() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let with = |fingerprinter: Fingerprinter| {
        counting(IdempotencyLayer::new(Arc::clone(&store)).with_fingerprint(fingerprinter)).0
    };
    let old = Fingerprinter::default().keyed(1, "one");
    let new = Fingerprinter::default().keyed(2, "two");
    assert_eq!(send(&with(old.clone()), charge("k")).await.body, "run 1");
    send(&with(new.clone()), charge("k")).await.assert_refused(RejectionCode::FingerprintUnknown);
    let both = with(new.add_previous(old));
    assert!(send(&both, charge("k")).await.is_replay());
    send(&both, request(Method::POST, Some("k"), "3000")).await.assert_refused(RejectionCode::KeyReused);
}

#[tokio::test]
async fn an_abandoned_record_of_another_scheme_is_taken_over() {
    let (store, layer) = with_store();
    let (consumer, key) = acme();
    let mut claim = Claim::new(Attempt::new(consumer, key), fingerprint_of_charge().await);
    claim.lease = Duration::from_millis(1);
    store.claim(&claim).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let fingerprinter = Fingerprinter::default().keyed(2, "two").add_previous(Fingerprinter::default());
    let (app, runs) = counting(layer.with_fingerprint(fingerprinter));
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_stored_response_that_is_damaged_or_unknown_fails_closed() {
    for damage in [|bytes: &mut Vec<u8>| bytes[0] = 99, |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1]
    {
        let (store, layer) = with_store();
        let (app, runs) = counting(layer);
        let (consumer, key) = acme();
        let attempt = Attempt::new(consumer, key);
        claim(&store, &attempt, &fingerprint_of_charge().await).await;
        let mut bytes = StoredResponse::new(StatusCode::OK, http::HeaderMap::new(), "x").encode().to_vec();
        damage(&mut bytes);
        store.complete(&attempt, bytes.into()).await.unwrap();
        send(&app, charge("k")).await.assert_refused(RejectionCode::RecordUnreadable);
        assert_eq!(runs.count(), 0);
    }
}

#[tokio::test]
async fn after_a_takeover_the_first_attempt_answers_what_the_second_stored() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(400));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    let (consumer, key) = acme();
    store.evict(&consumer, &key).await.unwrap();
    let other = Attempt::new(consumer, key);
    claim(&store, &other, &fingerprint_of_charge().await).await;
    let stored = StoredResponse::new(StatusCode::CREATED, http::HeaderMap::new(), "the other's");
    store.complete(&other, stored.encode()).await.unwrap();
    assert_eq!(first.await.unwrap().body, "the other's");
}

#[tokio::test]
async fn a_key_that_became_another_requests_meanwhile_does_not_lend_its_response() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    let (consumer, key) = acme();
    store.evict(&consumer, &key).await.unwrap();
    let other = Attempt::new(consumer, key);
    claim(&store, &other, &tower_idempotency::Fingerprint::from_bytes("another request")).await;
    let stored = StoredResponse::new(StatusCode::CREATED, http::HeaderMap::new(), "the other's");
    store.complete(&other, stored.encode()).await.unwrap();
    assert_eq!(first.await.unwrap().body, "run 1");
}

#[tokio::test]
async fn a_record_that_is_gone_does_not_take_the_answer_away() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    let (consumer, key) = acme();
    store.evict(&consumer, &key).await.unwrap();
    assert_eq!(first.await.unwrap().body, "run 1");
}

#[tokio::test]
async fn the_handler_learns_key_consumer_and_attempt() {
    let handler = |idempotency: Idempotency, Extension(consumer): Extension<Consumer>| async move {
        assert_eq!(idempotency.consumer(), &consumer);
        format!("{} {} {}", idempotency.key(), idempotency.consumer(), idempotency.attempt_number())
    };
    let app = Router::new()
        .route("/charges", post(handler))
        .layer(layer())
        .layer(Extension(Consumer::new("acme").unwrap()));
    assert_eq!(send(&app, charge("\"k 1\"")).await.body, "k 1 acme 1");
    let answer = send(&app, request(Method::POST, None, "")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(answer.problem()["code"], "key-missing");
}

#[tokio::test]
async fn an_optional_extractor_is_none_without_a_key() {
    let handler = |idempotency: Option<Idempotency>| async move { idempotency.is_some().to_string() };
    let app = Router::new().route("/charges", post(handler)).layer(layer());
    assert_eq!(send(&app, request(Method::POST, None, "")).await.body, "false");
    assert_eq!(send(&app, charge("k")).await.body, "true");
}

#[tokio::test]
async fn a_layer_inside_a_clone_of_itself_passes_through() {
    let layer = layer();
    let (app, runs) = counting(layer.clone());
    let app = app.layer(layer);
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_disabled_layer_passes_everything() {
    let (app, runs) = counting(layer().required().disabled());
    for _ in 0..2 {
        assert_eq!(send(&app, charge("a,b")).await.status, StatusCode::CREATED);
    }
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn too_many_attempts_at_once_are_shed_before_the_claim() {
    let layer = layer().with_max_in_flight(1);
    let handle = layer.handle();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    send(&app, charge("other")).await.assert_refused(RejectionCode::Overloaded);
    assert_eq!(handle.list(RecordFilter::All, 10).await.unwrap().len(), 1);
    first.await.unwrap();
    assert_eq!(send(&app, charge("other")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn draining_waits_for_attempts_whose_client_has_left_and_refuses_new_ones() {
    let layer = layer();
    let handle = layer.handle();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = tokio::spawn(send_owned(app.clone(), charge("k")));
    while runs.count() == 0 {
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(handle.drain(Duration::from_millis(10)).await.is_err());
    send(&app, charge("new")).await.assert_refused(RejectionCode::ShuttingDown);
    handle.drain(Duration::from_secs(10)).await.unwrap();
    let records = handle.list(RecordFilter::Completed, 10).await.unwrap();
    assert_eq!(records.len(), 1);
    assert!(matches!(records[0].state, RecordState::Completed { .. }));
}

#[test]
fn the_layer_can_be_built_outside_a_runtime_and_used_on_several() {
    let layer = layer();
    let (app, _) = counting(layer);
    for replay in [false, true] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        assert_eq!(runtime.block_on(send(&app, charge("k"))).is_replay(), replay);
    }
}

#[test]
fn impossible_configurations_are_refused_where_they_are_made() {
    let panics = |configure: fn(IdempotencyLayer) -> IdempotencyLayer| {
        let panic = std::panic::catch_unwind(|| configure(layer())).unwrap_err();
        panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| (*panic.downcast_ref::<&str>().unwrap()).into())
    };
    let message = panics(|layer| layer.with_retention(Duration::from_secs(20)));
    assert!(message.contains("raise the retention"), "{message}");
    let message = panics(|layer| layer.with_methods([Method::POST, Method::GET]));
    assert!(message.contains("GET cannot be guarded"), "{message}");
    let message = panics(|layer| layer.with_lease(Duration::from_millis(1)));
    assert!(message.contains("too short"), "{message}");
    let message = panics(|layer| layer.with_renewal_interval(Duration::from_secs(30)));
    assert!(message.contains("renew at least twice"), "{message}");
    let message = panics(|layer| layer.with_max_execution(Duration::from_secs(24 * 60 * 60)));
    assert!(message.contains("raise the retention"), "{message}");
}

async fn send_owned(app: Router, request: Request) -> Answer {
    send(&app, request).await
}

fn with_store() -> (Arc<dyn Store>, IdempotencyLayer) {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    (Arc::clone(&store), IdempotencyLayer::new(store).with_reaper(tower_idempotency::Reaper::off()))
}

/// A store whose every call fails as if nothing answered.
fn unreachable_store() -> MemoryStore {
    MemoryStore::new().with_max_records(0)
}

async fn claim(store: &Arc<dyn Store>, attempt: &Attempt, fingerprint: &tower_idempotency::Fingerprint) {
    let outcome = store.claim(&Claim::new(attempt.clone(), fingerprint.clone())).await.unwrap();
    assert!(matches!(outcome, ClaimOutcome::Won { .. }));
}

/// The fingerprint that the layer computes for [`charge`].
async fn fingerprint_of_charge() -> tower_idempotency::Fingerprint {
    let (store, layer) = with_store();
    send(&counting(layer).0, charge("k")).await;
    let (consumer, key) = acme();
    store.get(&consumer, &key).await.unwrap().unwrap().fingerprint
}

fn stream<T>(items: impl IntoIterator<Item = T>) -> impl futures_core::Stream<Item = T> {
    tokio_stream::iter(items.into_iter().collect::<Vec<_>>())
}

fn futures_stream(chunks: [&'static str; 2]) -> impl futures_core::Stream<Item = Result<Bytes, Infallible>> {
    stream(chunks.map(|chunk| Ok(Bytes::from(chunk))))
}
