//! Refusals behind a handler that has run: where a second execution is worse than none, they hold the key.

use std::convert::Infallible;

use axum::{
    Extension, Router,
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use tokio::sync::mpsc::Sender;
use tokio_stream::StreamExt;
use tower::ServiceExt;
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

/// Work that a handler does while its streaming body is read.
#[tokio::test]
async fn a_stream_is_made_to_its_end_when_its_client_has_left() {
    for content_type in ["application/json", "application/x-ndjson"] {
        let made = Count::default();
        let counter = made.clone();
        let handler = async move || {
            let (sender, lines) = tokio::sync::mpsc::channel::<Result<&str, Infallible>>(1);
            tokio::spawn(async move {
                while made_line(&sender).await {
                    counter.add();
                }
            });
            let lines = tokio_stream::wrappers::ReceiverStream::new(lines).take(5);
            ([(header::CONTENT_TYPE, content_type)], Body::from_stream(lines))
        };
        let app = Router::new().route("/charges", post(handler)).layer(layer());
        drop(app.clone().oneshot(charge("k")).await);
        let retry = send(&app, charge("k")).await;
        assert!(made.get() >= 5, "{content_type}: {} lines, then {:?}", made.get(), retry.rejection);
    }
}

async fn made_line(sender: &Sender<Result<&'static str, Infallible>>) -> bool {
    sender.send(Ok("line\n")).await.is_ok()
}

/// The handle comes out of the extensions, so that the extractor cannot tell the runs apart.
#[tokio::test]
async fn a_second_run_with_a_handle_of_the_extensions_makes_no_call() {
    for (what, inside) in &RERUNS[..5] {
        let (runs, calls) = (Count::default(), Count::default());
        let (run, call) = (runs.clone(), calls.clone());
        let handler = async move |Extension(idempotency): Extension<Idempotency>| {
            let status = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::CREATED][run.add() - 1];
            idempotency.intent("bank").call(async |_| Ok(format!("ch_{}", call.add()).into())).await?;
            Ok::<_, IntentError>(status)
        };
        let app = inside(Router::new().route("/charges", post(handler))).layer(layer());
        let answer = send(&app, charge("k")).await;
        assert_eq!(calls.get(), 1, "{what}: {answer:?}");
    }
}
