//! Claims of one key that are under way simultaneously ask the store once, and none of them is answered worse for it.

use std::{sync::Arc, time::Duration};

use axum::Router;
use tokio::task::JoinHandle;
use tower::ServiceExt;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Reaper, RejectionCode, ReplayCache};

use crate::support::{
    asked::Asked,
    direct::{Answer, abandon, charge, counting, request, send, start},
    served::Count,
};

/// An application whose store is asked for every retry.
fn node() -> (Asked, Router, Count) {
    let store = Asked::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(store.clone()).with_reaper(Reaper::off());
    let (app, runs) = counting(layer.with_replay_cache(ReplayCache::off()));
    (store, app, runs)
}

/// Sends the first request, and the others once that asks the store. They have joined it when this returns.
async fn join(
    store: &Asked,
    app: &Router,
    first: &'static str,
    others: &[&'static str],
) -> Vec<JoinHandle<Answer>> {
    let asked = store.claims();
    let send = |body: &'static str| start(app, request(http::Method::POST, Some("k"), body));
    let mut answers = vec![send(first)];
    store.until_claims(asked + 1).await;
    answers.extend(others.iter().map(|body| send(body)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(store.claims(), asked + 1);
    answers
}

async fn all(tasks: Vec<JoinHandle<Answer>>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    answers
}

#[tokio::test]
async fn one_claims_and_the_others_find_it_in_progress() {
    let (store, app, runs) = node();
    store.hold_answers(true);
    let answers = join(&store, &app, "2000", &["2000", "2000", "1"]).await;
    store.hold_answers(false);
    let [first, second, third, other] = &all(answers).await[..] else { panic!("four") };
    assert_eq!(first.status, 201);
    second.assert_refused(RejectionCode::InProgress);
    third.assert_refused(RejectionCode::InProgress);
    // Each compares its own fingerprint.
    other.assert_refused(RejectionCode::KeyReused);
    assert_eq!((store.claims(), runs.get()), (1, 1));
    first.assert_same_replay(&send(&app, charge("k")).await);
}

#[tokio::test]
async fn replays_share_one_look() {
    let (store, app, runs) = node();
    let first = send(&app, charge("k")).await;
    store.hold_answers(true);
    let answers = join(&store, &app, "2000", &["2000", "1", "2000"]).await;
    store.hold_answers(false);
    let answers = all(answers).await;
    for replay in [&answers[0], &answers[1], &answers[3]] {
        first.assert_same_replay(replay);
    }
    answers[2].assert_refused(RejectionCode::KeyReused);
    assert_eq!((store.claims(), runs.get()), (2, 1));
}

#[tokio::test]
async fn an_error_of_one_is_not_shared() {
    let (store, app, runs) = node();
    store.hold_answers(true);
    store.fail_next(1);
    let answers = join(&store, &app, "2000", &["2000"; 5]).await;
    store.hold_answers(false);
    let answers = all(answers).await;
    answers[0].assert_refused(RejectionCode::StoreUnavailable);
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
    for answer in &answers[1..] {
        assert!(answer.status == 201 || answer.rejection == Some(RejectionCode::InProgress), "{answer:?}");
    }
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_panic_of_one_is_not_shared() {
    let (store, app, runs) = node();
    store.hold_answers(true);
    store.panic_next();
    let answers = join(&store, &app, "2000", &["2000"]).await;
    store.hold_answers(false);
    let answers = all(answers).await;
    assert_eq!(answers[0].status, 500);
    // What the store did before it panicked stays; its lease gives the key back.
    answers[1].assert_refused(RejectionCode::InProgress);
    assert_eq!((store.claims(), runs.get()), (2, 0));
}

#[tokio::test]
async fn a_lapsed_record_that_one_may_not_take_over_is_taken_over_by_the_next() {
    let (store, app, runs) = node();
    abandon(store.behind()).await;
    store.hold_answers(true);
    let answers = join(&store, &app, "1", &["2000"]).await;
    store.hold_answers(false);
    let answers = all(answers).await;
    answers[0].assert_refused(RejectionCode::KeyReused);
    assert_eq!((answers[1].status.as_u16(), runs.get()), (201, 1));
}

#[tokio::test]
async fn the_others_are_answered_when_the_caller_of_the_first_has_gone() {
    let (store, app, runs) = node();
    store.hold_answers(true);
    let mut answers = join(&store, &app, "2000", &["2000"]).await;
    answers.remove(0).abort();
    store.hold_answers(false);
    let other = all(answers).await;
    other[0].assert_refused(RejectionCode::InProgress);
    while !send(&app, charge("k")).await.is_replay() {
        tokio::task::yield_now().await;
    }
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn the_others_ask_themselves_when_the_runtime_of_the_first_ends() {
    let (store, app, runs) = node();
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    store.hold_answers(true);
    first.spawn(app.clone().oneshot(charge("k")));
    store.until_claims(1).await;
    let second = start(&app, charge("k"));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(store.claims(), 1);
    first.shutdown_background();
    store.until_claims(2).await;
    store.hold_answers(false);
    // The claim of the first was carried out; its lease gives the key back.
    second.await.unwrap().assert_refused(RejectionCode::InProgress);
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn those_behind_wait_no_longer_than_the_store_may_take() {
    let store = Asked::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(store.clone()).with_reaper(Reaper::off());
    let patient = layer.clone().with_store_timeout(Duration::from_secs(10));
    let (patient, _) = counting(patient);
    let (hasty, runs) = counting(layer.with_store_timeout(Duration::from_millis(100)));
    store.hold_answers(true);
    let first = start(&patient, charge("k"));
    store.until_claims(1).await;
    send(&hasty, charge("k")).await.assert_refused(RejectionCode::StoreUnavailable);
    store.hold_answers(false);
    assert_eq!((first.await.unwrap().status.as_u16(), store.claims(), runs.get()), (201, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_and_many_duplicates_run_once_each() {
    let (_, app, runs) = node();
    let keys = 50;
    let tasks: Vec<_> =
        (0..keys * 20).map(|number| start(&app, charge(&format!("k{}", number % keys)))).collect();
    let answers = Arc::new(all(tasks).await);
    assert_eq!(answers.iter().filter(|answer| answer.status == 201 && !answer.is_replay()).count(), keys);
    assert_eq!(runs.get(), keys);
}
