//! An intent that is asked for again with other arguments.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{Router, http::StatusCode, routing::post};
use tower_idempotency::{
    CallFailure, Idempotency, IdempotencyHandle, IdempotencyLayer, Intent, IntentError, Lookup, MemoryStore,
    Reconciler, RejectionCode, Resource,
};

use crate::support::direct;

/// The outcome of the first call.
#[derive(Clone, Copy)]
enum First {
    NotSent,
    Unknown,
}

/// A handler whose arguments come in another order in every attempt, as those of a `HashSet`.
fn app(first: First) -> (Router, IdempotencyHandle) {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let (handle, runs) = (layer.handle(), Arc::new(AtomicUsize::new(0)));
    let pay = async move |idempotency: Idempotency| {
        let run = runs.fetch_add(1, Ordering::SeqCst);
        let call = async |_| match (run, first) {
            (0, First::NotSent) => Err(CallFailure::not_sent("no connection")),
            (0, First::Unknown) => Err(CallFailure::unknown("reset")),
            _ => Ok(Resource::new("tr_1")),
        };
        let arguments = if run % 2 == 0 { ["DE02", "DE03"] } else { ["DE03", "DE02"] };
        let made = idempotency.intent("bank.transfer").with_arguments(&arguments).call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    (Router::new().route("/charges", post(pay)).layer(layer), handle)
}

#[tokio::test]
async fn other_arguments_replace_those_of_a_call_that_was_not_sent() {
    let (app, _) = app(First::NotSent);
    direct::send(&app, direct::charge("k")).await.assert_refused(RejectionCode::UpstreamUnavailable);
    assert_eq!(direct::send(&app, direct::charge("k")).await.status, StatusCode::CREATED);
    assert!(direct::send(&app, direct::charge("k")).await.is_replay());
}

#[tokio::test(start_paused = true)]
async fn other_arguments_replace_those_of_a_call_that_was_not_sent_and_was_closed_since() {
    let (app, handle) = app(First::NotSent);
    direct::send(&app, direct::charge("k")).await.assert_refused(RejectionCode::UpstreamUnavailable);
    tokio::time::sleep(std::time::Duration::from_secs(600)).await;
    let reconciler = Reconciler::new().on("bank.transfer", |_: Intent| async { Ok(Lookup::Unknown) });
    assert_eq!(handle.reconcile(&reconciler).await.unwrap().absent, 1);
    assert_eq!(direct::send(&app, direct::charge("k")).await.status, StatusCode::CREATED);
}

#[tokio::test(start_paused = true)]
async fn other_arguments_are_refused_once_a_call_may_have_been_sent() {
    let (app, handle) = app(First::Unknown);
    direct::send(&app, direct::charge("k")).await.assert_refused(RejectionCode::OutcomeUnknown);
    let reconciler = Reconciler::new().on("bank.transfer", |_: Intent| async { Ok(Lookup::NotFound) });
    for _ in 0..2 {
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        handle.reconcile(&reconciler).await.unwrap();
    }
    let refused = direct::send(&app, direct::charge("k")).await;
    refused.assert_refused(RejectionCode::OutcomeUnknown);
    assert!(refused.problem()["detail"].as_str().unwrap().contains("something else"), "{refused:?}");
}
