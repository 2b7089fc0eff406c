//! The first response and its replay, byte for byte as they are on the wire.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use proptest::{prelude::*, test_runner::TestRunner};
use tower_http::compression::CompressionLayer;
use tower_idempotency::Idempotency;

use crate::support::{
    http::{Client, RawConnection, RawResponse, exchange, post as charge, post_chunked},
    served::{App, layer, serve},
};

/// The response of a handler with these header lines.
fn response(status: u16, lines: &[(&str, &[u8])], body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        response.headers_mut().append(name, HeaderValue::from_bytes(value).unwrap());
    }
    response
}

/// Sends a request twice on one connection. Returns the first response, after it was compared with the replay.
async fn replayed(app: &App, request: impl AsRef<[u8]>) -> RawResponse {
    let before = app.runs.get();
    let mut connection = RawConnection::open(app.address).await;
    connection.send(&request).await;
    let first = connection.read().await;
    connection.send(&request).await;
    assert_alike(&first, &connection.read().await, &["date"]);
    assert_eq!(app.runs.get(), before + 1);
    first
}

#[track_caller]
fn assert_alike(first: &RawResponse, replay: &RawResponse, differing: &[&str]) {
    assert!(!first.is_replay());
    assert_eq!(replay.header("idempotent-replayed"), Some("true"));
    let replay = replay.bytes_without(&[differing, &["idempotent-replayed"]].concat());
    assert_eq!(first.bytes_without(differing), replay);
}

#[tokio::test]
async fn every_byte_value_in_a_body() {
    let body: Vec<u8> = (0..=255).collect();
    let sent = body.clone();
    let app = App::start(layer(), move |_, _| response(201, &[], sent.clone())).await;
    assert_eq!(replayed(&app, charge("k", &[], "")).await.body, body);
}

#[tokio::test]
async fn repeated_headers_in_their_order() {
    let app = App::start(layer(), |_, _| {
        let cookies: [(&str, &[u8]); 3] =
            [("set-cookie", b"c=3; Path=/"), ("set-cookie", b"a=1"), ("set-cookie", b"b=2; Secure")];
        let links: [(&str, &[u8]); 3] =
            [("link", b"</2>; rel=next"), ("x-one", b"1"), ("link", b"</1>; rel=prev")];
        response(201, &[&cookies[..2], &links, &cookies[2..]].concat(), "x")
    })
    .await;
    let first = replayed(&app, charge("k", &[], "")).await;
    assert_eq!(first.values("set-cookie"), [&b"c=3; Path=/"[..], b"a=1", b"b=2; Secure"]);
    assert_eq!(first.values("link"), [b"</2>; rel=next", b"</1>; rel=prev"]);
}

#[tokio::test]
async fn header_values_that_are_no_text_or_empty() {
    let app = App::start(layer(), |_, _| {
        response(200, &[("x-raw", b"\x80\xff a\t\xe4"), ("x-empty", b""), ("etag", b"\"\xfc\"")], "x")
    })
    .await;
    let first = replayed(&app, charge("k", &[], "")).await;
    assert_eq!(first.values("x-raw"), [b"\x80\xff a\t\xe4"]);
    assert_eq!(first.values("x-empty"), [b""]);
    assert_eq!(first.values("etag"), [b"\"\xfc\""]);
}

#[tokio::test]
async fn statuses_without_a_body_and_unusual_ones() {
    let app = App::start(layer(), |run, _| match run {
        1 => response(204, &[("location", b"/charges/1")], ""),
        2 => response(304, &[("etag", b"\"v1\"")], ""),
        3 => response(299, &[], "unusual"),
        4 => response(303, &[("location", b"/charges/1")], ""),
        5 => response(499, &[], "also unusual"),
        _ => response(200, &[], ""),
    })
    .await;
    let first = replayed(&app, charge("1", &[], "")).await;
    assert_eq!((first.status, first.header("location")), (204, Some("/charges/1")));
    assert_eq!(first.header("content-length"), None);
    let first = replayed(&app, charge("2", &[], "")).await;
    assert_eq!((first.status, first.header("etag")), (304, Some("\"v1\"")));
    let first = replayed(&app, charge("3", &[], "")).await;
    assert_eq!((first.status, first.text()), (299, "unusual"));
    assert_eq!(replayed(&app, charge("4", &[], "")).await.status, 303);
    assert_eq!(replayed(&app, charge("5", &[], "")).await.text(), "also unusual");
    let first = replayed(&app, charge("6", &[], "")).await;
    assert_eq!((first.status, first.header("content-length")), (200, Some("0")));
}

#[tokio::test]
async fn the_answer_to_a_chunked_request() {
    let app =
        App::start(layer(), |run, body| response(201, &[], format!("run {run}: {} bytes", body.len()))).await;
    assert_eq!(replayed(&app, post_chunked("k", &["20", "00"])).await.text(), "run 1: 4 bytes");
}

#[tokio::test]
async fn a_length_that_the_handler_got_wrong_is_not_sent() {
    for wrong in [&b"3"[..], b"0", b"900"] {
        let app = App::start(layer(), |_, _| response(201, &[("content-length", wrong)], "2000")).await;
        let first = replayed(&app, charge("k", &[], "")).await;
        assert_eq!((first.header("content-length"), first.text()), (Some("4"), "2000"));
    }
}

#[tokio::test]
async fn headers_of_the_connection_are_not_replayed() {
    let app = App::start(layer(), |_, _| {
        let hop: [(&str, &[u8]); 8] = [
            ("connection", b"x-foo, X-Bar"),
            ("x-foo", b"1"),
            ("x-bar", b"2"),
            ("keep-alive", b"timeout=5"),
            ("proxy-connection", b"keep-alive"),
            ("transfer-encoding", b"chunked"),
            ("te", b"trailers"),
            ("upgrade", b"h2c"),
        ];
        response(201, &[&hop[..], &[("x-kept", b"3"), ("trailer", b"x-sum")]].concat(), "2000")
    })
    .await;
    let first = replayed(&app, charge("k", &[], "")).await;
    let names: Vec<_> = first.headers.iter().map(|(name, _)| String::from_utf8_lossy(name)).collect();
    assert_eq!(names, ["x-kept", "content-length", "date"]);
}

#[tokio::test]
async fn a_date_that_the_handler_set_is_kept() {
    let date = b"Thu, 01 Jan 1970 00:00:00 GMT";
    let app = App::start(layer(), |_, _| response(201, &[("date", date)], "x")).await;
    let (first, replay) = (app.post("k").await, app.post("k").await);
    assert_eq!(first.values("date"), [date]);
    assert_alike(&first, &replay, &[]);
}

#[tokio::test]
async fn headers_that_are_not_to_be_kept_are_missing_in_the_replay() {
    let layer = layer().add_header_not_kept(header::SET_COOKIE);
    let app = App::start(layer, |_, _| {
        let lines: [(&str, &[u8]); 4] =
            [("set-cookie", b"a=1"), ("set-cookie", b"b=2"), ("x-kept", b"1"), ("etag", b"\"1\"")];
        response(201, &lines, "x")
    })
    .await;
    let (first, replay) = (app.post("k").await, app.post("k").await);
    assert_eq!((first.values("set-cookie").len(), replay.values("set-cookie").len()), (2, 0));
    assert_eq!((replay.header("x-kept"), replay.header("etag")), (Some("1"), Some("\"1\"")));
    assert_eq!(app.runs.get(), 1);
}

fn accepting_gzip() -> Vec<u8> {
    charge("k", &[("accept-encoding", "gzip")], "")
}

#[tokio::test]
async fn a_response_that_the_handler_compressed() {
    let gzip = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let app =
        App::start(layer(), move |_, _| response(201, &[("content-encoding", b"gzip")], gzip.to_vec())).await;
    let first = replayed(&app, accepting_gzip()).await;
    assert_eq!((first.header("content-encoding"), &first.body[..]), (Some("gzip"), &gzip[..]));
}

#[tokio::test]
async fn compression_inside_and_outside() {
    let handler = || async { "2000 ".repeat(1000) };
    let app = Router::new().route("/charges", post(handler));
    let inside = app.clone().layer(CompressionLayer::new()).layer(layer());
    let outside = app.layer(layer()).layer(CompressionLayer::new());
    for app in [inside, outside] {
        let address = serve(app).await;
        let first = exchange(address, accepting_gzip()).await;
        assert_eq!(first.header("content-encoding"), Some("gzip"));
        assert_eq!(&first.body[..2], [0x1f, 0x8b]);
        assert!(first.body.len() < 200);
        assert_alike(&first, &exchange(address, accepting_gzip()).await, &["date"]);
    }
}

/// An application whose responses end with trailers, with and without a body before them.
async fn with_trailers() -> App {
    App::start(layer(), |run, _| {
        let trailers = || async {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", "7".parse().unwrap());
            trailers.append("x-sum", HeaderValue::from_bytes(b"\xff").unwrap());
            trailers.insert("x-end", "yes".parse().unwrap());
            Some(Ok(trailers))
        };
        let data = if run == 1 { Full::from("2000") } else { Full::default() };
        let mut response = Response::new(Body::new(data.with_trailers(trailers())));
        response.headers_mut().insert("trailer", "x-sum, x-end, x-never".parse().unwrap());
        response
    })
    .await
}

#[tokio::test]
async fn trailers_in_http1() {
    let app = with_trailers().await;
    for (key, body) in [("1", "2000"), ("2", "")] {
        let first = replayed(&app, charge(key, &[("te", "trailers")], "")).await;
        assert_eq!((first.header("trailer"), first.text()), (Some("x-sum, x-end"), body));
        let mut values = first.trailers.iter().map(|(_, value)| value.as_slice()).collect::<Vec<_>>();
        values.sort_unstable();
        assert_eq!(values, [&b"7"[..], b"yes", b"\xff"]);
    }
    let first = replayed(&app, charge("3", &[], "")).await;
    assert!(first.trailers.is_empty());
}

#[tokio::test]
async fn trailers_in_http2() {
    let app = with_trailers().await;
    let mut client = Client::http2(app.address).await;
    for key in ["1", "2"] {
        let mut answers = Vec::new();
        for _ in 0..2 {
            let request = hyper::Request::post(format!("http://{}/charges", app.address));
            let request = request.header("idempotency-key", key).body(Full::default()).unwrap();
            let (mut head, body) = client.send(request).await.into_parts();
            let replay = head.headers.remove("idempotent-replayed").is_some();
            head.headers.remove("date");
            assert_eq!(replay, !answers.is_empty());
            let trailers = body.trailers().cloned().unwrap();
            assert_eq!(
                (trailers.get_all("x-sum").iter().count(), &trailers["x-end"]),
                (2, &"yes".parse().unwrap())
            );
            answers.push((head.status, head.headers, body.to_bytes(), trailers));
        }
        assert_eq!(answers[0], answers[1]);
    }
}

/// What a handler is to answer.
#[derive(Clone, Debug)]
struct Planned {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

fn planned() -> impl Strategy<Value = Planned> {
    let name = prop_oneof![
        proptest::sample::select(&KNOWN[..]).prop_map(String::from),
        "[a-z!#$%&'*+.^_`|~0-9-]{1,12}"
    ];
    let byte = prop_oneof![Just(b'\t'), 0x20..=0x7eu8, 0x80..=0xffu8];
    let value = proptest::collection::vec(byte, 0..40);
    let status = prop_oneof![
        Just(200_u16),
        Just(201),
        Just(204),
        Just(299),
        Just(304),
        200..=208_u16,
        300..=306_u16,
        Just(404),
        Just(422)
    ];
    let lines = proptest::collection::vec((name, value), 0..24);
    let body = prop_oneof![Just(Vec::new()), proptest::collection::vec(any::<u8>(), 0..5000)];
    (status, lines, body).prop_map(|(status, lines, body)| {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(name, HeaderValue::from_bytes(&value).unwrap());
        }
        Planned { status: StatusCode::from_u16(status).unwrap(), headers, body }
    })
}

/// Serves responses as they are planned, by their key.
async fn serve_planned(plans: Arc<Mutex<HashMap<String, Planned>>>) -> std::net::SocketAddr {
    let handler = move |idempotency: Idempotency| async move {
        // A plan is good for one run.
        let Some(plan) = plans.lock().unwrap().remove(idempotency.key().as_str()) else {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        };
        (plan.status, plan.headers, Body::from(Bytes::from(plan.body))).into_response()
    };
    serve(Router::new().route("/charges", post(handler)).layer(layer())).await
}

/// The first response holds what was planned, but for what belongs to the connection.
fn check_first(first: &RawResponse, planned: &Planned) {
    assert_eq!(first.status, planned.status.as_u16());
    let nominated: Vec<String> = planned
        .headers
        .get_all("connection")
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(|name| String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase())
        .collect();
    for name in planned.headers.keys() {
        let connection = ["connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"];
        if connection.contains(&name.as_str()) || nominated.iter().any(|nominated| nominated == name.as_str())
        {
            assert!(first.values(name.as_str()).is_empty(), "{name}");
        } else if name != "content-length" {
            assert_eq!(first.values(name.as_str()), values(&planned.headers, name.as_str()), "{name}");
        }
    }
    if !matches!(first.status, 204 | 205 | 304) {
        assert_eq!(first.body, planned.body);
    }
}

#[test]
fn arbitrary_headers_and_bodies() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let plans = Arc::new(Mutex::new(HashMap::new()));
    let address = runtime.block_on(serve_planned(Arc::clone(&plans)));
    let keys = std::cell::Cell::new(0);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() });
    let case = |plan: Planned| {
        keys.set(keys.get() + 1);
        let key = format!("case-{}", keys.get());
        plans.lock().unwrap().insert(key.clone(), plan.clone());
        let (first, replay) = runtime.block_on(async {
            let mut connection = RawConnection::open(address).await;
            connection.send(charge(&key, &[], "")).await;
            let first = connection.read().await;
            connection.send(charge(&key, &[], "")).await;
            (first, connection.read().await)
        });
        check_first(&first, &plan);
        let differing =
            if first.values("date") == values(&plan.headers, "date") { &[][..] } else { &["date"] };
        assert_alike(&first, &replay, differing);
        Ok(())
    };
    runner.run(&planned(), case).unwrap();
}

fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a [u8]> {
    headers.get_all(name).iter().map(|value| value.as_bytes().trim_ascii()).collect()
}

const KNOWN: [&str; 15] = [
    "set-cookie",
    "link",
    "etag",
    "date",
    "location",
    "content-type",
    "content-length",
    "connection",
    "keep-alive",
    "transfer-encoding",
    "upgrade",
    "x-one",
    "vary",
    "cache-control",
    "content-encoding",
];
