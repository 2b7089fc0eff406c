//! Requests that are refused before their bodies were read: the answer arrives, and the connection goes on.

use std::time::Duration;

use axum::{Router, extract::DefaultBodyLimit, http::StatusCode, routing::post};
use bytes::Bytes;
use http_body_util::Full;
use tokio::time::timeout;
use tower_idempotency::{ConsumerExtractor, IdempotencyLayer};

use crate::support::{
    http::{Client, RawConnection, post as charge, request},
    served::{layer, serve},
};

const LARGE: usize = 3 * 1024 * 1024;

async fn serve_with(layer: IdempotencyLayer) -> std::net::SocketAddr {
    let handler = |body: Bytes| async move { (StatusCode::CREATED, body.len().to_string()) };
    // Only the limits of the layer count.
    let handler = post(handler).layer(DefaultBodyLimit::disable());
    serve(Router::new().route("/charges", handler).layer(layer)).await
}

/// The bytes of a chunked upload.
fn chunked(headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut bytes =
        String::from("POST /charges HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n");
    for (name, value) in headers {
        bytes.push_str(&format!("{name}: {value}\r\n"));
    }
    bytes.push_str("\r\n");
    for chunk in body.as_bytes().chunks(64 * 1024) {
        bytes.push_str(&format!("{:x}\r\n{}\r\n", chunk.len(), str::from_utf8(chunk).unwrap()));
    }
    bytes.push_str("0\r\n\r\n");
    bytes.into_bytes()
}

/// Sends an upload twenty times on one connection, each between two requests that are not refused.
async fn refused_and_reused(layer: IdempotencyLayer, upload: &[u8], code: &str, between: &[u8]) {
    let address = serve_with(layer).await;
    let mut connection = RawConnection::open(address).await;
    for round in 0..20 {
        connection.send(between).await;
        assert_eq!(connection.read().await.status, 201, "{code}, round {round}");
        connection.send(upload).await;
        let refused = timeout(Duration::from_secs(30), connection.read()).await.unwrap();
        assert_eq!(refused.json()["code"], code, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_413_arrives_on_a_reused_connection() {
    let body = "x".repeat(LARGE);
    let small = charge("small", &[], "2000");
    for upload in [charge("k", &[], &body), chunked(&[("idempotency-key", "k")], &body)] {
        refused_and_reused(layer(), &upload, "request-too-large", &small).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_503_for_want_of_room_arrives_on_a_reused_connection() {
    let limits = layer().with_request_body_limit(2 * LARGE).with_request_buffer_limit(2 * LARGE);
    let address = serve_with(limits).await;
    // Another upload has most of the room.
    let hold = async || {
        let mut holder = RawConnection::open(address).await;
        let held = charge("held", &[], &"x".repeat(2 * LARGE));
        holder.send(&held[..2 * LARGE - 1024]).await;
        holder
    };
    let mut holder = hold().await;
    let mut connection = RawConnection::open(address).await;
    let upload = charge("k", &[], &"x".repeat(LARGE));
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let mut refused = 0;
    while refused < 20 {
        assert!(std::time::Instant::now() < deadline);
        connection.send(&upload).await;
        let answer = connection.read().await;
        match answer.status {
            503 => refused += 1,
            // It arrived before the other upload, which may have been refused then.
            201 if refused == 0 => {
                drop(holder);
                holder = hold().await;
            }
            _ => panic!("{}: {}", answer.status, answer.text()),
        }
    }
    drop(holder);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_by_the_head_arrive_on_a_reused_connection() {
    let body = "x".repeat(LARGE);
    let named = || layer().with_consumer(ConsumerExtractor::header("x-account".parse().unwrap()));
    let known = charge("small", &[("x-account", "acme")], "2000");
    for upload in [charge("k", &[], &body), chunked(&[("idempotency-key", "k")], &body)] {
        refused_and_reused(named(), &upload, "consumer-unidentified", &known).await;
    }
    let small = charge("small", &[], "2000");
    for upload in [charge("a,b", &[], &body), chunked(&[("idempotency-key", "a,b")], &body)] {
        refused_and_reused(layer(), &upload, "key-invalid", &small).await;
    }
    for upload in [request("POST", "/charges", &[], &body), chunked(&[], &body)] {
        refused_and_reused(layer().required(), &upload, "key-missing", &small).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_503_at_the_end_of_the_server_arrives_on_a_reused_connection() {
    let layer = layer();
    let handle = layer.handle();
    handle.drain(Duration::from_secs(1)).await.unwrap();
    let body = "x".repeat(LARGE);
    // Requests without a key pass.
    let plain = request("POST", "/charges", &[], "2000");
    refused_and_reused(layer, &charge("k", &[], &body), "shutting-down", &plain).await;
}

#[tokio::test]
async fn a_client_that_waits_to_be_asked_for_its_body_is_refused_without_being_asked() {
    let address = serve_with(layer()).await;
    for (key, code) in [("k", "request-too-large"), ("a,b", "key-invalid")] {
        let mut connection = RawConnection::open(address).await;
        let head = format!(
            "POST /charges HTTP/1.1\r\nhost: localhost\r\nidempotency-key: {key}\r\nexpect: 100-continue\r\n\
             content-length: {LARGE}\r\n\r\n"
        );
        connection.send(head).await;
        let answer = connection.read().await;
        assert_eq!(answer.json()["code"], code, "{}", answer.status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_413_arrives_in_http2_and_other_streams_go_on() {
    let address = serve_with(layer()).await;
    let mut client = Client::http2(address).await;
    let url = format!("http://{address}/charges");
    for round in 0..20 {
        let large = hyper::Request::post(&url).header("idempotency-key", "k");
        let refused = client.send(large.body(Full::from(vec![b'x'; LARGE])).unwrap()).await;
        assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE, "round {round}");
        let small = hyper::Request::post(&url).header("idempotency-key", "small");
        let answer = client.send(small.body(Full::from("2000")).unwrap()).await;
        assert_eq!(answer.status(), StatusCode::CREATED, "round {round}");
    }
}

#[tokio::test]
async fn a_refused_body_without_an_end_is_read_for_the_time_of_a_body_only() {
    let limit = Duration::from_millis(300);
    let address = serve_with(layer().with_request_body_timeout(limit)).await;
    let mut connection = RawConnection::open(address).await;
    let upload = chunked(&[("idempotency-key", "a,b")], "2000");
    connection.send(&upload[..upload.len() - 5]).await;
    assert_eq!(connection.read().await.status, 400);
    assert!(timeout(Duration::from_secs(20), connection.read_to_end()).await.unwrap().is_empty());
}
