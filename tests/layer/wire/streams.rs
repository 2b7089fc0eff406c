//! Responses that are too large, too slow, endless or broken, on real sockets: the first caller gets them as they come,
//! and nothing runs twice because of their size.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    http::StatusCode,
    response::{IntoResponse, Response, Sse, sse::Event},
    routing::post,
};
use bytes::Bytes;
use http_body_util::channel::{Channel, Sender};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tower_idempotency::Directive;

use crate::support::{
    http::{RawConnection, RawResponse, exchange, post as charge, request},
    served::{App, Count, layer, serve},
};

#[track_caller]
fn assert_not_kept(retry: &RawResponse, original_status: u16) {
    assert_eq!(retry.status, 409, "{}", retry.text());
    let problem = retry.json();
    assert_eq!(
        (&problem["code"], &problem["original_status"]),
        (&"response-not-kept".into(), &original_status.into())
    );
    assert_eq!(problem["retryable"], false);
    assert!(!retry.is_replay());
}

/// An application whose first response has a body that the test feeds.
async fn fed(layer: tower_idempotency::IdempotencyLayer, content_type: &'static str) -> (App, FedBody) {
    let (sender, body) = Channel::new(1);
    let body = Arc::new(Mutex::new(Some(body)));
    let app = App::start(layer, move |_, _| {
        let body = body.lock().unwrap().take().map_or_else(Body::empty, Body::new);
        (StatusCode::ACCEPTED, [("content-type", content_type), ("location", "/charges/1")], body)
            .into_response()
    });
    (app.await, sender)
}

type FedBody = Sender<Bytes, io::Error>;

/// A body of pieces whose length nobody knows beforehand.
fn in_pieces(pieces: &'static [&'static str]) -> Body {
    Body::from_stream(tokio_stream::iter(pieces).map(|piece| Ok::<_, Infallible>(Bytes::from(*piece))))
}

#[tokio::test]
async fn a_body_of_exactly_the_limit_is_kept() {
    for known_length in [true, false] {
        let app = App::start(layer().with_response_body_limit(8), move |run, _| match known_length {
            true => format!("run {run}...").into_response(),
            false => in_pieces(&["run 1", "..."]).into_response(),
        })
        .await;
        let (first, replay) = (app.post("k").await, app.post("k").await);
        assert_eq!((first.text(), replay.text()), ("run 1...", "run 1..."));
        assert!(replay.is_replay());
        assert_eq!((first.header("content-length"), replay.header("content-length")), (Some("8"), Some("8")));
        assert_eq!(app.runs.get(), 1);
    }
}

#[tokio::test]
async fn a_body_of_one_byte_more_is_passed_on_and_not_kept() {
    for known_length in [true, false] {
        let app = App::start(layer().with_response_body_limit(8), move |_, _| match known_length {
            true => (StatusCode::CREATED, "123456789").into_response(),
            false => (StatusCode::CREATED, in_pieces(&["1234", "56789"])).into_response(),
        })
        .await;
        let first = app.post("k").await;
        assert_eq!((first.status, first.text()), (201, "123456789"));
        assert_not_kept(&app.post("k").await, 201);
        assert_not_kept(&app.post("k").await, 201);
        assert_eq!(app.runs.get(), 1);
    }
}

#[tokio::test]
async fn the_default_limit_is_a_mebibyte() {
    let app = App::start(layer(), |run, _| vec![b'x'; (1 << 20) + run - 1].into_response()).await;
    assert_eq!(app.post("fits").await.body.len(), 1 << 20);
    let replay = app.post("fits").await;
    assert_eq!((replay.is_replay(), replay.body.len()), (true, 1 << 20));
    assert_eq!(app.post("does-not").await.body.len(), (1 << 20) + 1);
    assert_not_kept(&app.post("does-not").await, 200);
}

#[tokio::test]
async fn an_endless_body_reaches_the_first_caller_as_it_comes() {
    let (app, mut body) = fed(layer().with_response_body_limit(8), "application/octet-stream").await;
    let mut first = RawConnection::open(app.address).await;
    first.send(charge("k", &[], "2000")).await;
    body.send_data("12345".into()).await.unwrap();
    body.send_data("6789".into()).await.unwrap();
    let head = timeout(PATIENCE, first.read_head()).await.expect("the head does not wait for the end");
    assert_eq!((head.status, head.header("content-length")), (202, None));
    assert_eq!(first.read_chunk().await.unwrap(), b"12345");
    assert_eq!(first.read_chunk().await.unwrap(), b"6789");
    for piece in ["on", "and on"] {
        body.send_data(piece.into()).await.unwrap();
        let chunk =
            timeout(PATIENCE, first.read_chunk()).await.expect("a piece does not wait for the next one");
        assert_eq!(chunk.unwrap(), piece.as_bytes());
        let retry = app.post("k").await;
        assert_not_kept(&retry, 202);
        assert_eq!(retry.json()["original_location"], "/charges/1");
    }
    drop(body);
    assert_eq!(first.read_chunk().await, None);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn events_reach_the_first_caller_one_by_one() {
    for content_type in ["text/event-stream", "Text/Event-Stream; charset=utf-8"] {
        let (app, mut body) = fed(layer(), content_type).await;
        let mut first = RawConnection::open(app.address).await;
        first.send(charge("k", &[], "2000")).await;
        let head = timeout(PATIENCE, first.read_head()).await.expect("the head does not wait for an event");
        assert_eq!(head.header("content-type"), Some(content_type));
        for event in ["data: 1\n\n", "data: 2\n\n"] {
            body.send_data(event.into()).await.unwrap();
            let chunk =
                timeout(PATIENCE, first.read_chunk()).await.expect("an event does not wait for the next one");
            assert_eq!(chunk.unwrap(), event.as_bytes());
        }
        assert_not_kept(&app.post("k").await, 202);
        assert_eq!(app.runs.get(), 1);
    }
}

#[tokio::test]
async fn lines_and_parts_reach_the_first_caller_one_by_one() {
    for content_type in [
        "application/x-ndjson",
        "Application/JSONL ; charset=utf-8",
        "application/json-seq",
        "application/stream+json",
        "multipart/x-mixed-replace; boundary=frame",
    ] {
        let (app, mut body) = fed(layer(), content_type).await;
        let mut first = RawConnection::open(app.address).await;
        first.send(charge("k", &[], "2000")).await;
        let head = timeout(PATIENCE, first.read_head()).await.expect("the head does not wait for a line");
        assert_eq!((head.status, head.header("content-type")), (202, Some(content_type)));
        for line in ["1\n", "2\n"] {
            body.send_data(line.into()).await.unwrap();
            let chunk =
                timeout(PATIENCE, first.read_chunk()).await.expect("a line does not wait for the next one");
            assert_eq!(chunk.unwrap(), line.as_bytes());
        }
        assert_not_kept(&app.post("k").await, 202);
        assert_eq!(app.runs.get(), 1);
    }
}

#[tokio::test]
async fn lines_that_are_all_there_are_kept() {
    let app = App::start(layer(), |run, _| {
        ([("content-type", "application/x-ndjson")], format!("{run}\n2\n")).into_response()
    })
    .await;
    assert_eq!(app.post("k").await.text(), "1\n2\n");
    let retry = app.post("k").await;
    assert_eq!((retry.is_replay(), retry.text()), (true, "1\n2\n"));
}

/// An application whose responses are not stored, for the reason that `answer` gives, and have a body that the test
/// feeds.
async fn unstored(answer: fn(Body) -> Response) -> (App, FedBody) {
    let (sender, body) = Channel::new(1);
    let body = Arc::new(Mutex::new(Some(body)));
    let app = App::start(layer(), move |run, _| match body.lock().unwrap().take() {
        Some(body) => answer(Body::new(body)),
        None => format!("run {run}").into_response(),
    });
    (app.await, sender)
}

#[tokio::test]
async fn a_response_that_is_not_stored_reaches_its_caller_as_it_comes() {
    let reasons: [fn(Body) -> Response; 4] = [
        |body| (Extension(Directive::Release), body).into_response(),
        |body| (Extension(Directive::Hold), body).into_response(),
        |body| (StatusCode::SERVICE_UNAVAILABLE, body).into_response(),
        |body| (StatusCode::UNAUTHORIZED, body).into_response(),
    ];
    for (reason, answer) in reasons.into_iter().enumerate() {
        let (app, mut body) = unstored(answer).await;
        let mut first = RawConnection::open(app.address).await;
        first.send(charge("k", &[], "2000")).await;
        timeout(PATIENCE, first.read_head()).await.expect("the head does not wait for the body");
        for piece in ["20", "00"] {
            body.send_data(piece.into()).await.unwrap();
            let chunk = timeout(PATIENCE, first.read_chunk()).await.expect("a piece does not wait");
            assert_eq!(chunk.unwrap(), piece.as_bytes());
        }
        let retry = app.post("k").await;
        match reason {
            1 => assert_eq!(retry.json()["code"], "outcome-unknown"),
            _ => assert_eq!(retry.text(), "run 2"),
        }
        drop(body);
        assert_eq!(first.read_chunk().await, None);
    }
}

#[tokio::test]
async fn axums_event_streams_pass() {
    let (sender, receiver) = mpsc::unbounded_channel::<&str>();
    let receiver = Arc::new(Mutex::new(Some(receiver)));
    let runs = Count::default();
    let counter = runs.clone();
    let handler = || async move {
        counter.add();
        let events = UnboundedReceiverStream::new(receiver.lock().unwrap().take().unwrap());
        Sse::new(events.map(|data| Ok::<_, Infallible>(Event::default().data(data))))
    };
    let address = serve(Router::new().route("/charges", post(handler)).layer(layer())).await;
    let mut first = RawConnection::open(address).await;
    first.send(charge("k", &[], "2000")).await;
    sender.send("paid").unwrap();
    assert_eq!(timeout(PATIENCE, first.read_head()).await.unwrap().status, 200);
    assert_eq!(first.read_chunk().await.unwrap(), b"data: paid\n\n");
    assert_not_kept(&exchange(address, charge("k", &[], "2000")).await, 200);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_first_caller_that_leaves_a_stream_changes_nothing() {
    let (app, mut body) = fed(layer(), "text/event-stream").await;
    let mut first = RawConnection::open(app.address).await;
    first.send(charge("k", &[], "2000")).await;
    first.read_head().await;
    first.reset();
    let until_closed = async { while body.send_data(":\n\n".into()).await.is_ok() {} };
    timeout(PATIENCE, until_closed).await.expect("the body of a caller that has left is dropped");
    assert_not_kept(&app.post("k").await, 202);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_never_stored() {
    let app = App::start(layer(), |run, _| {
        let end = if run == 1 { Err(io::Error::other("the disk is gone")) } else { Ok(Bytes::from("00")) };
        let pieces = [Ok(Bytes::from("20")), end];
        (StatusCode::CREATED, Body::from_stream(tokio_stream::iter(pieces))).into_response()
    })
    .await;
    let mut connection = RawConnection::open(app.address).await;
    connection.send(charge("k", &[], "2000")).await;
    let first = connection.read().await;
    assert_eq!((first.status, &first.json()["code"]), (500, &"response-incomplete".into()));
    assert_eq!(first.json()["retryable"], true);
    assert!(app.records().await.is_empty());
    connection.send(charge("k", &[], "2000")).await;
    let retry = connection.read().await;
    assert_eq!((retry.status, retry.text(), retry.is_replay()), (201, "2000", false));
    assert!(app.post("k").await.is_replay());
    assert_eq!(app.runs.get(), 2);
}

#[tokio::test]
async fn a_stream_that_breaks_off_after_the_limit_is_cut_and_not_run_again() {
    let (app, mut body) = fed(layer().with_response_body_limit(4), "application/octet-stream").await;
    let mut first = RawConnection::open(app.address).await;
    first.send(charge("k", &[], "2000")).await;
    body.send_data("12345".into()).await.unwrap();
    first.read_head().await;
    body.abort(io::Error::other("the disk is gone"));
    let rest = timeout(PATIENCE, first.read_to_end()).await.unwrap();
    assert!(!rest.ends_with(b"0\r\n\r\n"), "a body that broke off looks complete");
    assert_not_kept(&app.post("k").await, 202);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn a_body_that_is_too_slow_is_passed_on_and_not_kept() {
    let limit = Duration::from_millis(200);
    let (app, mut body) = fed(layer().with_response_body_timeout(limit), "application/octet-stream").await;
    let start = Instant::now();
    let mut first = RawConnection::open(app.address).await;
    first.send(charge("k", &[], "2000")).await;
    body.send_data("20".into()).await.unwrap();
    let head = timeout(PATIENCE, first.read_head()).await.expect("the head waits for the limit only");
    assert_eq!(head.status, 202);
    assert!(start.elapsed() >= limit);
    assert_eq!(first.read_chunk().await.unwrap(), b"20");
    body.send_data("00".into()).await.unwrap();
    assert_eq!(first.read_chunk().await.unwrap(), b"00");
    drop(body);
    assert_eq!(first.read_chunk().await, None);
    assert_not_kept(&app.post("k").await, 202);
    assert_eq!(app.runs.get(), 1);
}

#[tokio::test]
async fn without_a_key_nothing_is_collected() {
    let app = App::start(layer(), |_, _| {
        let first = tokio_stream::once(Ok::<_, Infallible>("first"));
        Body::from_stream(first.chain(tokio_stream::pending())).into_response()
    })
    .await;
    let mut connection = RawConnection::open(app.address).await;
    connection.send(request("POST", "/charges", &[], "2000")).await;
    let head = timeout(PATIENCE, connection.read_head()).await.expect("nobody waits for the end");
    assert_eq!(head.status, 200);
    assert_eq!(connection.read_chunk().await.unwrap(), b"first");
}

const PATIENCE: Duration = Duration::from_secs(5);
