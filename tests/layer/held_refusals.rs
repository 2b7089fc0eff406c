//! Refusals behind a handler that has run: where a second execution is worse than none, they hold the key.

use axum::{
    Extension, Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use tower_idempotency::{
    Directive, Idempotency, IdempotencyLayer, IntentError, MemoryStore, RejectionCode, ResultPolicy, TxError,
};

use crate::support::{
    direct::{charge, send},
    rerun::RERUNS,
    served::{Count, layer},
};

fn at_most_once() -> IdempotencyLayer {
    layer().with_policy(ResultPolicy::at_most_once())
}

/// The handler has done something that the layer does not know.
#[tokio::test]
async fn a_handler_that_answers_with_a_refusal_may_hold_its_key() {
    for (directive, expected) in [(None, 2), (Some(Directive::Store), 2), (Some(Directive::Hold), 1)] {
        let runs = Count::default();
        let counter = runs.clone();
        let handler = async move || {
            counter.add();
            (directive.map(Extension), TxError::from(sqlx::Error::PoolTimedOut))
        };
        let app = Router::new().route("/charges", post(handler)).layer(at_most_once());
        let answers = [send(&app, charge("k")).await, send(&app, charge("k")).await];
        assert_eq!(runs.get(), expected, "{directive:?} {answers:?}");
    }
}

#[tokio::test]
async fn at_most_once_a_second_run_of_the_handler_is_the_last() {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = async move |idempotency: Idempotency| -> Result<Response, IntentError> {
        counter.add();
        idempotency.intent("bank").call(async |_| Ok("ch".into())).await?;
        Ok(StatusCode::SERVICE_UNAVAILABLE.into_response())
    };
    let app = RERUNS[0].1(Router::new().route("/charges", post(handler))).layer(at_most_once());
    let first = send(&app, charge("k")).await;
    let second = send(&app, charge("k")).await;
    assert_eq!(runs.get(), 2, "{first:?} {second:?}");
    assert_eq!(first.problem()["retryable"], false);
    second.assert_refused(RejectionCode::OutcomeUnknown);
}

/// The inner layer over a store of its own lets a panic run again; the outer one does not.
#[tokio::test]
async fn at_most_once_around_another_layer_a_handler_that_panics_does_not_run_again() {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = async move || -> StatusCode {
        counter.add();
        panic!("after its effect")
    };
    let inner = IdempotencyLayer::new(MemoryStore::new());
    let app = Router::new().route("/charges", post(handler)).layer(inner).layer(at_most_once());
    let first = send(&app, charge("k")).await;
    let second = send(&app, charge("k")).await;
    assert_eq!(runs.get(), 1, "{first:?} {second:?}");
}
