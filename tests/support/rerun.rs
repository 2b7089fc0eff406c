//! Middlewares between the layer and its handler that run the handler more than once for one request.

use std::{convert::Infallible, future::Ready};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    handler::Handler,
    http::{Extensions, StatusCode, request::Parts},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::post,
};
use tower::retry::{Policy, RetryLayer};
use tower_idempotency::Idempotency;

use super::served::Count;

/// What lies between a layer and a handler, with its name.
pub type Inside = (&'static str, fn(Router) -> Router);

/// Ways to run a handler again after a 5xx, or twice simultaneously.
pub const RERUNS: [Inside; 6] = [
    ("copies-for-both", |router| router.layer(from_fn(copies))),
    ("the-original-last", |router| router.layer(from_fn(original_last))),
    ("a-copy-of-a-copy", |router| router.layer(from_fn(copy_of_copy))),
    ("after-a-look-at-the-key", |router| router.layer(from_fn(after_extraction))),
    ("tower-retry", |router| router.layer(RetryLayer::new(Twice(true)))),
    ("a-hedge", |router| router.layer(from_fn(hedge))),
];

/// A router whose handler fails in its first run, and the number of its runs.
pub fn failing_first<T: 'static>(handler: impl Handler<T, ()>) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |request: Request| {
        let (handler, run) = (handler.clone(), counter.add());
        async move {
            let response = handler.call(request, ()).await;
            if run == 1 { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { response }
        }
    };
    (Router::new().route("/charges", post(handler)), runs)
}

async fn whole(request: Request) -> (Parts, Bytes) {
    let (parts, body) = request.into_parts();
    (parts, axum::body::to_bytes(body, usize::MAX).await.unwrap())
}

fn copy(parts: &Parts, body: &Bytes) -> Request {
    Request::from_parts(parts.clone(), Body::from(body.clone()))
}

async fn copies(request: Request, next: Next) -> Response {
    let (parts, body) = whole(request).await;
    let first = next.clone().run(copy(&parts, &body)).await;
    if first.status().is_server_error() { next.run(copy(&parts, &body)).await } else { first }
}

async fn original_last(request: Request, next: Next) -> Response {
    let (parts, body) = whole(request).await;
    let first = next.clone().run(copy(&parts, &body)).await;
    if first.status().is_server_error() {
        next.run(Request::from_parts(parts, body.into())).await
    } else {
        first
    }
}

async fn copy_of_copy(request: Request, next: Next) -> Response {
    let (parts, body) = whole(request).await;
    let kept = parts.clone();
    let first = next.clone().run(Request::from_parts(parts, body.clone().into())).await;
    if first.status().is_server_error() { next.run(copy(&kept, &body)).await } else { first }
}

async fn after_extraction(idempotency: Idempotency, request: Request, next: Next) -> Response {
    assert!(!idempotency.key().as_str().is_empty());
    copies(request, next).await
}

async fn hedge(request: Request, next: Next) -> Response {
    let (parts, body) = whole(request).await;
    let both = tokio::join!(next.clone().run(copy(&parts, &body)), next.run(copy(&parts, &body)));
    if both.0.status().is_success() { both.0 } else { both.1 }
}

/// Once more after a 5xx.
#[derive(Clone)]
pub struct Twice(pub bool);

impl Policy<Request, Response, Infallible> for Twice {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request, result: &mut Result<Response, Infallible>) -> Option<Self::Future> {
        let again = self.0 && result.as_ref().is_ok_and(|response| response.status().is_server_error());
        self.0 = false;
        again.then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        let mut copy =
            Request::builder().method(request.method()).uri(request.uri()).body(Body::empty()).unwrap();
        *copy.headers_mut() = request.headers().clone();
        *copy.extensions_mut() = request.extensions().clone();
        Some(copy)
    }
}

/// Middlewares that look at a request, copy it or change it, and run the handler once.
pub const ONCE: [Inside; 4] = [
    ("a copy", |router| {
        router.layer(from_fn(async |request: Request, next: Next| {
            let (parts, body) = whole(request).await;
            let response = next.run(copy(&parts, &body)).await;
            assert_eq!(parts.method, axum::http::Method::POST);
            response
        }))
    }),
    ("the key is read", |router| {
        router.layer(from_fn(async |idempotency: Idempotency, request: Request, next: Next| {
            let response = next.run(request).await;
            assert!(!idempotency.key().as_str().is_empty());
            response
        }))
    }),
    ("an extractor", |router| router.layer(axum::middleware::from_extractor::<Idempotency>())),
    ("extensions are kept", |router| {
        router.layer(from_fn(async |kept: Extensions, request: Request, next: Next| {
            let response = next.run(request).await;
            assert!(kept.get::<Idempotency>().is_some());
            response
        }))
    }),
];
