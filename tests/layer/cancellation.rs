//! Whoever stops waiting does not stop the work: clients that leave, time-outs outside, panics.

use std::{net::SocketAddr, time::Duration};

use axum::{
    BoxError, Extension, Router,
    error_handling::HandleErrorLayer,
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::Response,
    routing::post,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, sleep};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_http::timeout::TimeoutLayer;
use tracing::{Instrument, Span};

use crate::support::{
    http::{Client, RawConnection, RawResponse, exchange, post as charge},
    served::{Count, layer, serve},
};

/// How long the handler works, and when its client has had enough.
const WORK: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_millis(200);

/// A handler that takes a second. Counts when it begins and when it has done its work.
#[derive(Clone, Debug, Default)]
struct Work {
    begun: Count,
    done: Count,
}

impl Work {
    async fn perform(self) -> (StatusCode, String) {
        let run = self.begun.add();
        sleep(WORK).await;
        self.done.add();
        (StatusCode::CREATED, format!("run {run}"))
    }

    fn router(&self) -> Router {
        let work = self.clone();
        Router::new().route("/charges", post(move || work.perform()))
    }

    /// The handler was begun and then left alone: it ends, once, and a retry gets its result.
    async fn assert_finished_once(&self, address: SocketAddr) {
        assert_eq!((self.begun.get(), self.done.get()), (1, 0), "nobody left in the middle of the work");
        let duplicate = send(address).await;
        assert_eq!((duplicate.status, &duplicate.json()["code"]), (409, &"in-progress".into()));
        let deadline = Instant::now() + WORK * 10;
        while self.done.get() == 0 {
            assert!(Instant::now() < deadline, "the work was cut off");
            sleep(Duration::from_millis(10)).await;
        }
        let retry = replay(address).await;
        assert_eq!((retry.status, retry.text()), (201, "run 1"));
        assert_eq!((self.begun.get(), self.done.get()), (1, 1));
    }
}

async fn send(address: SocketAddr) -> RawResponse {
    exchange(address, charge("k", &[], "2000")).await
}

/// The replay of work that was done a moment ago and may still have to be stored.
async fn replay(address: SocketAddr) -> RawResponse {
    let deadline = Instant::now() + WORK * 10;
    loop {
        let response = send(address).await;
        if response.is_replay() {
            return response;
        }
        assert_eq!(response.status, 409, "{}", response.text());
        assert!(Instant::now() < deadline, "the work is never stored");
        sleep(Duration::from_millis(10)).await;
    }
}

/// How a client leaves while it waits for its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// HTTP/1.1, regular end of the connection.
    Close,
    /// HTTP/1.1, reset of the connection.
    Reset,
    /// HTTP/2, reset of the stream; the connection stays.
    ResetStream,
    /// HTTP/2, end of the connection.
    CloseConnection,
}

impl Leave {
    const ALL: [Self; 4] = [Self::Close, Self::Reset, Self::ResetStream, Self::CloseConnection];

    /// Sends a request with a key in this header and leaves before it is answered.
    async fn after_a_while(self, address: SocketAddr, header: &'static str) {
        match self {
            Self::Close | Self::Reset => self.http1(address, header).await,
            Self::ResetStream | Self::CloseConnection => self.http2(address, header).await,
        }
        // The server is to see it.
        sleep(PATIENCE / 2).await;
    }

    async fn http1(self, address: SocketAddr, header: &'static str) {
        let mut connection = RawConnection::open(address).await;
        let request = String::from_utf8(charge("k", &[], "2000")).unwrap();
        connection.send(request.replace("idempotency-key", header)).await;
        sleep(PATIENCE).await;
        if self == Self::Reset {
            connection.reset();
        }
    }

    async fn http2(self, address: SocketAddr, header: &'static str) {
        let mut client = Client::http2(address).await;
        let request = hyper::Request::post(format!("http://{address}/charges")).header(header, "k");
        let (mut waiting, request) = (client.share(), request.body(Full::from("2000")).unwrap());
        let response = tokio::spawn(async move { waiting.start(request).await.map(drop) });
        sleep(PATIENCE).await;
        response.abort();
        assert!(response.await.unwrap_err().is_cancelled(), "the response came before the client left");
        if self == Self::ResetStream {
            let request =
                hyper::Request::get(format!("http://{address}/charges")).body(Full::default()).unwrap();
            assert_eq!(client.send(request).await.status(), StatusCode::METHOD_NOT_ALLOWED);
        }
    }
}

async fn finishes_when_the_client_leaves(leave: Leave) {
    let work = Work::default();
    let address = serve(work.router().layer(layer())).await;
    leave.after_a_while(address, "idempotency-key").await;
    work.assert_finished_once(address).await;
}

#[tokio::test]
async fn the_work_is_finished_when_the_client_closes() {
    finishes_when_the_client_leaves(Leave::Close).await;
}

#[tokio::test]
async fn the_work_is_finished_when_the_client_resets() {
    finishes_when_the_client_leaves(Leave::Reset).await;
}

#[tokio::test]
async fn the_work_is_finished_when_the_client_resets_its_stream() {
    finishes_when_the_client_leaves(Leave::ResetStream).await;
}

#[tokio::test]
async fn the_work_is_finished_when_the_client_closes_an_http2_connection() {
    finishes_when_the_client_leaves(Leave::CloseConnection).await;
}

/// What the other tests rest on: the server does notice that the client leaves.
#[tokio::test]
async fn without_a_key_the_server_drops_the_work_of_a_client_that_leaves() {
    let cases = Leave::ALL.map(|leave| {
        tokio::spawn(async move {
            let work = Work::default();
            let address = serve(work.router().layer(layer())).await;
            leave.after_a_while(address, "x-other").await;
            sleep(WORK).await;
            assert_eq!((work.begun.get(), work.done.get()), (1, 0), "{leave:?}");
        })
    });
    for case in cases {
        case.await.unwrap();
    }
}

#[tokio::test]
async fn an_outer_timeout_does_not_stop_the_work() {
    let work = Work::default();
    let late = |_: BoxError| async { (StatusCode::GATEWAY_TIMEOUT, "late") };
    let outer = ServiceBuilder::new().layer(HandleErrorLayer::new(late)).timeout(PATIENCE).layer(layer());
    let address = serve(work.router().layer(outer)).await;
    assert_eq!(send(address).await.status, 504);
    work.assert_finished_once(address).await;
}

#[tokio::test]
async fn an_outer_timeout_of_tower_http_does_not_stop_the_work() {
    let work = Work::default();
    let timeout = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, PATIENCE);
    let address = serve(work.router().layer(layer()).layer(timeout)).await;
    assert_eq!(send(address).await.status, 408);
    work.assert_finished_once(address).await;
}

/// The time-out's own response has a default body, and axum, which has a body of its own, is not there to give it one.
#[tokio::test]
async fn an_outer_timeout_composes_without_axum() {
    let work = Work::default();
    let begun = work.clone();
    let timeout = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, PATIENCE);
    let service = ServiceBuilder::new().layer(timeout).layer(layer()).service(service_fn(
        move |_: http::Request<_>| {
            let work = begun.clone();
            async { Ok::<_, BoxError>(http::Response::new(Full::<Bytes>::from(work.perform().await.1))) }
        },
    ));
    let request =
        || http::Request::post("/").header("idempotency-key", "k").body(Full::<Bytes>::default()).unwrap();
    assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::GATEWAY_TIMEOUT);
    sleep(WORK * 2).await;
    let retry = service.oneshot(request()).await.unwrap();
    assert_eq!(retry.headers()["idempotent-replayed"], "true");
    assert_eq!(retry.into_body().collect().await.unwrap().to_bytes(), "run 1");
    assert_eq!(work.done.get(), 1);
}

#[tokio::test]
async fn an_inner_timeout_stops_the_work_and_releases_the_key() {
    let work = Work::default();
    let timeout = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, PATIENCE);
    let address = serve(work.router().layer(timeout).layer(layer())).await;
    for run in 1..=2 {
        let response = send(address).await;
        assert_eq!((response.status, response.is_replay()), (408, false));
        assert_eq!(work.begun.get(), run);
    }
    sleep(WORK).await;
    assert_eq!(work.done.get(), 0);
}

#[tokio::test]
async fn a_panic_is_answered_at_once_and_the_connection_stays_usable() {
    let runs = Count::default();
    let handler = move || async move {
        let run = runs.add();
        assert!(run > 2, "the handler breaks");
        format!("run {run}")
    };
    let address = serve(Router::new().route("/charges", post(handler)).layer(layer())).await;
    let mut connection = RawConnection::open(address).await;
    for _ in 0..2 {
        let start = Instant::now();
        connection.send(charge("k", &[], "2000")).await;
        let response = connection.read().await;
        assert_eq!((response.status, &response.json()["code"]), (500, &"handler-panicked".into()));
        assert!(start.elapsed() < WORK);
    }
    for replay in [false, true] {
        connection.send(charge("k", &[], "2000")).await;
        let response = connection.read().await;
        assert_eq!((response.status, response.text(), response.is_replay()), (200, "run 3", replay));
    }
}

#[tokio::test]
async fn a_panic_in_http2_leaves_other_streams_alone() {
    let work = Work::default();
    async fn panics() -> String {
        panic!("the handler breaks")
    }
    let router = work.router().route("/panics", post(panics)).layer(layer());
    let address = serve(router).await;
    let mut client = Client::http2(address).await;
    let request = |path: &str| {
        let request = hyper::Request::post(format!("http://{address}{path}")).header("idempotency-key", path);
        request.body(Full::from("2000")).unwrap()
    };
    let (mut other, slow) = (client.share(), request("/charges"));
    let slow = tokio::spawn(async move { other.send(slow).await.status() });
    sleep(PATIENCE).await;
    assert_eq!(client.send(request("/panics")).await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(slow.await.unwrap(), StatusCode::CREATED);
}

tokio::task_local! {
    static TASK_LOCAL: u8;
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FromOutside(&'static str);

/// Sets what a layer outside may set around a request.
async fn around(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(FromOutside("extension"));
    let span = tracing::info_span!("request");
    TASK_LOCAL.scope(1, next.run(request).instrument(span)).await
}

#[tokio::test]
async fn extensions_and_the_span_travel_and_task_locals_do_not() {
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry());
    let handler = |Extension(FromOutside(value)): Extension<FromOutside>| async move {
        let span = Span::current().metadata().map(|metadata| metadata.name());
        format!("{value}, {span:?}, {:?}", TASK_LOCAL.try_get().ok())
    };
    let router =
        Router::new().route("/charges", post(handler)).layer(layer()).layer(middleware::from_fn(around));
    let address = serve(router).await;
    assert_eq!(send(address).await.text(), "extension, Some(\"request\"), None");
    let without_key = String::from_utf8(charge("k", &[], "")).unwrap().replace("idempotency-key", "x-other");
    assert_eq!(exchange(address, without_key).await.text(), "extension, Some(\"request\"), Some(1)");
}
