//! Requests on real sockets: what reaches the layer, what it refuses and what the connection is good for afterwards.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http_body_util::{Full, channel::Channel};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, time::timeout};

use crate::support::{
    http::{Client, RawConnection, RawResponse, exchange, post as charge, post_chunked, request},
    served::{App, layer, serve},
};

/// Tells the number of the run and gives the body back.
#[expect(clippy::needless_pass_by_value, reason = "a handler is given the body")]
fn echo(run: usize, body: Bytes) -> Response {
    (StatusCode::CREATED, format!("run {run}: {}", body.escape_ascii())).into_response()
}

#[track_caller]
fn assert_refused(response: &RawResponse, status: u16, code: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.json()["code"], code);
    assert_eq!(response.header("content-type"), Some("application/problem+json"));
    assert!(!response.is_replay());
}

/// A `POST` with these lines beside those that it needs.
fn with_lines(lines: &[&[u8]]) -> Vec<u8> {
    let lines = lines.iter().flat_map(|line| [line, &b"\r\n"[..]].concat());
    let head = b"POST /charges HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n";
    head.iter().copied().chain(lines).chain(*b"\r\nx").collect()
}

#[tokio::test]
async fn two_key_lines_are_refused_equal_or_not() {
    let app = App::start(layer(), echo).await;
    for second in [&b"Idempotency-Key: one"[..], b"idempotency-key: two", b"IDEMPOTENCY-KEY:"] {
        let response = exchange(app.address, with_lines(&[b"Idempotency-Key: one", second])).await;
        assert_refused(&response, 400, "key-invalid");
    }
    assert_eq!(app.runs.get(), 0);
}

#[tokio::test]
async fn a_key_with_bytes_over_0x7f_is_refused() {
    let app = App::start(layer(), echo).await;
    for key in [&b"a\xff"[..], b"\"a\xff\"", "\u{e4}".as_bytes(), b"\x80"] {
        let response = exchange(app.address, with_lines(&[&[b"idempotency-key: ", key].concat()])).await;
        assert_refused(&response, 400, "key-invalid");
    }
    assert_eq!(app.runs.get(), 0);
}

#[tokio::test]
async fn bytes_that_are_no_text_pass_in_other_headers() {
    let handler = |headers: HeaderMap| async move { headers["x-raw"].as_bytes().to_vec() };
    let address = serve(Router::new().route("/charges", post(handler)).layer(layer())).await;
    let bytes = with_lines(&[b"idempotency-key: k", b"x-raw: \xff\x80\xe4"]);
    for replay in [false, true] {
        let response = exchange(address, &bytes).await;
        assert_eq!((response.status, response.is_replay()), (200, replay));
        assert_eq!(response.body, b"\xff\x80\xe4");
    }
}

#[tokio::test]
async fn a_content_type_that_is_no_text_is_part_of_the_request() {
    let app = App::start(layer(), echo).await;
    let send = |content_type: &'static [u8]| {
        let line = [b"content-type: ", content_type].concat();
        exchange(app.address, with_lines(&[b"idempotency-key: k", &line]))
    };
    assert_eq!(send(b"\xff").await.status, 201);
    assert!(send(b"\xff").await.is_replay());
    assert_refused(&send(b"\xfe").await, 422, "key-reused");
}

#[tokio::test]
async fn a_key_counts_alike_in_both_versions_of_http() {
    let app = App::start(layer(), echo).await;
    let url = format!("http://{}/charges", app.address);
    let keyed = |uri: &str, key: &str| {
        let request =
            hyper::Request::post(uri).header(header::HOST, "localhost").header("idempotency-key", key);
        request.body(Full::from("2000")).unwrap()
    };
    let (mut old, mut new) = (Client::http1(app.address).await, Client::http2(app.address).await);
    let first = old.send(keyed("/charges", "old-first")).await;
    let retry = new.send(keyed(&url, "old-first")).await;
    assert_eq!((first.status(), retry.status()), (StatusCode::CREATED, StatusCode::CREATED));
    assert_eq!((first.version(), retry.version()), (http::Version::HTTP_11, http::Version::HTTP_2));
    assert_eq!(retry.headers()["idempotent-replayed"], "true");
    assert_eq!(first.into_body().to_bytes(), retry.into_body().to_bytes());

    let first = new.send(keyed(&url, "\"new first\"")).await;
    let retry = old.send(keyed("/charges", "\"new first\"")).await;
    assert!(!first.headers().contains_key("idempotent-replayed"));
    assert_eq!(retry.headers()["idempotent-replayed"], "true");
    assert_eq!(first.into_body().to_bytes(), retry.into_body().to_bytes());
    assert_eq!(app.runs.get(), 2);
}

#[tokio::test]
async fn a_malformed_key_is_refused_in_http2_and_the_connection_goes_on() {
    let app = App::start(layer(), echo).await;
    let url = format!("http://{}/charges", app.address);
    let mut client = Client::http2(app.address).await;
    let mut twice = hyper::Request::post(&url).header("idempotency-key", "k").body(Full::from("x")).unwrap();
    twice.headers_mut().append("idempotency-key", "k".parse().unwrap());
    let mut bytes = hyper::Request::post(&url).body(Full::from("x")).unwrap();
    let key = http::HeaderValue::from_bytes(b"k\xff").unwrap();
    bytes.headers_mut().insert("idempotency-key", key);
    for request in [twice, bytes] {
        let response = client.send(request).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let problem: serde_json::Value = serde_json::from_slice(&response.into_body().to_bytes()).unwrap();
        assert_eq!(problem["code"], "key-invalid");
    }
    let request = hyper::Request::post(&url).header("idempotency-key", "k").body(Full::from("x")).unwrap();
    assert_eq!(client.send(request).await.status(), StatusCode::CREATED);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn framing_is_not_payload() {
    let app = App::start(layer(), echo).await;
    let first = exchange(app.address, charge("k", &[], "2000")).await;
    for chunks in [&["2000"][..], &["2", "00", "0"]] {
        let retry = exchange(app.address, post_chunked("k", chunks)).await;
        assert!(retry.is_replay(), "{}", retry.text());
        assert_eq!(retry.body, first.body);
    }
    assert_refused(&exchange(app.address, post_chunked("k", &["200"])).await, 422, "key-reused");
    let first = exchange(app.address, post_chunked("other", &["20", "00"])).await;
    assert_eq!((first.status, first.text()), (201, "run 2: 2000"));
    assert!(exchange(app.address, charge("other", &[], "2000")).await.is_replay());
    let first = exchange(app.address, post_chunked("empty", &[])).await;
    assert_eq!(first.text(), "run 3: ");
    assert!(exchange(app.address, charge("empty", &[], "")).await.is_replay());
    assert_eq!(app.runs.get(), 3);
}

#[tokio::test]
async fn a_target_in_absolute_form_is_the_same_request() {
    let app = App::start(layer(), echo).await;
    let first = String::from_utf8(charge("k", &[], "2000")).unwrap();
    assert_eq!(exchange(app.address, &first).await.status, 201);
    let retry = first.replace("POST /charges", "POST http://elsewhere/charges");
    assert!(exchange(app.address, retry).await.is_replay());
    assert_refused(&exchange(app.address, first.replace("/charges", "/charges?x")).await, 422, "key-reused");
}

#[tokio::test]
async fn get_and_head_pass_through() {
    let app = App::start(layer().required(), |run, _| format!("run {run}").into_response()).await;
    let mut connection = RawConnection::open(app.address).await;
    for key in ["k", "k", "a,b"] {
        connection.send(request("GET", "/charges", &[("idempotency-key", key)], "")).await;
        let response = connection.read().await;
        assert_eq!((response.status, response.is_replay()), (200, false));
        connection.send(request("HEAD", "/charges", &[("idempotency-key", key)], "")).await;
        let response = connection.read_head().await;
        assert_eq!((response.status, response.header("content-length")), (200, Some("5")));
    }
    assert_eq!(app.runs.get(), 6);
    assert!(app.records().await.is_empty());
}

#[tokio::test]
async fn a_connection_stays_usable_after_refusals_and_replays() {
    let app = App::start(layer().with_request_body_limit(8), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    let steps = [
        ("k", "2000", 201, false),
        ("a,b", "2000", 400, false),
        ("k", "2000", 201, true),
        ("k", "3000", 422, false),
        ("big", "123456789", 413, false),
        ("k", "2000", 201, true),
        ("other", "2000", 201, false),
    ];
    for (key, body, status, replay) in steps {
        connection.send(charge(key, &[], body)).await;
        let response = connection.read().await;
        assert_eq!((response.status, response.is_replay()), (status, replay), "{key} {body}");
    }
    assert_eq!(app.runs.get(), 2);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let app = App::start(layer(), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    let requests =
        [charge("k", &[], "1"), charge("a,b", &[], "1"), charge("k", &[], "1"), charge("k", &[], "2")];
    connection.send(requests.concat()).await;
    let first = connection.read().await;
    assert_eq!((first.text(), first.is_replay()), ("run 1: 1", false));
    assert_refused(&connection.read().await, 400, "key-invalid");
    let replay = connection.read().await;
    assert_eq!((replay.text(), replay.is_replay()), ("run 1: 1", true));
    assert_refused(&connection.read().await, 422, "key-reused");
    connection.send(charge("other", &[], "1")).await;
    assert_eq!(connection.read().await.text(), "run 2: 1");
}

/// The head of a request that waits for `100 Continue` before it sends `length` bytes.
fn expecting(key: &str, length: usize) -> String {
    format!(
        "POST /charges HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n\
         idempotency-key: {key}\r\ncontent-length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn a_body_that_is_not_wanted_is_not_asked_for() {
    let app = App::start(layer().with_request_body_limit(8), echo).await;
    for (key, length, status) in [("a,b", 4, 400), ("\"", 4, 400), ("k", 9, 413)] {
        let mut connection = RawConnection::open(app.address).await;
        connection.send(expecting(key, length)).await;
        let response = timeout(PATIENCE, connection.read()).await.unwrap();
        assert_eq!(response.status, status, "{key}");
    }
    assert_eq!(app.runs.get(), 0);
}

#[tokio::test]
async fn a_body_that_is_wanted_is_asked_for_once() {
    let app = App::start(layer(), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    for replay in [false, true] {
        connection.send(expecting("k", 4)).await;
        assert_eq!(timeout(PATIENCE, connection.read()).await.unwrap().status, 100);
        connection.send("2000").await;
        let response = connection.read().await;
        assert_eq!((response.status, response.is_replay()), (201, replay));
        assert_eq!(response.text(), "run 1: 2000");
    }
}

#[tokio::test]
async fn a_length_over_the_limit_is_refused_without_reading() {
    let app = App::start(layer(), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    connection.send(expecting("k", (1 << 20) + 1).replace("expect: 100-continue\r\n", "")).await;
    let response = timeout(PATIENCE, connection.read()).await.expect("the answer does not wait for the body");
    assert_refused(&response, 413, "request-too-large");
    assert_eq!(app.runs.get(), 0);
    assert!(app.records().await.is_empty());
}

#[tokio::test]
async fn chunks_over_the_limit_are_refused_before_the_last_one() {
    let app = App::start(layer().with_request_body_limit(8), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    let whole = post_chunked("k", &["12345", "6789"]);
    connection.send(whole.strip_suffix(b"0\r\n\r\n").unwrap()).await;
    let response = timeout(PATIENCE, connection.read()).await.expect("the answer does not wait for the end");
    assert_refused(&response, 413, "request-too-large");
    assert_eq!(exchange(app.address, post_chunked("k", &["1234", "5678"])).await.text(), "run 1: 12345678");
}

/// How a client leaves in the middle of its upload.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    HalfClosed,
    Closed,
    Reset,
}

#[tokio::test]
async fn an_upload_that_breaks_off_claims_nothing() {
    let app = App::start(layer(), echo).await;
    let chunked = post_chunked("k", &["20", "00"]);
    let uploads =
        [charge("k", &[], "2000"), chunked.strip_suffix(b"\r\n2\r\n00\r\n0\r\n\r\n").unwrap().into()];
    for (upload, leaves) in uploads
        .iter()
        .flat_map(|upload| [Leaves::HalfClosed, Leaves::Closed, Leaves::Reset].map(|how| (upload, how)))
    {
        let mut connection = RawConnection::open(app.address).await;
        connection.send(&upload[..upload.len() - 1]).await;
        // The layer is to be in the middle of the body when the client leaves.
        tokio::time::sleep(Duration::from_millis(50)).await;
        match leaves {
            Leaves::HalfClosed => {
                connection.finish_sending().await;
                timeout(PATIENCE, connection.read_to_end()).await.unwrap();
            }
            Leaves::Closed => drop(connection),
            Leaves::Reset => connection.reset(),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((app.runs.get(), app.records().await.len()), (0, 0), "{leaves:?}");
    }
    assert_eq!(app.post("k").await.text(), "run 1: 2000");
}

#[tokio::test]
async fn an_upload_that_is_reset_in_http2_claims_nothing() {
    let app = App::start(layer(), echo).await;
    let stream = TokioIo::new(TcpStream::connect(app.address).await.unwrap());
    let (mut client, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let upload = |body: Channel<Bytes, Infallible>| {
        let url = format!("http://{}/charges", app.address);
        hyper::Request::post(url).header("idempotency-key", "k").body(body).unwrap()
    };
    let (mut sender, body) = Channel::new(1);
    let response = tokio::spawn(client.send_request(upload(body)));
    sender.send_data("20".into()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    response.abort();
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(sender);
    assert_eq!((app.runs.get(), app.records().await.len()), (0, 0));
    let (mut sender, body) = Channel::new(1);
    let response = tokio::spawn(client.send_request(upload(body)));
    sender.send_data("2000".into()).await.unwrap();
    drop(sender);
    assert_eq!(response.await.unwrap().unwrap().status(), StatusCode::CREATED);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn an_upload_without_an_end_gets_408() {
    let app = App::start(layer().with_request_body_timeout(Duration::from_millis(100)), echo).await;
    let mut connection = RawConnection::open(app.address).await;
    let upload = charge("k", &[], "2000");
    connection.send(&upload[..upload.len() - 1]).await;
    assert_refused(&timeout(PATIENCE, connection.read()).await.unwrap(), 408, "request-timeout");
    assert!(app.records().await.is_empty());
}

#[tokio::test]
async fn a_request_with_trailers_reaches_the_handler_whole() {
    let handler = |request: Request<Body>| async move {
        let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap();
        let trailer = body.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
        format!("{} {:?}", body.to_bytes().escape_ascii(), trailer)
    };
    let address = serve(Router::new().route("/charges", post(handler)).layer(layer())).await;
    let mut bytes = post_chunked("k", &["20", "00"]);
    bytes.truncate(bytes.len() - 2);
    bytes.extend(b"x-sum: 7\r\n\r\n");
    assert_eq!(exchange(address, &bytes).await.text(), "2000 Some(\"7\")");
    assert!(exchange(address, &bytes).await.is_replay());
}

#[tokio::test]
async fn a_client_of_http_1_0_is_served() {
    let app = App::start(layer(), echo).await;
    let bytes = "POST /charges HTTP/1.0\r\nidempotency-key: k\r\ncontent-length: 4\r\n\r\n2000";
    for replay in [false, true] {
        let response = exchange(app.address, bytes).await;
        assert_eq!((response.text(), response.is_replay()), ("run 1: 2000", replay));
    }
    assert!(app.post("k").await.is_replay());
}

const PATIENCE: Duration = Duration::from_secs(10);
