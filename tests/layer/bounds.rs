//! What clients can start, and what they can hold, is bounded.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::post};
use bytes::Bytes;
use http_body_util::{Full, channel::Channel};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_idempotency::{
    IdempotencyLayer, RejectionCode,
    layer::StoreOutage,
    store::{IntoStore, RecordFilter},
};

use crate::support::{
    direct::{Answer, begin, charge, request, send, start, waiting},
    http::{Client, exchange, post as raw_charge},
    served::{layer, serve},
    sqlite::SqliteFile,
};

/// Handlers that run until they are let go.
#[derive(Clone, Debug)]
struct Handlers {
    running: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
}

impl Handlers {
    fn new() -> Self {
        Self { running: Arc::default(), most: Arc::default(), gate: Arc::new(Semaphore::new(0)) }
    }

    /// The first path answers immediately, the second waits.
    fn router(&self, layer: IdempotencyLayer) -> Router {
        let this = self.clone();
        let waiting = move || async move {
            let running = this.running.fetch_add(1, Ordering::SeqCst) + 1;
            this.most.fetch_max(running, Ordering::SeqCst);
            this.gate.acquire().await.unwrap().forget();
            this.running.fetch_sub(1, Ordering::SeqCst);
            StatusCode::CREATED
        };
        let done = post(|| async { StatusCode::CREATED });
        Router::new().route("/done", done).route("/charges", post(waiting)).layer(layer)
    }

    fn most(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }

    async fn until(&self, running: usize) {
        timeout(PATIENCE, async {
            while self.running.load(Ordering::SeqCst) < running {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("handlers run");
    }
}

fn done(key: &str) -> axum::extract::Request {
    let mut request = charge(key);
    *request.uri_mut() = "/done".parse().unwrap();
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_reset_start_no_more_handlers_than_there_are_places() {
    const PLACES: usize = 8;
    let handlers = Handlers::new();
    let layer = layer().with_max_in_flight(PLACES);
    let handle = layer.handle();
    let address = serve(handlers.router(layer)).await;
    let mut client = Client::http2(address).await;
    let keyed = |path: &str, key: &str| {
        let request = hyper::Request::post(format!("http://{address}{path}"));
        request.header("idempotency-key", key).body(Full::from("2000")).unwrap()
    };
    assert_eq!(client.send(keyed("/done", "done")).await.status(), StatusCode::CREATED);
    // 3,000 streams, as many at a time as a connection may have, each reset when it was sent.
    for round in 0..15 {
        // The server may close a connection that resets many.
        let flooding = Client::http2(address).await;
        let mut flood = JoinSet::new();
        for number in 0..200 {
            let mut client = flooding.share();
            let request = keyed("/charges", &format!("flood-{round}-{number}"));
            flood.spawn(async move { client.start(request).await.is_ok() });
        }
        sleep(Duration::from_millis(100)).await;
        flood.shutdown().await;
    }
    handlers.until(PLACES).await;
    let replay = exchange(address, raw_to("/done", "done")).await;
    assert_eq!((replay.status, replay.is_replay()), (201, true), "{}", replay.text());
    let refused = exchange(address, raw_charge("new", &[], "2000")).await;
    assert_eq!((refused.status, &refused.json()["code"]), (503, &"overloaded".into()));
    assert_eq!(handlers.most(), PLACES);

    handlers.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    handle.drain(PATIENCE).await.unwrap();
    assert_eq!(handlers.most(), PLACES);
}

fn raw_to(path: &str, key: &str) -> Vec<u8> {
    crate::support::http::request("POST", path, &[("idempotency-key", key)], "2000")
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_1024_handlers_run_simultaneously() {
    let handlers = Handlers::new();
    let layer = layer();
    let handle = layer.handle();
    let app = handlers.router(layer);
    assert_eq!(send(&app, done("done")).await.status, StatusCode::CREATED);
    let requests: Vec<_> = (0..1100).map(|number| start(&app, charge(&format!("key-{number}")))).collect();
    handlers.until(1024).await;
    assert!(send(&app, done("done")).await.is_replay());
    // Before a handler returns, so that none of them gets its place.
    while requests.iter().filter(|request| request.is_finished()).count() < 1100 - 1024 {
        sleep(Duration::from_millis(1)).await;
    }
    handlers.gate.add_permits(2000);
    let mut refused = 0;
    for request in requests {
        let answer = request.await.unwrap();
        if answer.status != StatusCode::CREATED {
            answer.assert_refused(RejectionCode::Overloaded);
            refused += 1;
        }
    }
    assert_eq!((handlers.most(), refused), (1024, 1100 - 1024));
    handle.drain(PATIENCE).await.unwrap();
    assert_eq!(handle.list(RecordFilter::All, 2000).await.unwrap().len(), 1025);
}

#[tokio::test]
async fn without_a_place_every_answer_that_needs_no_handler_is_given_memory() {
    without_a_place(crate::support::direct::with_store().0).await;
}

#[tokio::test]
async fn without_a_place_every_answer_that_needs_no_handler_is_given_sqlite() {
    let file = SqliteFile::new();
    without_a_place(file.store()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn without_a_place_every_answer_that_needs_no_handler_is_given_postgres() {
    without_a_place(crate::support::schema::Schema::create().await.store()).await;
}

async fn without_a_place(store: impl IntoStore) {
    let handlers = Handlers::new();
    let layer = IdempotencyLayer::new(store).with_max_in_flight(1);
    let handle = layer.handle();
    let other = layer.clone().with_max_in_flight(1);
    let app = handlers.router(layer);
    assert_eq!(send(&app, done("done")).await.status, StatusCode::CREATED);
    let holder = start(&app, charge("held"));
    handlers.until(1).await;
    // In progress elsewhere, for this layer.
    let elsewhere = start(&handlers.router(other), charge("elsewhere"));
    handlers.until(2).await;

    assert!(send(&app, done("done")).await.is_replay());
    for (key, body, code) in [
        ("held", "2000", RejectionCode::InProgress),
        ("elsewhere", "2000", RejectionCode::InProgress),
        ("done", "2000", RejectionCode::KeyReused),
        ("held", "3000", RejectionCode::KeyReused),
        ("new", "2000", RejectionCode::Overloaded),
    ] {
        send(&app, request(axum::http::Method::POST, Some(key), body)).await.assert_refused(code);
    }
    assert_eq!(handle.list(RecordFilter::All, 9).await.unwrap().len(), 3);
    handlers.gate.add_permits(9);
    assert_eq!(holder.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(elsewhere.await.unwrap().status, StatusCode::CREATED);
    assert_eq!(send(&app, charge("new")).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn replays_take_no_place() {
    let (app, runs) = waiting(layer().with_max_in_flight(1), Duration::ZERO);
    send(&app, charge("done")).await;
    let replays: Vec<_> = (0..100).map(|_| start(&app, charge("done"))).collect();
    let first = start(&app, charge("new"));
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    for replay in replays {
        assert!(replay.await.unwrap().is_replay());
    }
    assert_eq!(runs.get(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_left_behind_keeps_its_place() {
    let (start_of, end_of) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (started, ended) = (Arc::clone(&start_of), Arc::clone(&end_of));
    // It does not yield, and so cannot be cancelled.
    let handler = move || async move {
        started.add_permits(1);
        tokio::task::block_in_place(|| {
            while ended.try_acquire().is_err() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        StatusCode::CREATED
    };
    let layer = layer().with_max_in_flight(1).with_max_execution(Duration::from_millis(100));
    let handle = layer.handle();
    let app = Router::new().route("/charges", post(handler)).layer(layer);
    let first = start(&app, charge("k"));
    start_of.acquire().await.unwrap().forget();
    first.await.unwrap().assert_refused(RejectionCode::MaxExecutionExceeded);
    send(&app, charge("other")).await.assert_refused(RejectionCode::Overloaded);
    end_of.add_permits(9);
    handle.prepare().await.unwrap();
    let again = timeout(PATIENCE, async {
        loop {
            let answer: Answer = send(&app, charge("other")).await;
            if answer.rejection != Some(RejectionCode::Overloaded) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
    });
    assert_eq!(again.await.unwrap().status, StatusCode::CREATED);
}

#[tokio::test]
async fn handlers_that_run_without_protection_take_places_too() {
    let nowhere = sqlx::PgPool::connect_lazy("postgres://127.0.0.1:1/none").unwrap();
    let layer = IdempotencyLayer::new(nowhere)
        .with_store_outage(StoreOutage::RunUnprotected)
        .with_store_timeout(Duration::from_millis(100))
        .with_max_in_flight(1);
    let (app, runs) = waiting(layer, Duration::from_secs(2));
    let first = begin(&app, charge("a"), &runs).await;
    send(&app, charge("b")).await.assert_refused(RejectionCode::Overloaded);
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert_eq!(send(&app, charge("b")).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_only_announced_takes_no_room_of_others() {
    let app = Router::new().route("/charges", post(|body: Bytes| async move { body.len().to_string() }));
    let address = serve(app.layer(layer())).await;
    let (mut client, connection) = connect(address).await;
    tokio::spawn(connection);
    let mut announced = Vec::new();
    for number in 0..64 {
        let (sender, body) = Channel::new(1);
        let upload = hyper::Request::post(format!("http://{address}/charges"))
            .header("idempotency-key", format!("announced-{number}"))
            .header("content-length", 1024 * 1024)
            .body(body)
            .unwrap();
        announced.push((sender, tokio::spawn(client.send_request(upload))));
    }
    // Those of HTTP/1.1 announce no less.
    let mut idle = Vec::new();
    for number in 0..64 {
        let mut connection = crate::support::http::RawConnection::open(address).await;
        let head = format!(
            "POST /charges HTTP/1.1\r\nhost: localhost\r\nidempotency-key: idle-{number}\r\ncontent-length: \
             1048576\r\n\r\n"
        );
        connection.send(head).await;
        idle.push(connection);
    }
    sleep(Duration::from_millis(300)).await;
    let body = "x".repeat(1024 * 1024);
    for number in 0..3 {
        let answer = exchange(address, raw_charge(&format!("k{number}"), &[], &body)).await;
        assert_eq!((answer.status, answer.text()), (200, "1048576"));
    }
    assert!(announced.iter().all(|(_, answer)| !answer.is_finished()));
}

#[tokio::test]
async fn slow_senders_hold_the_room_of_what_they_sent_until_their_time_is_over() {
    let limits = layer()
        .with_request_body_limit(1000)
        .with_request_buffer_limit(1000)
        .with_request_body_timeout(Duration::from_millis(500));
    let (app, _) = waiting(limits, Duration::ZERO);
    let half = |key: &str| {
        let first = tokio_stream::once(Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 500])));
        let rest = tokio_stream::StreamExt::chain(first, tokio_stream::pending());
        request(axum::http::Method::POST, Some(key), axum::body::Body::from_stream(rest))
    };
    let slow = [start(&app, half("a")), start(&app, half("b"))];
    sleep(Duration::from_millis(100)).await;
    send(&app, charge("k")).await.assert_refused(RejectionCode::Overloaded);
    for answer in slow {
        answer.await.unwrap().assert_refused(RejectionCode::RequestTimeout);
    }
    // The rest of a refused body is read without room.
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::OK);
    let whole = request(axum::http::Method::POST, Some("whole"), "x".repeat(1000));
    assert_eq!(send(&app, whole).await.status, StatusCode::OK);
}

type Connection =
    http2::Connection<TokioIo<TcpStream>, Channel<Bytes, std::convert::Infallible>, TokioExecutor>;

async fn connect(
    address: std::net::SocketAddr,
) -> (http2::SendRequest<Channel<Bytes, std::convert::Infallible>>, Connection) {
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    http2::handshake(TokioExecutor::new(), stream).await.unwrap()
}

const PATIENCE: Duration = Duration::from_secs(60);
