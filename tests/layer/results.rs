//! What becomes of results, and of attempts that end without one, on the memory store and without a socket.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, StatusCode},
    response::IntoResponse,
    routing::post,
};
use tower::ServiceExt;
use tower_idempotency::{
    Directive, Idempotency, Rejection, RejectionCode, ResultPolicy,
    store::{Fingerprint, RecordFilter, RecordState, Store, StoredResponse},
};

use crate::support::{
    direct::{
        answering, answering_after, begin, charge, claim, counting, fingerprint_of_charge, identity, send,
        waiting, with_store,
    },
    served::{Count, layer},
};

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
    assert_eq!(runs.get(), 3);
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
    assert_eq!(runs.get(), 2);
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
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn an_error_of_the_inner_service_reaches_the_caller_and_releases_the_key() {
    let runs = Count::default();
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
    assert_eq!(runs.get(), 2);
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
async fn a_stored_response_that_is_damaged_or_unknown_fails_closed() {
    for damage in [|bytes: &mut Vec<u8>| bytes[0] = 99, |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1]
    {
        let (store, layer) = with_store();
        let (app, runs) = counting(layer);
        let attempt = claim(&*store, fingerprint_of_charge().await).await;
        let mut bytes = StoredResponse::new(StatusCode::OK, HeaderMap::new(), "x").encode().to_vec();
        damage(&mut bytes);
        store.complete(&attempt, bytes.into()).await.unwrap();
        send(&app, charge("k")).await.assert_refused(RejectionCode::RecordUnreadable);
        assert_eq!(runs.get(), 0);
    }
}

#[tokio::test]
async fn after_a_takeover_the_first_attempt_answers_what_the_second_stored() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(400));
    let first = begin(&app, charge("k"), &runs).await;
    complete_elsewhere(&*store, fingerprint_of_charge().await).await;
    assert_eq!(first.await.unwrap().body, "the other's");
}

#[tokio::test]
async fn a_key_that_became_another_requests_meanwhile_does_not_lend_its_response() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = begin(&app, charge("k"), &runs).await;
    complete_elsewhere(&*store, Fingerprint::from_bytes("another request")).await;
    assert_eq!(first.await.unwrap().body, "run 1");
}

#[tokio::test]
async fn a_record_that_is_gone_does_not_take_the_answer_away() {
    let (store, layer) = with_store();
    let (app, runs) = waiting(layer, Duration::from_millis(300));
    let first = begin(&app, charge("k"), &runs).await;
    let (consumer, key) = identity();
    store.evict(&consumer, &key).await.unwrap();
    assert_eq!(first.await.unwrap().body, "run 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_that_does_not_yield_returns_after_max_execution_counts() {
    let (app, runs) = answering(layer().with_max_execution(Duration::from_millis(100)), |run| {
        std::thread::sleep(Duration::from_millis(400));
        format!("run {run}").into_response()
    });
    assert_eq!(send(&app, charge("k")).await.body, "run 1");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn at_most_once_holds_after_a_time_out_inside_the_layer() {
    let policy = || layer().with_policy(ResultPolicy::at_most_once());
    let (app, runs) = answering(policy(), |_| StatusCode::REQUEST_TIMEOUT.into_response());
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::REQUEST_TIMEOUT);
    send(&app, charge("k")).await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(runs.get(), 1);

    let inner = tower::service_fn(|_: http::Request<_>| async {
        std::future::pending::<Result<http::Response<Body>, tower::BoxError>>().await
    });
    let service =
        tower::ServiceBuilder::new().layer(policy()).timeout(Duration::from_millis(50)).service(inner);
    assert!(service.clone().oneshot(charge("k")).await.is_err());
    let retry = service.oneshot(charge("k")).await.unwrap();
    assert_eq!(retry.extensions().get::<Rejection>().unwrap().code(), RejectionCode::OutcomeUnknown);
}

#[tokio::test]
async fn a_handle_that_outlives_its_attempt_does_not_keep_the_key() {
    let handles = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&handles);
    let handler = move |idempotency: Idempotency| async move {
        let mut handles = kept.lock().unwrap();
        handles.push(idempotency);
        if handles.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::CREATED }
    };
    let app = Router::new().route("/charges", post(handler)).layer(layer());
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(handles.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_policy_that_panics_leaves_no_key_behind() {
    let policy = ResultPolicy::from_fn(|status| match status {
        StatusCode::ACCEPTED => panic!("the policy breaks"),
        _ => Directive::Store,
    });
    let (app, runs) = answering(layer().with_policy(policy), |run| match run {
        1 => StatusCode::ACCEPTED.into_response(),
        _ => StatusCode::OK.into_response(),
    });
    send(&app, charge("k")).await.assert_refused(RejectionCode::Internal);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::OK);
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn a_refusal_of_a_layer_inside_is_not_stored() {
    let (app, runs) = counting(layer().with_request_body_limit(1));
    let outer = layer();
    let handle = outer.handle();
    let app = app.layer(outer);
    send(&app, charge("k")).await.assert_refused(RejectionCode::RequestTooLarge);
    assert!(handle.list(RecordFilter::All, 1).await.unwrap().is_empty());
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn a_lost_attempt_does_not_contradict_the_record_with_a_result_that_is_not_stored() {
    let (store, layer) = with_store();
    let wait = Duration::from_millis(300);
    let (app, runs) = answering_after(layer, wait, |_| StatusCode::FORBIDDEN.into_response());
    let first = begin(&app, charge("k"), &runs).await;
    complete_elsewhere(&*store, fingerprint_of_charge().await).await;
    assert_eq!(first.await.unwrap().body, "the other's");
}

#[test]
fn a_runtime_that_ends_early_does_not_end_renewing_for_ever() {
    let layer = layer().with_lease(Duration::from_millis(400));
    for key in ["1", "2", "3"] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (app, runs) = waiting(layer.clone(), Duration::from_secs(60));
        drop(runtime.block_on(begin(&app, charge(key), &runs)));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let handle = layer.handle();
        let (app, runs) = waiting(layer, Duration::from_millis(1200));
        let first = begin(&app, charge("k"), &runs).await;
        tokio::time::sleep(Duration::from_millis(800)).await;
        let (consumer, key) = identity();
        let state = handle.get(&consumer, &key).await.unwrap().unwrap().state;
        assert!(
            matches!(state, RecordState::InProgress { lease_remaining, .. } if !lease_remaining.is_zero())
        );
        assert_eq!(first.await.unwrap().body, "run 1");
    });
}

/// Takes the key from the attempt that runs, and stores another response under it.
async fn complete_elsewhere(store: &dyn Store, fingerprint: Fingerprint) {
    let (consumer, key) = identity();
    store.evict(&consumer, &key).await.unwrap();
    let other = claim(store, fingerprint).await;
    let stored = StoredResponse::new(StatusCode::CREATED, HeaderMap::new(), "the other's");
    store.complete(&other, stored.encode()).await.unwrap();
}
