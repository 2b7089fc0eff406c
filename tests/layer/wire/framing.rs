//! Headers that frame a response, and those that mark it: trailers, lengths, bodies that a status does not allow, and
//! the marker of replays.

use std::convert::Infallible;

use axum::{
    Extension, Router,
    body::Body,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use tower_idempotency::{
    Directive, IdempotencyLayer, Representation,
    layer::StoredRepresentation,
    store::{Resolution, StoredResponse},
};

use crate::support::{
    direct::identity,
    http::{Client, RawConnection, RawResponse, exchange, post as charge, request},
    served::{App, Count, layer, serve},
};

type Fields = &'static [(&'static str, &'static str)];

fn map(fields: Fields) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        map.append(*name, value.parse().unwrap());
    }
    map
}

/// A response whose body ends with these trailers, if there are any.
fn ending_with(announced: Fields, trailers: Option<Fields>) -> Response {
    let body = Full::from("2000").with_trailers(async move { trailers.map(|fields| Ok(map(fields))) });
    (map(announced), Body::new(body)).into_response()
}

/// A body of one byte whose length is not known, for statuses that allow none.
fn streamed() -> Body {
    Body::from_stream(tokio_stream::once(Ok::<_, Infallible>(Bytes::from_static(b"x"))))
}

/// Sends a request and its retry on one connection, which shows a wrong frame, and compares the bytes.
async fn sent_twice(app: &App, key: &str) -> RawResponse {
    let mut connection = RawConnection::open(app.address).await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        connection.send(charge(key, &[("te", "trailers")], "2000")).await;
        answers.push(connection.read().await);
    }
    assert_eq!((answers[0].is_replay(), answers[1].is_replay()), (false, true));
    let differing = ["date", "idempotent-replayed"];
    assert_eq!(answers[0].bytes_without(&differing), answers[1].bytes_without(&differing));
    answers.remove(0)
}

#[tokio::test]
async fn trailers_are_announced_as_they_come() {
    let cases: [(Fields, Option<Fields>, Option<&str>, usize); 6] = [
        (&[("trailer", "x-sum")], None, None, 0),
        (&[("trailer", "x-sum")], Some(&[]), None, 0),
        (&[], Some(&[]), None, 0),
        (&[], Some(&[("x-sum", "7")]), Some("x-sum"), 1),
        (
            &[("trailer", "x-never"), ("trailer", "x-sum")],
            Some(&[("x-sum", "7"), ("x-sum", "8")]),
            Some("x-sum"),
            2,
        ),
        // A server does not send a trailer of this name.
        (&[], Some(&[("content-length", "7")]), None, 0),
    ];
    for (announced, trailers, names, lines) in cases {
        let app = App::start(layer(), move |_, _| ending_with(announced, trailers)).await;
        let first = sent_twice(&app, "k").await;
        assert_eq!(
            (first.header("trailer"), first.trailers.len()),
            (names, lines),
            "{announced:?} {trailers:?}"
        );
        assert_eq!(first.text(), "2000");
    }
}

#[tokio::test]
async fn trailers_are_announced_as_they_come_over_http2() {
    let cases: [(Option<Fields>, Option<&str>); 3] =
        [(None, None), (Some(&[]), None), (Some(&[("x-sum", "7")]), Some("x-sum"))];
    for (trailers, names) in cases {
        let app = App::start(layer(), move |_, _| ending_with(&[("trailer", "x-other")], trailers)).await;
        let mut client = Client::http2(app.address).await;
        for _ in 0..2 {
            let request = hyper::Request::post(format!("http://{}/charges", app.address));
            let request = request.header("idempotency-key", "k").body(Full::default()).unwrap();
            let (head, body) = client.send(request).await.into_parts();
            assert_eq!(head.headers.get("trailer").map(|value| value.to_str().unwrap()), names);
            assert_eq!(body.trailers().is_some(), names.is_some());
        }
        assert_eq!(app.runs.get(), 1);
    }
}

#[tokio::test]
async fn a_body_that_has_ended_is_not_waited_for() {
    let app = App::start(layer(), |_, _| {
        let frames = [Frame::data(Bytes::from("2000")), Frame::trailers(map(&[("x-sum", "7")]))];
        let frames = tokio_stream::iter(frames.map(Ok::<_, Infallible>));
        // It does not say that it has ended.
        Body::new(StreamBody::new(tokio_stream::StreamExt::chain(frames, tokio_stream::pending())))
            .into_response()
    })
    .await;
    assert_eq!(sent_twice(&app, "k").await.text(), "2000");
}

#[tokio::test]
async fn a_status_without_a_body_has_none_and_no_length() {
    for status in [204, 205, 304] {
        for body in [streamed, || Body::from("x"), || ending_with(&[], Some(&[("x-sum", "7")])).into_body()] {
            let answer = move |_, _| {
                let status = StatusCode::from_u16(status).unwrap();
                (status, map(&[("trailer", "x-sum"), ("etag", "\"1\"")]), body()).into_response()
            };
            let app = App::start(layer(), answer).await;
            let first = sent_twice(&app, "k").await;
            assert_eq!(first.status, status);
            assert!(matches!(first.header("content-length"), None | Some("0")), "{}", first.text());
            assert_eq!((first.header("etag"), first.header("trailer")), (Some("\"1\""), None));
            assert_eq!((first.header("transfer-encoding"), first.text()), (None, ""));
        }
    }
}

#[tokio::test]
async fn a_status_without_a_body_has_none_over_http2() {
    for status in [204, 205, 304] {
        let status = StatusCode::from_u16(status).unwrap();
        let app = App::start(layer(), move |_, _| (status, streamed()).into_response()).await;
        let mut client = Client::http2(app.address).await;
        for is_retry in [false, true] {
            let request = hyper::Request::post(format!("http://{}/charges", app.address));
            let request = request.header("idempotency-key", "k").body(Full::default()).unwrap();
            let (head, body) = client.send(request).await.into_parts();
            assert_eq!((head.status, head.headers.contains_key("idempotent-replayed")), (status, is_retry));
            assert_ne!(head.headers.get("content-length").map(|value| value.as_bytes()), Some(&b"1"[..]));
            assert!(body.to_bytes().is_empty());
        }
    }
}

#[tokio::test]
async fn an_informational_status_is_no_result() {
    let app = App::start(layer(), |run, _| match run {
        1 => StatusCode::SWITCHING_PROTOCOLS.into_response(),
        _ => StatusCode::CREATED.into_response(),
    })
    .await;
    let mut connection = RawConnection::open(app.address).await;
    connection.send(charge("k", &[], "2000")).await;
    assert!(app.post("k").await.status == 201 && app.post("k").await.is_replay());
}

#[tokio::test]
async fn a_wrong_length_is_not_sent_with_a_response_that_is_not_stored() {
    for wrong in ["3", "0", "900"] {
        let answer =
            move |_, _| (StatusCode::UNAUTHORIZED, [("content-length", wrong)], "2000").into_response();
        let app = App::start(layer(), answer).await;
        let mut connection = RawConnection::open(app.address).await;
        for _ in 0..2 {
            connection.send(charge("k", &[], "2000")).await;
            let answer = connection.read().await;
            assert_eq!(
                (answer.status, answer.header("content-length"), answer.text()),
                (401, Some("4"), "2000")
            );
        }
    }
}

#[tokio::test]
async fn headers_of_the_connection_of_a_rendered_response_are_not_sent() {
    let render = |stored: StoredRepresentation| async move {
        let mut response = Response::new(stored.data);
        *response.headers_mut() = map(&[
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "gzip, chunked"),
            ("content-length", "900"),
            ("trailer", "x-sum"),
            ("idempotent-replayed", "true"),
        ]);
        Ok::<_, Infallible>(response)
    };
    let app = App::start(layer().with_representation(render), |_, _| {
        Extension(Representation::new("2000")).into_response()
    })
    .await;
    let first = sent_twice(&app, "k").await;
    let names: Vec<_> = first.headers.iter().map(|(name, _)| String::from_utf8_lossy(name)).collect();
    assert_eq!((names, first.text()), (vec!["content-length".into(), "date".into()], "2000"));
}

#[tokio::test]
async fn the_response_of_an_operator_is_framed_like_a_handlers() {
    let layer = layer();
    let handle = layer.handle();
    let app = App::start(layer, |_, _| (Extension(Directive::Hold), "unsure").into_response()).await;
    app.post("k").await;
    let headers =
        map(&[("content-length", "900"), ("connection", "close"), ("trailer", "x-sum"), ("x-kept", "1")]);
    let response = StoredResponse::new(StatusCode::CREATED, headers, "2000");
    let (consumer, key) = identity();
    handle.resolve(&consumer, &key, Resolution::Complete(response.encode())).await.unwrap();
    let replay = app.post("k").await;
    let names: Vec<_> = replay.headers.iter().map(|(name, _)| String::from_utf8_lossy(name)).collect();
    assert_eq!(names, ["x-kept", "idempotent-replayed", "content-length", "date"]);
    assert_eq!((replay.status, replay.text()), (201, "2000"));
}

#[tokio::test]
async fn the_marker_of_replays_is_on_replays_alone_and_once() {
    let name = axum::http::HeaderName::from_static("x-replayed");
    for (layer, name) in [(layer(), "idempotent-replayed"), (layer().with_replay_marker(name), "x-replayed")]
    {
        for status in [201, 401, 503] {
            let answer = move |_, _| {
                let status = StatusCode::from_u16(status).unwrap();
                (status, [(name, "true"), ("x-kept", "1")], "2000").into_response()
            };
            let app = App::start(layer.clone(), answer).await;
            let key = format!("k{status}");
            let (first, retry) = (app.post(&key).await, app.post(&key).await);
            assert_eq!((first.header(name), first.header("x-kept")), (None, Some("1")));
            assert_eq!(retry.header(name), if status == 201 { Some("true") } else { None });
        }
    }
}

#[tokio::test]
async fn the_marker_is_not_on_streams() {
    let answer = |_, _| {
        ([("idempotent-replayed", "true"), ("content-type", "text/event-stream")], streamed()).into_response()
    };
    let app = App::start(layer(), answer).await;
    assert_eq!(app.post("k").await.header("idempotent-replayed"), None);
}

#[tokio::test]
async fn a_request_without_a_key_passes_with_what_the_handler_says() {
    let address = with_marker(layer()).await;
    let answer = exchange(address, request("POST", "/charges", &[], "2000")).await;
    assert_eq!(answer.header("idempotent-replayed"), Some("true"));
}

async fn with_marker(layer: IdempotencyLayer) -> std::net::SocketAddr {
    let runs = Count::default();
    let handler = move || async move {
        runs.add();
        [("idempotent-replayed", "true")]
    };
    serve(Router::new().route("/charges", post(handler)).layer(layer)).await
}
