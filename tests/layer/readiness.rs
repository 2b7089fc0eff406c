//! A service inside the layer that is not ready: only what is performed waits for it.

use std::{
    future::Future,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::{Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::Full;
use tokio::{sync::Semaphore, task::JoinHandle, time::timeout};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt,
    limit::{ConcurrencyLimitLayer, GlobalConcurrencyLimitLayer},
    service_fn,
    util::BoxCloneSyncService,
};
use tower_idempotency::{
    IdempotencyLayer, MemoryStore, Rejection, RejectionCode, ResultPolicy,
    layer::{RequestBody, ResponseBody},
    store::{RecordFilter, RecordState, Store},
};

use crate::support::served::{Count, layer};

type Inner = BoxCloneSyncService<Request<RequestBody<Full<Bytes>>>, Response<Full<Bytes>>, BoxError>;
type Answer = Response<ResponseBody<Full<Bytes>>>;

/// A handler that waits at a gate if its request asks for it.
#[derive(Clone)]
struct Handler {
    runs: Count,
    gate: Arc<Semaphore>,
}

impl Handler {
    fn new() -> Self {
        Self { runs: Count::default(), gate: Arc::new(Semaphore::new(0)) }
    }

    fn service(&self) -> Inner {
        let this = self.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<RequestBody<Full<Bytes>>>| {
            let this = this.clone();
            async move {
                let run = this.runs.add();
                if request.headers().contains_key("x-wait") {
                    this.gate.acquire().await?.forget();
                }
                Ok(Response::new(Full::from(format!("run {run}"))))
            }
        }))
    }

    async fn until(&self, runs: usize) {
        while self.runs.get() < runs {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn charge(key: Option<&str>, body: &'static str, waits: bool) -> Request<Full<Bytes>> {
    let mut request = Request::post("/charges");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    if waits {
        request = request.header("x-wait", "1");
    }
    request.body(Full::from(body)).unwrap()
}

/// Sends a request in a task of its own.
fn start<S, E>(service: &S, request: Request<Full<Bytes>>) -> JoinHandle<Result<Answer, E>>
where
    S: Service<Request<Full<Bytes>>, Response = Answer, Error = E> + Clone + Send + 'static,
    S::Future: Send,
    E: Send + 'static,
{
    tokio::spawn(service.clone().oneshot(request))
}

/// Sends a request as a server does: once the service is ready.
async fn send<S, E>(service: &S, request: Request<Full<Bytes>>) -> Result<Answer, E>
where
    S: Service<Request<Full<Bytes>>, Response = Answer, Error = E> + Clone,
{
    service.clone().oneshot(request).await
}

fn code(answer: &Answer) -> Option<RejectionCode> {
    answer.extensions().get::<Rejection>().map(Rejection::code)
}

fn is_replay(answer: &Answer) -> bool {
    answer.headers().contains_key("idempotent-replayed")
}

async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(5), work).await.expect("nothing waits for a place")
}

fn limits(inner: &Inner) -> Vec<(&'static str, Inner)> {
    let one = || ServiceBuilder::new().concurrency_limit(1).service(inner.clone());
    vec![
        ("a limit", BoxCloneSyncService::new(one())),
        (
            "a global limit",
            BoxCloneSyncService::new(GlobalConcurrencyLimitLayer::new(1).layer(inner.clone())),
        ),
        ("a buffer", BoxCloneSyncService::new(ServiceBuilder::new().buffer(1).service(one()))),
        ("another limit", BoxCloneSyncService::new(ConcurrencyLimitLayer::new(1).layer(one()))),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn replays_duplicates_and_refusals_never_wait_for_a_place_inside() {
    let names = limits(&Handler::new().service()).into_iter().map(|(name, _)| name);
    for (index, name) in names.enumerate() {
        let handler = Handler::new();
        let (_, inner) = limits(&handler.service()).remove(index);
        let service = layer().layer(inner);
        send(&service, charge(Some("done"), "1", false)).await.unwrap();
        let holder = start(&service, charge(Some("held"), "1", true));
        handler.until(2).await;

        assert!(is_replay(&soon(send(&service, charge(Some("done"), "1", false))).await.unwrap()), "{name}");
        for (key, body, expected) in [
            ("held", "1", RejectionCode::InProgress),
            ("done", "2", RejectionCode::KeyReused),
            ("a,b", "1", RejectionCode::KeyInvalid),
        ] {
            let refused = soon(send(&service, charge(Some(key), body, false))).await.unwrap();
            assert_eq!(code(&refused), Some(expected), "{name}");
        }
        // What is performed waits, with a key and without.
        let waiting = [Some("next"), None].map(|key| start(&service, charge(key, "1", false)));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(waiting.iter().all(|task| !task.is_finished()) && handler.runs.get() == 2, "{name}");
        let duplicate = soon(send(&service, charge(Some("next"), "1", false))).await.unwrap();
        assert_eq!(code(&duplicate), Some(RejectionCode::InProgress), "{name}");

        handler.gate.add_permits(1);
        assert_eq!(soon(holder).await.unwrap().unwrap().status(), StatusCode::OK);
        for task in waiting {
            assert_eq!(soon(task).await.unwrap().unwrap().status(), StatusCode::OK, "{name}");
        }
        assert_eq!(handler.runs.get(), 4, "{name}");
    }
}

#[tokio::test]
async fn one_service_that_answers_one_request_after_the_other_never_waits_for_its_own_place() {
    let handler = Handler::new();
    for (name, inner) in limits(&handler.service()) {
        let mut service = layer().layer(inner);
        for key in [Some("a"), Some("a"), None, Some("a,b"), Some("b"), None, Some("a")] {
            // Polled more often than called, as a balancer does.
            soon(service.ready()).await.unwrap();
            let ready = soon(service.ready()).await.unwrap();
            assert!(soon(ready.call(charge(key, "1", false))).await.is_ok(), "{name}");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Broken {
    Fails,
    Panics,
    Never,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("closed")]
struct Closed;

impl Service<Request<RequestBody<Full<Bytes>>>> for Broken {
    type Response = Response<Full<Bytes>>;
    type Error = Closed;
    type Future = std::future::Ready<Result<Self::Response, Closed>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        match self {
            Self::Fails => Poll::Ready(Err(Closed)),
            Self::Panics => panic!("poll_ready breaks"),
            Self::Never => Poll::Pending,
        }
    }

    fn call(&mut self, _: Request<RequestBody<Full<Bytes>>>) -> Self::Future {
        unreachable!("it is never ready")
    }
}

#[tokio::test]
async fn a_request_whose_handler_was_not_called_holds_no_key_under_any_policy() {
    for policy in [ResultPolicy::default(), ResultPolicy::at_most_once()] {
        for broken in [Broken::Fails, Broken::Panics, Broken::Never] {
            let layer = layer().with_policy(policy.clone()).with_max_execution(Duration::from_millis(200));
            let handle = layer.handle();
            let service = layer.layer(broken);
            for _ in 0..2 {
                let answer = soon(send(&service, charge(Some("k"), "1", false))).await;
                match broken {
                    Broken::Fails => assert_eq!(answer.unwrap_err(), Closed),
                    Broken::Panics => assert_eq!(code(&answer.unwrap()), Some(RejectionCode::Internal)),
                    Broken::Never => assert_eq!(code(&answer.unwrap()), Some(RejectionCode::Overloaded)),
                }
                assert!(handle.list(RecordFilter::All, 9).await.unwrap().is_empty(), "{broken:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_error_of_a_service_that_fails_to_get_ready_reaches_requests_without_a_key() {
    let service = layer().layer(Broken::Fails);
    assert_eq!(soon(send(&service, charge(None, "1", false))).await.unwrap_err(), Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_place_keeps_its_lease_and_is_drained_and_runs_without_its_client() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let handler = Handler::new();
    let lease = Duration::from_millis(200);
    let node = IdempotencyLayer::new(Arc::clone(&store)).with_lease(lease);
    let other = IdempotencyLayer::new(Arc::clone(&store)).layer(handler.service());
    let handle = node.handle();
    let service = node.layer(ServiceBuilder::new().concurrency_limit(1).service(handler.service()));
    let holder = start(&service, charge(Some("held"), "1", true));
    handler.until(1).await;
    let waiting = start(&service, charge(Some("next"), "1", false));
    while handle.list(RecordFilter::All, 9).await.unwrap().len() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    waiting.abort();
    tokio::time::sleep(lease * 3).await;
    let duplicate = send(&other, charge(Some("next"), "1", false)).await.unwrap();
    assert_eq!(code(&duplicate), Some(RejectionCode::InProgress));
    assert!(handle.drain(Duration::from_millis(50)).await.is_err());
    handler.gate.add_permits(1);
    handle.drain(Duration::from_secs(10)).await.unwrap();
    assert!(holder.await.unwrap().is_ok());
    let records = handle.list(RecordFilter::All, 9).await.unwrap();
    assert!(
        records.iter().all(|record| matches!(record.state, RecordState::Completed { .. })),
        "{records:?}"
    );
    assert_eq!(handler.runs.get(), 2);
}

#[tokio::test]
async fn a_load_shed_inside_lets_replays_pass() {
    let handler = Handler::new();
    let inner = ServiceBuilder::new().load_shed().concurrency_limit(1).service(handler.service());
    let service = layer().layer(inner);
    send(&service, charge(Some("done"), "1", false)).await.unwrap();
    let holder = start(&service, charge(Some("held"), "1", true));
    handler.until(2).await;
    assert!(is_replay(&send(&service, charge(Some("done"), "1", false)).await.unwrap()));
    assert!(send(&service, charge(Some("next"), "1", false)).await.is_err());
    assert!(send(&service, charge(None, "1", false)).await.is_err());
    handler.gate.add_permits(1);
    assert!(holder.await.unwrap().is_ok());
}
