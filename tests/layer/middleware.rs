//! The decision table, row by row, on the memory store and without a socket.

use std::{convert::Infallible, io, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, Method, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;
use http_body_util::channel::Channel;
use tower_idempotency::{
    ConsumerExtractor, Directive, IdempotencyLayer, MemoryStore, RejectionCode,
    layer::StoreOutage,
    store::{RecordFilter, Resolution, ResolveOutcome, StoredResponse},
};

use crate::support::{
    direct::{
        abandon, answering, begin, charge, claim, counting, fingerprint_of_charge, identity, request, send,
        start, waiting, with_store,
    },
    served::layer,
};

#[tokio::test]
async fn row_1_a_method_that_is_not_guarded_passes_even_with_a_malformed_key() {
    for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE] {
        let (app, runs) = counting(layer().required());
        for _ in 0..2 {
            let answer = send(&app, request(method.clone(), Some("a,b"), "")).await;
            assert_eq!(answer.status, StatusCode::CREATED, "{method}");
        }
        assert_eq!(runs.get(), 2);
    }
}

#[tokio::test]
async fn row_2_without_a_key_the_store_is_not_touched() {
    let layer = IdempotencyLayer::new(unreachable_store());
    let (app, runs) = counting(layer);
    for _ in 0..2 {
        assert_eq!(send(&app, request(Method::POST, None, "")).await.status, StatusCode::CREATED);
    }
    assert_eq!(runs.get(), 2);
}

#[tokio::test]
async fn row_3_a_required_key_that_is_missing_is_refused() {
    let (app, runs) = counting(layer().required());
    let answer = send(&app, request(Method::POST, None, "")).await;
    answer.assert_refused(RejectionCode::KeyMissing);
    assert_eq!(answer.problem()["title"], "Idempotency-Key is missing");
    assert_eq!(runs.get(), 0);
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
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn row_5_a_consumer_that_cannot_be_told_is_refused() {
    let (app, runs) = counting(layer());
    let mut request = charge("k");
    request.headers_mut().insert("x-api-key", "secret".parse().unwrap());
    send(&app, request).await.assert_refused(RejectionCode::ConsumerUnidentified);
    let (app, more) = counting(layer().with_consumer(ConsumerExtractor::extension()));
    send(&app, charge("k")).await.assert_refused(RejectionCode::ConsumerUnidentified);
    assert_eq!(runs.get() + more.get(), 0);
}

#[tokio::test]
async fn row_6_a_body_over_the_limit_is_refused_and_nothing_is_claimed() {
    let layer = layer().with_request_body_limit(4);
    let handle = layer.handle();
    let (app, runs) = counting(layer);
    send(&app, request(Method::POST, Some("k"), "12345"))
        .await
        .assert_refused(RejectionCode::RequestTooLarge);
    let chunked = Body::from_stream(tokio_stream::iter(["123", "45"].map(Ok::<_, Infallible>)));
    send(&app, request(Method::POST, Some("k"), chunked))
        .await
        .assert_refused(RejectionCode::RequestTooLarge);
    assert!(handle.list(RecordFilter::All, 10).await.unwrap().is_empty());
    assert_eq!(runs.get(), 0);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn row_6_a_body_that_breaks_off_is_refused_and_nothing_is_claimed() {
    let layer = layer();
    let handle = layer.handle();
    let (app, runs) = counting(layer);
    let broken = tokio_stream::iter([Ok("20"), Err(io::Error::from(io::ErrorKind::UnexpectedEof))]);
    send(&app, request(Method::POST, Some("k"), Body::from_stream(broken)))
        .await
        .assert_refused(RejectionCode::RequestIncomplete);
    assert!(handle.list(RecordFilter::All, 10).await.unwrap().is_empty());
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn row_6_all_bodies_together_have_a_limit_and_room_is_given_back() {
    let (app, runs) = counting(layer().with_request_body_limit(6).with_request_buffer_limit(6));
    let (mut sender, slow) = Channel::<Bytes, Infallible>::new(1);
    let upload = start(&app, request(Method::POST, Some("slow"), Body::new(slow)));
    for chunk in ["1234", "", ""] {
        // The channel has room for one chunk: the third one fits when the first was taken.
        sender.send_data(Bytes::from(chunk)).await.unwrap();
    }
    send(&app, charge("k")).await.assert_refused(RejectionCode::Overloaded);
    drop(sender);
    assert_eq!(upload.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(send(&app, charge("later")).await.status, StatusCode::CREATED);
    assert_eq!(runs.get(), 2);
}

#[tokio::test(start_paused = true)]
async fn row_6_a_body_that_does_not_arrive_in_time_is_refused() {
    let (app, runs) = counting(layer());
    let (_sender, never) = Channel::<Bytes, Infallible>::new(1);
    send(&app, request(Method::POST, Some("k"), Body::new(never)))
        .await
        .assert_refused(RejectionCode::RequestTimeout);
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn row_7_an_unavailable_store_refuses_unless_told_otherwise() {
    let (app, runs) = counting(IdempotencyLayer::new(unreachable_store()));
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::StoreUnavailable);
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    assert_eq!(runs.get(), 0);
    let open = IdempotencyLayer::new(unreachable_store()).with_store_outage(StoreOutage::RunUnprotected);
    let (app, runs) = counting(open);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn row_8_another_request_under_the_key_is_refused_in_every_state() {
    let (store, layer) = with_store();
    let (app, runs) = counting(layer);
    let other = || request(Method::POST, Some("k"), "3000");

    let attempt = claim(&*store, fingerprint_of_charge().await).await;
    send(&app, other()).await.assert_refused(RejectionCode::KeyReused);

    store.hold(&attempt).await.unwrap();
    let (consumer, key) = identity();
    let before = store.get(&consumer, &key).await.unwrap();
    send(&app, other()).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!(store.get(&consumer, &key).await.unwrap(), before);

    store.evict(&consumer, &key).await.unwrap();
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    let answer = send(&app, other()).await;
    answer.assert_refused(RejectionCode::KeyReused);
    assert_eq!(answer.problem()["title"], "Idempotency-Key is already used");
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn row_8_another_request_does_not_take_an_abandoned_key_over() {
    let (store, layer) = with_store();
    let (app, runs) = counting(layer);
    abandon(&*store).await;
    send(&app, request(Method::POST, Some("k"), "3000")).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!(runs.get(), 0);
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn row_9_a_duplicate_of_a_running_request_gets_409_at_once() {
    let (app, runs) = waiting(layer(), Duration::from_millis(500));
    let first = begin(&app, charge("k"), &runs).await;
    let answer = send(&app, charge("k")).await;
    answer.assert_refused(RejectionCode::InProgress);
    assert_eq!(answer.problem()["title"], "A request is outstanding for this Idempotency-Key");
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    assert!(!first.is_finished());
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 1);
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

    let (consumer, key) = identity();
    let known = StoredResponse::new(StatusCode::ACCEPTED, HeaderMap::new(), "known");
    let outcome = handle.resolve(&consumer, &key, Resolution::complete(&known)).await.unwrap();
    assert_eq!(outcome, ResolveOutcome::Resolved);
    let answer = send(&app, charge("k")).await;
    assert!(answer.is_replay());
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::ACCEPTED, &b"known"[..]));
    assert_eq!(runs.get(), 1);
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
    assert_eq!(runs.get(), 1);
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
    assert_eq!(runs.get(), 1);
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
    assert_eq!(runs.get(), 2);
}

/// A store whose every claim fails as if nothing answered.
fn unreachable_store() -> MemoryStore {
    MemoryStore::new().with_max_records(0)
}
