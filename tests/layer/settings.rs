//! What can be configured, what operators and handlers can ask for, and the end of service, on the memory store and
//! without a socket.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::map_response,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use tower::Layer;
use tower_idempotency::{
    Consumer, ConsumerExtractor, Fingerprinter, Idempotency, IdempotencyLayer, IntentError, KeySyntax,
    MemoryStore, ProblemJson, Rejection, RejectionCode, ResultPolicy, Tx, TxError,
    store::{RecordFilter, RecordState, Store},
};

use crate::support::{
    direct::{abandon, begin, charge, counting, request, send, waiting, with_store},
    served::{Count, layer},
};

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
    assert_eq!(runs.get(), 4);
    assert!(send(&app, from("a:b", "c")).await.is_replay());
}

#[tokio::test]
async fn in_a_nested_router_the_original_path_counts() {
    let runs = Count::default();
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
    assert_eq!(runs.get(), 3);
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

/// A house style of errors that nothing of a problem document is in.
fn plain(rejection: &Rejection) -> http::Response<Bytes> {
    let mut response = http::Response::new(Bytes::from(rejection.code().as_str()));
    *response.status_mut() = StatusCode::IM_A_TEAPOT;
    response.headers_mut().insert("x-style", HeaderValue::from_static("plain"));
    response
}

fn answering_with<R: IntoResponse + 'static>(answer: fn() -> R) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move || async move {
        counter.add();
        answer()
    };
    (Router::new().route("/charges", post(handler)), runs)
}

#[tokio::test]
async fn refusals_of_handlers_and_extractors_are_rendered_as_the_layers() {
    let unreachable = || IntentError::NotSent("no connection".into());
    let apps = [
        ("upstream-unavailable", answering_with(unreachable).0),
        ("upstream-unavailable", answering_with(|| TxError::from(IntentError::NotSent("none".into()))).0),
        ("transaction-lost", answering_with(|| TxError::from(sqlx::Error::WorkerCrashed)).0),
        ("store-misconfigured", Router::new().route("/charges", post(async |_: Tx<sqlx::Sqlite>| {}))),
    ];
    for (code, app) in apps {
        let answer = send(&app.layer(layer().with_renderer(plain)), charge("k")).await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::IM_A_TEAPOT, code.as_bytes()));
        assert_eq!(answer.rejection.unwrap().as_str(), code);
        assert_eq!(answer.headers["x-style"], "plain");
        assert_eq!(answer.headers[header::CACHE_CONTROL], "no-store");
        assert!(!answer.headers.contains_key(header::CONTENT_TYPE), "{answer:?}");
    }
}

#[tokio::test]
async fn refusals_of_requests_without_a_key_are_rendered_as_the_layers() {
    let apps = [
        Router::new().route("/charges", post(async |_: Tx<sqlx::Sqlite>| {})),
        Router::new().route("/charges", post(async |_: Idempotency| {})),
    ];
    for app in apps {
        let answer = send(&app.layer(layer().with_renderer(plain)), request(Method::POST, None, "")).await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::IM_A_TEAPOT, &b"key-missing"[..]));
        assert_eq!(answer.rejection, Some(RejectionCode::KeyMissing));
    }
}

#[tokio::test]
async fn an_upstreams_refusal_is_stored_as_it_was_rendered() {
    let (app, runs) = answering_with(|| IntentError::Refused("the card is stolen".into()));
    let app = app.layer(layer().with_renderer(plain));
    let first = send(&app, charge("k")).await;
    assert_eq!((first.status, &first.body[..]), (StatusCode::IM_A_TEAPOT, &b"upstream-refused"[..]));
    assert_eq!(first.rejection, None);
    first.assert_same_replay(&send(&app, charge("k")).await);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn what_a_middleware_inside_has_added_to_a_refusal_stays() {
    let mark = |mut response: Response| async {
        let headers = response.headers_mut();
        headers.insert("x-request-id", HeaderValue::from_static("7"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private"));
        headers.append(header::RETRY_AFTER, HeaderValue::from_static("9"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("1"));
        response.extensions_mut().insert(7_u8);
        response
    };
    let (app, _) = answering_with(|| IntentError::NotSent("no connection".into()));
    let app = app.layer(map_response(mark)).layer(layer().with_renderer(plain)).layer(map_response(
        |mut response: Response| async {
            let kept = response.extensions().get::<u8>().copied().unwrap_or_default();
            response.headers_mut().insert("x-kept", u16::from(kept).into());
            response
        },
    ));
    let answer = send(&app, charge("k")).await;
    assert_eq!(answer.body, "upstream-unavailable");
    assert_eq!(answer.headers["x-request-id"], "7");
    assert_eq!(answer.headers["x-kept"], "7");
    let all = |name: HeaderName| answer.headers.get_all(name).iter().cloned().collect::<Vec<_>>();
    assert_eq!(all(header::CACHE_CONTROL), ["private"]);
    assert_eq!(all(header::RETRY_AFTER), ["1", "9"]);
    assert_ne!(all(header::CONTENT_LENGTH), ["1"]);
}

#[tokio::test]
async fn what_a_middleware_inside_has_made_of_a_refusal_is_left_alone() {
    let (app, _) = answering_with(|| IntentError::NotSent("no connection".into()));
    let page = map_response(|response: Response| async {
        let (mut parts, _) = response.into_parts();
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
        Response::from_parts(parts, Body::from("<h1>later</h1>"))
    });
    let answer = send(&app.layer(page).layer(layer().with_renderer(plain)), charge("k")).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::SERVICE_UNAVAILABLE, &b"<h1>later</h1>"[..]));
}

#[tokio::test]
async fn a_body_that_the_handler_has_given_to_a_refusal_is_left_alone() {
    const OWN: &str = r#"{"code":"card_declined"}"#;
    let declined = async || {
        let response = IntentError::Refused("the card is stolen".into()).into_http_response();
        response.map(|_| Body::from(OWN))
    };
    for layer in [layer(), layer().with_renderer(plain)] {
        let app = Router::new().route("/charges", post(declined)).layer(layer);
        let first = send(&app, charge("k")).await;
        assert_eq!((first.status, &first.body[..]), (StatusCode::UNPROCESSABLE_ENTITY, OWN.as_bytes()));
        first.assert_same_replay(&send(&app, charge("k")).await);
        // Also without a key.
        let answer = send(&app, request(Method::POST, None, "")).await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::UNPROCESSABLE_ENTITY, OWN.as_bytes()));
    }
}

#[tokio::test]
async fn a_renderer_that_panics_changes_neither_the_end_of_an_attempt_nor_requests_without_a_key() {
    let broken = |_: &Rejection| -> http::Response<Bytes> { panic!("the renderer") };
    let layer = layer().with_policy(ResultPolicy::at_most_once()).with_renderer(broken);
    let handle = layer.handle();
    let (app, _) = answering_with(|| IntentError::NotSent("no connection".into()));
    let app = app.layer(layer);
    send(&app, charge("k")).await.assert_refused(RejectionCode::UpstreamUnavailable);
    assert!(handle.list(RecordFilter::All, 9).await.unwrap().is_empty());
    let answer = send(&app, request(Method::POST, None, "")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_refusal_is_rendered_by_the_innermost_layer_that_makes_it() {
    let (app, runs) = answering_with(|| StatusCode::CREATED);
    let inner = layer().with_key_header(HeaderName::from_static("x-other")).required().with_renderer(plain);
    let answer = send(&app.layer(inner).layer(layer()), charge("k")).await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::IM_A_TEAPOT, &b"key-missing"[..]));
    assert_eq!(runs.get(), 0);

    // A layer inside its clone has no say.
    let (app, _) = answering_with(|| IntentError::NotSent("no connection".into()));
    let outer = layer();
    let app = app.layer(outer.clone().with_renderer(plain)).layer(outer);
    send(&app, charge("k")).await.assert_refused(RejectionCode::UpstreamUnavailable);
}

#[tokio::test]
async fn the_type_of_a_problem_can_lead_to_a_page_of_the_applications_own() {
    let problems = ProblemJson::default().with_type_base("https://errors.example.com/");
    let (app, _) = answering_with(|| IntentError::NotSent("no connection".into()));
    let answer = send(&app.clone().layer(layer().with_renderer(problems)), charge("k")).await;
    answer.assert_refused(RejectionCode::UpstreamUnavailable);
    assert_eq!(answer.problem()["type"], "https://errors.example.com/upstream-unavailable");
    let answer = send(&app.layer(layer()), charge("k")).await;
    let docs = "https://docs.rs/tower-idempotency/latest/tower_idempotency/rejection/enum.RejectionCode.html";
    assert_eq!(answer.problem()["type"], format!("{docs}#variant.UpstreamUnavailable"));
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
    abandon(&*store).await;
    let fingerprinter = Fingerprinter::default().keyed(2, "two").add_previous(Fingerprinter::default());
    let (app, runs) = counting(layer.with_fingerprint(fingerprinter));
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 1);
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
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_disabled_layer_passes_everything() {
    let (app, runs) = counting(layer().required().disabled());
    for _ in 0..2 {
        assert_eq!(send(&app, charge("a,b")).await.status, StatusCode::CREATED);
    }
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn too_many_attempts_at_once_are_shed_before_the_claim() {
    let layer = layer().with_max_in_flight(1);
    let handle = layer.handle();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = begin(&app, charge("k"), &runs).await;
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
    let first = begin(&app, charge("k"), &runs).await;
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
fn impossible_configurations_are_refused_where_they_are_made_or_used() {
    let panics = |configure: fn(IdempotencyLayer) -> IdempotencyLayer| {
        let panic = std::panic::catch_unwind(|| configure(layer()).layer(())).unwrap_err();
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
