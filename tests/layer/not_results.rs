//! Responses behind which no handler ran: redirects to elsewhere, missing routes, admission control. They release the
//! key under every policy, and what a handler says of its own stays a result.

use std::{convert::Infallible, sync::Arc};

use axum::{
    BoxError, Extension, Json, Router,
    body::Body,
    error_handling::HandleErrorLayer,
    extract::Request,
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use tokio::sync::Semaphore;
use tower::{
    Layer, ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer, load_shed::LoadShedLayer,
    service_fn,
};
use tower_idempotency::{
    Directive, Idempotency, IdempotencyLayer, Rejection, RejectionCode, ResultPolicy, layer::RequestBody,
    store::RecordFilter,
};

use crate::support::{
    direct::{charge, send},
    served::{Count, layer},
};

fn policies() -> [ResultPolicy; 4] {
    [
        ResultPolicy::default(),
        ResultPolicy::at_most_once(),
        ResultPolicy::success_only(),
        ResultPolicy::from_fn(|_| Directive::Store),
    ]
}

async fn is_empty(layer: &IdempotencyLayer) -> bool {
    layer.handle().list(RecordFilter::All, 1).await.unwrap().is_empty()
}

fn to(path: &str) -> Request {
    let mut request = charge("k");
    *request.uri_mut() = Uri::try_from(path).unwrap();
    request
}

async fn created() -> StatusCode {
    StatusCode::CREATED
}

async fn missing(status: StatusCode) -> Response {
    (status, Json("there is no such thing")).into_response()
}

async fn no_route() -> Response {
    missing(StatusCode::NOT_FOUND).await
}

async fn no_method() -> Response {
    missing(StatusCode::METHOD_NOT_ALLOWED).await
}

#[tokio::test]
async fn a_redirect_of_the_request_itself_is_no_result() {
    for policy in policies() {
        for redirect in [Redirect::permanent("/orders"), Redirect::temporary("/orders")] {
            let app = Router::new()
                .route("/orders/", post(|| async move { redirect }))
                .route("/orders", post(created))
                .layer(layer().with_policy(policy.clone()));
            assert!(send(&app, to("/orders/")).await.status.is_redirection());
            assert_eq!(send(&app, to("/orders")).await.status, StatusCode::CREATED);
            assert!(send(&app, to("/orders")).await.is_replay());
        }
    }
}

#[tokio::test]
async fn a_redirect_to_the_result_stays_one() {
    for status in [301, 302, 303] {
        let status = StatusCode::from_u16(status).unwrap();
        let handler = move || async move { (status, [(header::LOCATION, "/orders/1")]) };
        let app = Router::new().route("/charges", post(handler)).layer(layer());
        let first = send(&app, charge("k")).await;
        first.assert_same_replay(&send(&app, charge("k")).await);
    }
}

/// Nodes without the route, each with the layer at another place.
fn without_the_route(layer: &IdempotencyLayer) -> Vec<(&'static str, Router)> {
    let other = || Router::new().route("/other", post(created));
    let wrapped = |router: Router| Router::new().fallback_service(layer.layer(router));
    vec![
        ("the default", other().layer(layer.clone())),
        ("a fallback", other().fallback(no_route).layer(layer.clone())),
        ("a fallback after the layer", other().layer(layer.clone()).fallback(no_route)),
        ("nested", Router::new().nest("/api", other().fallback(no_route)).layer(layer.clone())),
        ("a nested layer", Router::new().nest("/api", other().fallback(no_route).layer(layer.clone()))),
        ("a nested default", Router::new().nest("/api", other().layer(layer.clone()))),
        ("a nested service", Router::new().nest_service("/api", layer.layer(other()))),
        ("around a nested service", Router::new().nest_service("/api", other()).layer(layer.clone())),
        ("merged", other().merge(Router::new().fallback(no_route)).layer(layer.clone())),
        ("outside", wrapped(other())),
        ("outside, with a fallback", wrapped(other().fallback(no_route))),
        ("a redirecting fallback", wrapped(other().fallback_service(layer.layer(other())))),
    ]
}

#[tokio::test]
async fn the_404_of_a_node_without_the_route_does_not_poison_the_key() {
    for policy in policies() {
        for path in ["/api/charges", "/charges"] {
            let layer = layer().with_policy(policy.clone());
            for (place, old) in without_the_route(&layer) {
                let updated = Router::new().route(path, post(created)).layer(layer.clone());
                assert_eq!(send(&old, to(path)).await.status, StatusCode::NOT_FOUND, "{place}");
                assert!(is_empty(&layer).await, "{place}");
                assert_eq!(send(&updated, to(path)).await.status, StatusCode::CREATED, "{place}");
                let (consumer, key) = crate::support::direct::identity();
                layer.handle().evict(&consumer, &key).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn the_405_of_a_node_without_the_method_does_not_poison_the_key() {
    for policy in policies() {
        let layer = layer().with_policy(policy);
        let reading = || Router::new().route("/charges", get(created));
        let places = [
            reading().layer(layer.clone()),
            reading().method_not_allowed_fallback(no_method).layer(layer.clone()),
            Router::new().route("/charges", get(created).layer(layer.clone())),
            Router::new().route("/charges", get(created).fallback(no_method).layer(layer.clone())),
            Router::new().fallback_service(layer.layer(reading())),
            reading().route_layer(layer.clone()),
        ];
        for old in places {
            assert_eq!(send(&old, charge("k")).await.status, StatusCode::METHOD_NOT_ALLOWED);
            assert!(is_empty(&layer).await);
        }
        let updated = Router::new().route("/charges", get(created).post(created)).layer(layer);
        assert_eq!(send(&updated, charge("k")).await.status, StatusCode::CREATED);
    }
}

#[tokio::test]
async fn a_404_of_the_handler_is_a_result_wherever_the_layer_is() {
    async fn reading(_: String) -> Response {
        missing(StatusCode::NOT_FOUND).await
    }
    let layer = || layer().with_policy(ResultPolicy::from_fn(|_| Directive::Store));
    let places = [
        Router::new().route("/charges", post(no_route)).layer(layer()),
        Router::new().route("/charges", post(no_route)).route_layer(layer()),
        Router::new().route("/charges", post(no_route).layer(layer())),
        Router::new().route("/{*path}", post(|| async { StatusCode::NOT_FOUND })).layer(layer()),
        Router::new().fallback_service(layer().layer(Router::new().route("/charges", post(reading)))),
    ];
    for app in places {
        let first = send(&app, charge("k")).await;
        assert_eq!(first.status, StatusCode::NOT_FOUND);
        first.assert_same_replay(&send(&app, charge("k")).await);
    }
}

#[tokio::test]
async fn a_404_or_405_after_an_intent_is_a_result() {
    for status in [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED] {
        let handler = move |idempotency: Idempotency| async move {
            idempotency.intent("bank").call(async |_| Ok("tr_1".into())).await.unwrap();
            status
        };
        let inner = Router::new().route("/charges", post(handler));
        let app = Router::new().fallback_service(layer().layer(inner));
        assert_eq!(send(&app, charge("k")).await.status, status);
        assert!(send(&app, charge("k")).await.is_replay());
    }
}

#[tokio::test]
async fn a_405_of_a_handler_that_has_read_the_request_is_a_result() {
    let handler = |_: String| no_method();
    let app = Router::new().route("/charges", post(handler)).layer(layer());
    let first = send(&app, charge("k")).await;
    first.assert_same_replay(&send(&app, charge("k")).await);
}

#[tokio::test]
async fn a_directive_decides_on_every_response() {
    for status in [307, 308, 404, 405, 501, 503] {
        let status = StatusCode::from_u16(status).unwrap();
        let handler = move || async move { (status, Extension(Directive::Store)) };
        let app = Router::new().fallback(handler).layer(layer());
        assert_eq!(send(&app, charge("k")).await.status, status);
        assert!(send(&app, charge("k")).await.is_replay(), "{status}");
    }
}

/// The usual set-up: a concurrency limit that sheds load, whose error becomes a 503.
fn shedding(layer: IdempotencyLayer, places: &Arc<Semaphore>) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move || async move { format!("run {}", counter.add()) };
    let overloaded = |_: BoxError| async { (StatusCode::SERVICE_UNAVAILABLE, "try again later") };
    let stack = ServiceBuilder::new()
        .layer(layer)
        .layer(HandleErrorLayer::new(overloaded))
        .layer(LoadShedLayer::new())
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(places)));
    (Router::new().route("/charges", post(handler)).layer(stack), runs)
}

#[tokio::test]
async fn a_load_shed_inside_the_layer_does_not_keep_the_key() {
    for policy in policies() {
        let places = Arc::new(Semaphore::new(1));
        let (app, runs) = shedding(layer().with_policy(policy), &places);
        let taken = Arc::clone(&places).try_acquire_owned().unwrap();
        assert_eq!(send(&app, charge("k")).await.status, StatusCode::SERVICE_UNAVAILABLE);
        drop(taken);
        assert_eq!(send(&app, charge("k")).await.body, "run 1");
        assert!(send(&app, charge("k")).await.is_replay());
        assert_eq!(runs.get(), 1);
    }
}

#[tokio::test]
async fn the_error_of_a_load_shed_inside_the_layer_does_not_keep_the_key() {
    for policy in policies() {
        let places = Arc::new(Semaphore::new(1));
        let inner = service_fn(|_: Request<RequestBody<Body>>| async {
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let service = ServiceBuilder::new()
            .layer(layer().with_policy(policy))
            .layer(LoadShedLayer::new())
            .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(&places)))
            .service(inner);
        let taken = Arc::clone(&places).try_acquire_owned().unwrap();
        service.clone().oneshot(charge("k")).await.unwrap_err();
        drop(taken);
        assert_eq!(service.oneshot(charge("k")).await.unwrap().status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn a_rate_limit_inside_the_layer_does_not_keep_the_key() {
    for policy in policies() {
        let runs = Count::default();
        let counter = runs.clone();
        let governor = axum::middleware::from_fn(move |request, next: axum::middleware::Next| {
            let run = counter.add();
            async move {
                match run {
                    1 => StatusCode::TOO_MANY_REQUESTS.into_response(),
                    _ => next.run(request).await,
                }
            }
        });
        let app =
            Router::new().route("/charges", post(created)).layer(governor).layer(layer().with_policy(policy));
        assert_eq!(send(&app, charge("k")).await.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    }
}

#[tokio::test]
async fn a_503_of_a_handler_that_has_worked_is_stored_by_at_most_once() {
    let waiting = post(|| async {
        tokio::task::yield_now().await;
        StatusCode::SERVICE_UNAVAILABLE
    });
    let reading = post(|_: String| async { StatusCode::SERVICE_UNAVAILABLE });
    let with_intent = post(|idempotency: Idempotency| async move {
        idempotency.intent("bank").call(async |_| Ok("tr_1".into())).await.unwrap();
        StatusCode::SERVICE_UNAVAILABLE
    });
    for handler in [waiting, reading, with_intent] {
        let layer = layer().with_policy(ResultPolicy::at_most_once());
        let app = Router::new().route("/charges", handler).layer(layer);
        assert_eq!(send(&app, charge("k")).await.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(send(&app, charge("k")).await.is_replay());
    }
}

#[tokio::test]
async fn a_503_to_a_request_without_a_body_is_stored_by_at_most_once() {
    let layer = layer().with_policy(ResultPolicy::at_most_once());
    let app =
        Router::new().route("/charges", post(|| async { StatusCode::SERVICE_UNAVAILABLE })).layer(layer);
    let request = || charge("k").map(|_| Body::empty());
    assert_eq!(send(&app, request()).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(send(&app, request()).await.is_replay());
}

#[tokio::test]
async fn a_load_shed_that_a_handler_met_in_a_client_keeps_the_key() {
    let inner = service_fn(|_: Request<RequestBody<Body>>| async {
        tokio::task::yield_now().await;
        Err::<Response, BoxError>(tower::load_shed::error::Overloaded::new().into())
    });
    let layer = layer().with_policy(ResultPolicy::at_most_once());
    let service = ServiceBuilder::new().layer(layer).service(inner);
    service.clone().oneshot(charge("k")).await.unwrap_err();
    let retry = service.oneshot(charge("k")).await.unwrap();
    assert_eq!(retry.extensions().get::<Rejection>().unwrap().code(), RejectionCode::OutcomeUnknown);
}
