//! The layer beside other layers, on both sides, in axum and without it.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderName, Request, Response, StatusCode},
    routing::{MethodRouter, post},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, channel::Channel};
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::{
    ServiceBuilderExt,
    catch_panic::CatchPanicLayer,
    compression::CompressionLayer,
    cors::CorsLayer,
    limit::RequestBodyLimitLayer,
    request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
    timeout::TimeoutLayer,
    trace::TraceLayer,
};
use tower_idempotency::{Rejection, RejectionCode, layer::RequestBody};

use crate::support::{
    http::{RawResponse, exchange, post as charge, post_chunked, request},
    served::{Count, layer, serve},
};

fn router(runs: &Count) -> Router {
    let counter = runs.clone();
    Router::new().route("/charges", counting(&counter))
}

fn counting(runs: &Count) -> MethodRouter {
    let runs = runs.clone();
    post(move |body: String| async move { (StatusCode::CREATED, format!("run {}: {body}", runs.add())) })
}

/// Sends a request twice and sees one run. Returns the replay.
async fn assert_guarded(router: Router, runs: &Count) -> RawResponse {
    let address = serve(router).await;
    let first = exchange(address, charge("k", &[], "2000")).await;
    assert_eq!((first.status, first.text(), first.is_replay()), (201, "run 1: 2000", false));
    let replay = exchange(address, charge("k", &[], "2000")).await;
    assert_eq!((replay.status, replay.text(), replay.is_replay()), (201, "run 1: 2000", true));
    assert_eq!(runs.get(), 1);
    replay
}

const TIME_OUT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn layers_of_tower_http_outside() {
    let runs = Count::default();
    let stack = ServiceBuilder::new()
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(TraceLayer::new_for_http())
        .layer(CatchPanicLayer::new())
        .layer(CorsLayer::permissive())
        .layer(CompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, TIME_OUT))
        .layer(RequestBodyLimitLayer::new(1000))
        .layer(layer());
    let replay = assert_guarded(router(&runs).layer(stack), &runs).await;
    assert_eq!(replay.header("access-control-allow-origin"), Some("*"));
    assert!(replay.header("x-request-id").is_some());
}

#[tokio::test]
async fn layers_of_tower_http_inside() {
    let runs = Count::default();
    let stack = ServiceBuilder::new()
        .layer(layer())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(TraceLayer::new_for_http())
        .layer(CatchPanicLayer::new())
        .layer(CorsLayer::permissive())
        .layer(CompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, TIME_OUT))
        .layer(RequestBodyLimitLayer::new(1000));
    let replay = assert_guarded(router(&runs).layer(stack), &runs).await;
    assert_eq!(replay.header("access-control-allow-origin"), Some("*"));
    assert!(replay.header("x-request-id").is_some(), "the id of the first request is a part of its response");
}

#[tokio::test]
async fn the_request_id_of_a_retry_is_its_own_with_the_layer_inside() {
    let runs = Count::default();
    let outer = ServiceBuilder::new()
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(PropagateRequestIdLayer::x_request_id());
    let address = serve(router(&runs).layer(layer()).layer(outer)).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.extend(exchange(address, charge("k", &[], "")).await.header("x-request-id").map(str::to_owned));
    }
    assert_eq!((ids.len(), ids[0] == ids[1], runs.get()), (2, false, 1));
}

#[tokio::test]
async fn a_limit_outside_refuses_what_is_too_large_as_too_large() {
    let runs = Count::default();
    let address = serve(router(&runs).layer(layer()).layer(RequestBodyLimitLayer::new(8))).await;
    assert_eq!(exchange(address, charge("k", &[], "123456789")).await.status, 413);
    let refused = exchange(address, post_chunked("k", &["12345", "6789"])).await;
    assert_eq!((refused.status, &refused.json()["code"]), (413, &"request-too-large".into()));
    assert_eq!(refused.json()["retryable"], false);
    assert_eq!(runs.get(), 0);
    assert_eq!(exchange(address, post_chunked("k", &["12345", "678"])).await.status, 201);
}

#[tokio::test]
async fn a_limit_inside_is_a_stored_result() {
    let runs = Count::default();
    let address = serve(router(&runs).layer(RequestBodyLimitLayer::new(8)).layer(layer())).await;
    for replay in [false, true] {
        let response = exchange(address, charge("k", &[], "123456789")).await;
        assert_eq!((response.status, response.is_replay()), (413, replay));
    }
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn a_panic_handler_inside_makes_the_response() {
    let panics = Count::default();
    let counter = panics.clone();
    let handler = move || async move {
        assert!(counter.add() > 1, "the handler breaks");
    };
    let app = Router::new().route("/charges", post(handler)).layer(CatchPanicLayer::new()).layer(layer());
    let address = serve(app).await;
    let first = exchange(address, charge("k", &[], "")).await;
    assert_eq!((first.status, first.text()), (500, "Service panicked"));
    assert_eq!(exchange(address, charge("k", &[], "")).await.status, 200);
    assert_eq!(panics.get(), 2);
}

#[tokio::test]
async fn a_preflight_passes_with_cors_on_either_side() {
    for inside in [false, true] {
        let runs = Count::default();
        let cors = CorsLayer::permissive().expose_headers([HeaderName::from_static("idempotent-replayed")]);
        let app = match inside {
            true => router(&runs).layer(cors).layer(layer().required()),
            false => router(&runs).layer(layer().required()).layer(cors),
        };
        let address = serve(app).await;
        let headers = [("origin", "https://shop.example"), ("access-control-request-method", "POST")];
        let preflight = exchange(address, request("OPTIONS", "/charges", &headers, "")).await;
        assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (200, Some("*")));
        let refused = exchange(address, request("POST", "/charges", &headers[..1], "")).await;
        assert_eq!(refused.status, 400);
        // A browser shows a refusal to its page only with these headers: CORS belongs outside.
        assert_eq!(refused.header("access-control-allow-origin"), (!inside).then_some("*"));
    }
}

#[tokio::test]
async fn an_outer_layer_sees_refusals_as_values() {
    let runs = Count::default();
    let seen = |response: axum::response::Response| async move {
        let code = response.extensions().get::<Rejection>().map(Rejection::code);
        (response.status(), format!("{code:?}"))
    };
    let app = router(&runs).layer(layer()).layer(axum::middleware::map_response(seen));
    let refused = exchange(serve(app).await, charge("a,b", &[], "")).await;
    assert_eq!((refused.status, refused.text()), (400, &*format!("{:?}", Some(RejectionCode::KeyInvalid))));
}

#[tokio::test]
async fn in_a_route_a_method_a_nested_router_and_around_routes() {
    for build in [
        |runs: &Count| Router::new().route("/charges", counting(runs).layer(layer())),
        |runs: &Count| Router::new().route("/charges", counting(runs).route_layer(layer())),
        |runs: &Count| router(runs).route_layer(layer()),
        |runs: &Count| Router::new().merge(router(runs).layer(layer())),
        |runs: &Count| Router::new().fallback_service(router(runs).layer(layer())),
        |runs: &Count| {
            Router::new().nest("/charges", Router::new().route("/", counting(runs)).layer(layer()))
        },
        |runs: &Count| {
            let service = layer().layer(router(runs));
            Router::new().route_service("/charges", service)
        },
        |runs: &Count| {
            let stack = ServiceBuilder::new().option_layer(None::<CorsLayer>).layer(layer());
            router(runs).layer(stack)
        },
    ] {
        let runs = Count::default();
        assert_guarded(build(&runs), &runs).await;
    }
}

#[tokio::test]
async fn a_route_layer_leaves_unknown_paths_to_the_router() {
    let runs = Count::default();
    let app = router(&runs).route_layer(layer().required());
    assert_eq!(exchange(serve(app).await, request("POST", "/unknown", &[], "")).await.status, 404);
}

#[tokio::test]
async fn disabled_stands_for_a_layer_that_is_not_there() {
    for enabled in [true, false] {
        let runs = Count::default();
        let layer = if enabled { layer() } else { layer().disabled() };
        let address = serve(router(&runs).layer(layer)).await;
        for _ in 0..2 {
            assert_eq!(exchange(address, charge("k", &[], "")).await.status, 201);
        }
        assert_eq!(runs.get(), if enabled { 1 } else { 2 });
    }
}

/// A request and a response of a service that knows nothing of axum.
type PlainRequest = Request<RequestBody<Full<Bytes>>>;
type PlainResponse = Response<Full<Bytes>>;

async fn plain(runs: Count, request: PlainRequest) -> Result<PlainResponse, Infallible> {
    let body = request.into_body().collect().await?.to_bytes();
    Ok(Response::new(Full::from(format!("run {}: {}", runs.add(), body.escape_ascii()))))
}

fn plain_charge(key: &str) -> Request<Full<Bytes>> {
    Request::post("/charges").header("idempotency-key", key).body(Full::from("2000")).unwrap()
}

async fn text<B>(response: Response<B>) -> String
where
    B: http_body::Body<Data = Bytes, Error: std::fmt::Debug>,
{
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().into()).unwrap()
}

#[tokio::test]
async fn a_plain_service_without_axum() {
    let runs = Count::default();
    let counter = runs.clone();
    let mut service = ServiceBuilder::new()
        .trace_for_http()
        .layer(layer())
        .service(service_fn(move |request: PlainRequest| plain(counter.clone(), request)));
    for _ in 0..2 {
        let response = service.ready().await.unwrap().call(plain_charge("k")).await.unwrap();
        assert_eq!(text(response).await, "run 1: 2000");
    }
    let passed = Request::put("/charges").body(Full::from("x")).unwrap();
    assert_eq!(text(service.ready().await.unwrap().call(passed).await.unwrap()).await, "run 2: x");
    assert_eq!(runs.get(), 2);
}

/// A service that must be polled ready before each call, as tower asks, and of which a clone is not ready.
struct Picky {
    ready: bool,
    runs: Count,
    dropped_ready: Arc<AtomicBool>,
}

impl Clone for Picky {
    fn clone(&self) -> Self {
        Self { ready: false, runs: self.runs.clone(), dropped_ready: Arc::clone(&self.dropped_ready) }
    }
}

impl Drop for Picky {
    fn drop(&mut self) {
        self.dropped_ready.fetch_or(self.ready, Ordering::SeqCst);
    }
}

impl Service<PlainRequest> for Picky {
    type Response = PlainResponse;
    type Error = Infallible;
    type Future = futures_core::future::BoxFuture<'static, Result<PlainResponse, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: PlainRequest) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "a service was called that was not ready");
        Box::pin(plain(self.runs.clone(), request))
    }
}

#[tokio::test]
async fn the_service_that_was_ready_is_the_one_that_is_called() {
    let (runs, dropped_ready) = (Count::default(), Arc::new(AtomicBool::new(false)));
    let inner = Picky { ready: false, runs: runs.clone(), dropped_ready: Arc::clone(&dropped_ready) };
    let mut service = layer().layer(inner);
    for (key, run) in [("a", 1), ("b", 2)] {
        let response = service.ready().await.unwrap().call(plain_charge(key)).await.unwrap();
        assert_eq!((response.status(), text(response).await), (StatusCode::OK, format!("run {run}: 2000")));
    }
    assert!(!dropped_ready.load(Ordering::SeqCst));
    let passed = Request::put("/charges").body(Full::default()).unwrap();
    assert_eq!(service.ready().await.unwrap().call(passed).await.unwrap().status(), StatusCode::OK);
    assert_eq!(runs.get(), 3);
}

#[tokio::test]
async fn a_concurrency_limit_inside_is_neither_passed_by_nor_used_up() {
    let runs = Count::default();
    let counter = runs.clone();
    let inner = ServiceBuilder::new()
        .concurrency_limit(1)
        .service(service_fn(move |request: PlainRequest| plain(counter.clone(), request)));
    let mut service = layer().layer(inner);
    for key in ["a", "a", "a,b", "b", "a", "c"] {
        let ready = tokio::time::timeout(TIME_OUT, service.ready()).await.expect("a place is given back");
        assert!(ready.unwrap().call(plain_charge(key)).await.unwrap().status().as_u16() <= 400);
    }
    assert_eq!(runs.get(), 3);
}

#[tokio::test]
async fn a_concurrency_limit_inside_counts_running_requests() {
    let (runs, running) = (Count::default(), Arc::new(tokio::sync::Semaphore::new(0)));
    let (counter, gate) = (runs.clone(), Arc::clone(&running));
    let inner =
        ServiceBuilder::new().concurrency_limit(2).service(service_fn(move |request: PlainRequest| {
            let (runs, gate) = (counter.clone(), Arc::clone(&gate));
            async move {
                let response = plain(runs, request).await;
                gate.acquire().await.unwrap().forget();
                response
            }
        }));
    let service = layer().layer(inner);
    let requests: Vec<_> =
        (0..4).map(|n| tokio::spawn(service.clone().oneshot(plain_charge(&format!("key-{n}"))))).collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(runs.get(), 2);
    running.add_permits(4);
    for request in requests {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(runs.get(), 4);
}

#[tokio::test]
async fn a_buffered_service_inside() {
    let runs = Count::default();
    let inner = ServiceBuilder::new().buffer(1).service(Picky {
        ready: false,
        runs: runs.clone(),
        dropped_ready: Arc::default(),
    });
    let service = layer().layer(inner);
    let requests: Vec<_> = (0..8)
        .map(|n| tokio::spawn(service.clone().oneshot(plain_charge(&format!("key-{}", n % 4)))))
        .collect();
    for request in requests {
        let status = tokio::time::timeout(TIME_OUT, request).await.unwrap().unwrap().unwrap().status();
        assert!(matches!(status, StatusCode::OK | StatusCode::CONFLICT), "{status}");
    }
    assert_eq!(runs.get(), 4);
}

#[tokio::test]
async fn bodies_whose_type_cannot_move_or_be_shared() {
    /// Bodies of requests are often neither `Sync` nor `Unpin`.
    struct Awkward(Channel<Bytes, BoxError>, std::cell::Cell<u8>, std::marker::PhantomPinned);

    impl http_body::Body for Awkward {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<Bytes>, BoxError>>> {
            let _ = (&self.0, &self.1, &self.2);
            Poll::Ready(None)
        }
    }

    let body = || Awkward(Channel::new(1).1, std::cell::Cell::new(0), std::marker::PhantomPinned);
    let inner = service_fn(move |_: Request<RequestBody<Awkward>>| async move {
        Ok::<_, std::io::Error>(Response::new(body()))
    });
    let service = layer().layer(inner);
    let charge = || Request::post("/charges").header("idempotency-key", "k").body(body()).unwrap();
    assert!(!service.clone().oneshot(charge()).await.unwrap().headers().contains_key("idempotent-replayed"));
    assert_eq!(service.oneshot(charge()).await.unwrap().headers()["idempotent-replayed"], "true");
}
