//! gRPC services of tonic behind the layer, over HTTP/2: judged by their status, and refused with one.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::Request as HttpRequest,
    http::{HeaderMap, StatusCode, header, uri::PathAndQuery},
    response::Response as HttpResponse,
    routing::post,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    server::Grpc as Server,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_idempotency::{
    Directive, IdempotencyLayer, Rejection, RejectionCode, ResultPolicy, store::RecordFilter,
};

use crate::support::{
    direct::{charge, send},
    served::{Count, layer, serve},
};

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Amount {
    #[prost(uint64, tag = "1")]
    cents: u64,
}

type Codec = ProstCodec<Amount, Amount>;
type Reply = Result<Response<Amount>, Status>;

/// A bank with one method of each kind. `Pay` gets the number of the run.
struct Bank {
    address: SocketAddr,
    runs: Count,
}

impl Bank {
    async fn start(layer: IdempotencyLayer, pay: fn(usize, u64) -> Reply) -> Self {
        Self::start_slow(layer, Duration::ZERO, pay).await
    }

    async fn start_slow(layer: IdempotencyLayer, wait: Duration, pay: fn(usize, u64) -> Reply) -> Self {
        let runs = Count::default();
        let counter = runs.clone();
        let unary = service_fn(move |request: HttpRequest| {
            let counter = counter.clone();
            let pay = service_fn(move |request: Request<Amount>| {
                let run = counter.add();
                async move {
                    tokio::time::sleep(wait).await;
                    pay(run, request.into_inner().cents)
                }
            });
            async move { Ok::<_, Infallible>(Server::new(Codec::default()).unary(pay, request).await) }
        });
        let counter = runs.clone();
        let collecting = service_fn(move |request: HttpRequest| {
            let counter = counter.clone();
            let sum = service_fn(move |request: Request<Streaming<Amount>>| {
                counter.add();
                async move {
                    let (mut amounts, mut cents) = (request.into_inner(), 0);
                    while let Some(amount) = amounts.next().await {
                        cents += amount?.cents;
                    }
                    Ok::<_, Status>(Response::new(Amount { cents }))
                }
            });
            async move { Ok::<_, Infallible>(Server::new(Codec::default()).client_streaming(sum, request).await) }
        });
        let router = Router::new()
            .route_service("/bank.Bank/Pay", unary)
            .route_service("/bank.Bank/Collect", collecting)
            .fallback(|| async { Status::unimplemented("no such method").into_http::<Body>() })
            .layer(layer);
        Self { address: serve(router).await, runs }
    }

    async fn pay(&self, key: &str, cents: u64) -> Reply {
        unary(self.address, "/bank.Bank/Pay", key, cents).await
    }
}

async fn client(address: SocketAddr) -> tonic::client::Grpc<Channel> {
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    client
}

fn keyed<T>(key: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if !key.is_empty() {
        request.metadata_mut().insert("idempotency-key", key.parse().unwrap());
    }
    request
}

async fn unary(address: SocketAddr, path: &'static str, key: &str, cents: u64) -> Reply {
    let path = PathAndQuery::from_static(path);
    client(address).await.unary(keyed(key, Amount { cents }), path, Codec::default()).await
}

fn doubled(_: usize, cents: u64) -> Reply {
    let mut reply = Response::new(Amount { cents: cents * 2 });
    reply.metadata_mut().insert("receipt", "r1".parse().unwrap());
    Ok(reply)
}

fn is_replay<T>(reply: &Response<T>) -> bool {
    reply.metadata().contains_key("idempotent-replayed")
}

#[tokio::test]
async fn a_call_runs_once_and_its_reply_is_replayed() {
    let bank = Bank::start(layer(), doubled).await;
    let (first, retry) = (bank.pay("k", 7).await.unwrap(), bank.pay("k", 7).await.unwrap());
    assert_eq!((first.get_ref(), is_replay(&first)), (&Amount { cents: 14 }, false));
    assert_eq!((retry.get_ref(), is_replay(&retry)), (&Amount { cents: 14 }, true));
    assert_eq!(first.metadata().get("receipt"), retry.metadata().get("receipt"));
    assert_eq!(first.metadata().get("grpc-status"), retry.metadata().get("grpc-status"));
    assert_eq!(bank.runs.get(), 1);
    assert!(!is_replay(&bank.pay("", 7).await.unwrap()));
    assert_eq!(bank.runs.get(), 2);
}

#[tokio::test]
async fn an_unavailable_call_is_no_result() {
    let bank = Bank::start(layer(), |run, cents| match run {
        1 => Err(Status::unavailable("not now")),
        _ => doubled(run, cents),
    })
    .await;
    assert_eq!(bank.pay("k", 7).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(bank.pay("k", 7).await.unwrap().get_ref().cents, 14);
    assert!(is_replay(&bank.pay("k", 7).await.unwrap()));
    assert_eq!(bank.runs.get(), 2);
}

/// Calls with the amount as the status. Returns the codes that come to a call and to its retry, and the runs.
async fn called_twice(policy: ResultPolicy, code: i32) -> (Code, Code, usize) {
    let layer = layer().with_policy(policy);
    let bank = Bank::start(layer, |_, cents| {
        let code = Code::from(i32::try_from(cents).unwrap());
        Err(Status::new(code, "as you like, 100 %"))
    })
    .await;
    let cents = u64::try_from(code).unwrap();
    let first = bank.pay("k", cents).await.unwrap_err();
    let retry = bank.pay("k", cents).await.unwrap_err();
    (first.code(), retry.code(), bank.runs.get())
}

#[tokio::test]
async fn statuses_about_the_request_are_results_and_others_are_not() {
    let stored = [3, 5, 6, 9, 11];
    for code in 1..=16 {
        let (first, retry, runs) = called_twice(ResultPolicy::default(), code).await;
        assert_eq!((first, retry), (Code::from(code), Code::from(code)));
        assert_eq!(runs, if stored.contains(&code) { 1 } else { 2 }, "{first:?}");
    }
}

#[tokio::test]
async fn presets_judge_by_the_grpc_status() {
    for code in 1..=16 {
        assert_eq!(called_twice(ResultPolicy::success_only(), code).await.2, 2, "{code}");
        let (first, retry, runs) = called_twice(ResultPolicy::at_most_once(), code).await;
        let released =
            matches!(first, Code::PermissionDenied | Code::Unauthenticated | Code::ResourceExhausted);
        assert_eq!(runs, if released { 2 } else { 1 }, "{first:?}");
        // A time-out inside the layer ends so, and the handler may have done its work by then.
        assert_eq!(retry, if first == Code::Cancelled { Code::Unknown } else { first });
    }
}

#[tokio::test]
async fn a_method_that_the_node_does_not_have_is_no_result() {
    for policy in [ResultPolicy::at_most_once(), ResultPolicy::from_fn(|_| Directive::Store)] {
        let layer = layer().with_policy(policy);
        let old = serve(
            Router::new()
                .fallback(|| async { Status::unimplemented("no such method").into_http::<Body>() })
                .layer(layer.clone()),
        )
        .await;
        let status = unary(old, "/bank.Bank/Pay", "k", 7).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        let updated = Bank::start(layer, doubled).await;
        assert_eq!(updated.pay("k", 7).await.unwrap().get_ref().cents, 14);
    }
}

#[tokio::test]
async fn a_duplicate_is_aborted_and_comes_back_later() {
    let bank = Bank::start_slow(layer(), Duration::from_millis(500), doubled).await;
    let first = bank.pay("k", 7);
    let duplicate = async {
        while bank.runs.get() == 0 {
            tokio::task::yield_now().await;
        }
        bank.pay("k", 7).await
    };
    let (first, duplicate) = tokio::join!(first, duplicate);
    assert_eq!(first.unwrap().get_ref().cents, 14);
    let status = duplicate.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().starts_with("in-progress: The first request"), "{}", status.message());
    assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    assert_eq!(bank.runs.get(), 1);
}

#[tokio::test]
async fn refusals_are_grpc_statuses_whatever_the_renderer() {
    let text = |rejection: &Rejection| {
        let mut response = HttpResponse::new(Bytes::from(rejection.code().as_str()));
        *response.status_mut() = rejection.status();
        response
    };
    for layer in [layer().required(), layer().required().with_renderer(text)] {
        let bank = Bank::start(layer, doubled).await;
        let missing = bank.pay("", 7).await.unwrap_err();
        assert_eq!(missing.code(), Code::InvalidArgument);
        assert!(missing.message().starts_with("key-missing: "), "{}", missing.message());
        assert_eq!(missing.metadata().get("grpc-retry-pushback-ms").unwrap(), "-1");
        bank.pay("k", 7).await.unwrap();
        let reused = bank.pay("k", 8).await.unwrap_err();
        assert_eq!((reused.code(), bank.runs.get()), (Code::InvalidArgument, 1));
        assert!(reused.message().starts_with("key-reused: "), "{}", reused.message());
    }
}

#[tokio::test]
async fn a_renderer_that_answers_grpc_has_its_way() {
    let renderer = |_: &Rejection| {
        let response =
            HttpResponse::builder().header("content-type", "application/grpc").header("grpc-status", "9");
        response.body(Bytes::new()).unwrap()
    };
    let bank = Bank::start(layer().required().with_renderer(renderer), doubled).await;
    assert_eq!(bank.pay("", 7).await.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_panic_is_an_internal_status_and_no_result() {
    let bank = Bank::start(layer(), |run, cents| match run {
        1 => panic!("the handler breaks"),
        _ => doubled(run, cents),
    })
    .await;
    let status = bank.pay("k", 7).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("handler-panicked: "), "{}", status.message());
    assert_eq!(bank.pay("k", 7).await.unwrap().get_ref().cents, 14);
}

#[tokio::test]
async fn client_streams_are_performed_once() {
    let bank = Bank::start(layer(), doubled).await;
    for is_retry in [false, true] {
        let amounts = tokio_stream::iter([1, 2, 3].map(|cents| Amount { cents }));
        let path = PathAndQuery::from_static("/bank.Bank/Collect");
        let mut client = client(bank.address).await;
        let reply: Response<Amount> =
            client.client_streaming(keyed("k", amounts), path, Codec::default()).await.unwrap();
        assert_eq!((reply.get_ref().cents, is_replay(&reply)), (6, is_retry));
    }
    assert_eq!(bank.runs.get(), 1);
}

/// A server whose method streams what the test sends.
async fn streaming(layer: IdempotencyLayer) -> (SocketAddr, mpsc::UnboundedSender<Result<Amount, Status>>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let receiver = Arc::new(Mutex::new(Some(receiver)));
    let service = service_fn(move |request: HttpRequest| {
        let receiver = Arc::clone(&receiver);
        let stream = service_fn(move |_: Request<Amount>| {
            let receiver = receiver.lock().unwrap().take();
            async move {
                let receiver = receiver.ok_or_else(|| Status::internal("runs once"))?;
                Ok::<_, Status>(Response::new(UnboundedReceiverStream::new(receiver)))
            }
        });
        async move { Ok::<_, Infallible>(Server::new(Codec::default()).server_streaming(stream, request).await) }
    });
    (serve(Router::new().route_service("/bank.Bank/List", service).layer(layer)).await, sender)
}

async fn list(address: SocketAddr) -> Result<Response<Streaming<Amount>>, Status> {
    let path = PathAndQuery::from_static("/bank.Bank/List");
    client(address).await.server_streaming(keyed("k", Amount { cents: 1 }), path, Codec::default()).await
}

#[tokio::test]
async fn a_server_stream_that_ends_soon_is_replayed() {
    let (address, sender) = streaming(layer()).await;
    for cents in [1, 2, 3] {
        sender.send(Ok(Amount { cents })).unwrap();
    }
    drop(sender);
    for is_retry in [false, true] {
        let reply = list(address).await.unwrap();
        assert_eq!(is_replay(&reply), is_retry);
        let amounts = reply.into_inner().map(|amount| amount.unwrap().cents).collect::<Vec<_>>().await;
        assert_eq!(amounts, [1, 2, 3]);
    }
}

#[tokio::test]
async fn a_server_stream_that_takes_long_is_passed_on_and_not_kept() {
    let layer = layer().with_response_body_timeout(Duration::from_millis(100));
    let (address, sender) = streaming(layer).await;
    sender.send(Ok(Amount { cents: 1 })).unwrap();
    let mut amounts = list(address).await.unwrap().into_inner();
    for cents in [1, 2, 3] {
        let amount = timeout(Duration::from_secs(5), amounts.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(amount.cents, cents);
        sender.send(Ok(Amount { cents: cents + 1 })).unwrap();
    }
    let retry = list(address).await.unwrap_err();
    assert_eq!(retry.code(), Code::AlreadyExists);
    assert!(retry.message().starts_with("response-not-kept: "), "{}", retry.message());
}

#[tokio::test]
async fn a_server_stream_that_fails_is_no_result() {
    let layer = layer();
    let (address, sender) = streaming(layer.clone()).await;
    sender.send(Ok(Amount { cents: 1 })).unwrap();
    sender.send(Err(Status::unavailable("not now"))).unwrap();
    let mut amounts = list(address).await.unwrap().into_inner();
    assert_eq!(amounts.next().await.unwrap().unwrap().cents, 1);
    assert_eq!(amounts.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert!(layer.handle().list(RecordFilter::All, 1).await.unwrap().is_empty());
}

/// An application that answers with these bytes and trailers, without tonic.
fn answering(
    layer: IdempotencyLayer,
    content_type: &'static str,
    body: Vec<u8>,
    status: &'static str,
) -> (Router, Count) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |_: Bytes| async move {
        counter.add();
        let trailers = async move {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.parse().unwrap());
            Some(Ok(trailers)).filter(|_| !status.is_empty())
        };
        let body = Full::from(Bytes::from(body)).with_trailers(trailers);
        ([(header::CONTENT_TYPE, content_type)], Body::new(body))
    };
    (Router::new().route("/charges", post(handler)).layer(layer), runs)
}

const MESSAGE: &[u8] = b"\0\0\0\0\x02\x08\x07";

#[tokio::test]
async fn a_status_in_the_trailers_counts_after_a_message() {
    for (status, expected) in [("0", 1), ("14", 2), ("13", 2), ("3", 1), ("what", 2), ("99", 2)] {
        for content_type in ["application/grpc", "Application/gRPC+proto; v=1", "application/grpc+json"] {
            let (app, runs) = answering(layer(), content_type, MESSAGE.to_vec(), status);
            for _ in 0..2 {
                assert_eq!(send(&app, charge("k")).await.body, MESSAGE);
            }
            assert_eq!(runs.get(), expected, "{status} {content_type}");
        }
    }
}

#[tokio::test]
async fn a_response_without_its_status_is_broken() {
    for (content_type, body) in
        [("application/grpc", MESSAGE), ("application/grpc-web", MESSAGE), ("application/grpc", b"")]
    {
        let (app, runs) = answering(layer(), content_type, body.to_vec(), "");
        for _ in 0..2 {
            assert_eq!(send(&app, charge("k")).await.rejection, Some(RejectionCode::ResponseIncomplete));
        }
        assert_eq!(runs.get(), 2);
    }
    // An answer that is no gRPC at all, to a request that is.
    let (app, _) = answering(layer(), "text/plain", b"fine".to_vec(), "");
    let mut request = charge("k");
    request.headers_mut().insert(header::CONTENT_TYPE, "application/grpc".parse().unwrap());
    let answer = send(&app, request).await;
    assert_eq!((answer.status, &answer.headers["grpc-status"]), (StatusCode::OK, &"13".parse().unwrap()));
    assert!(answer.body.is_empty() && answer.headers["content-type"] == "application/grpc");
}

#[tokio::test]
async fn grpc_web_has_its_status_in_the_body() {
    let ended = |status: &str| {
        let trailers = format!("grpc-message:no\r\nGrpc-Status: {status}\r\n");
        let length = u32::try_from(trailers.len()).unwrap().to_be_bytes();
        [MESSAGE, b"\x80", &length, trailers.as_bytes()].concat()
    };
    for (status, expected) in [("0", 1), ("14", 2), ("3", 1)] {
        let (app, runs) = answering(layer(), "application/grpc-web+proto", ended(status), "");
        for _ in 0..2 {
            assert_eq!(send(&app, charge("k")).await.body, ended(status));
        }
        assert_eq!(runs.get(), expected, "{status}");
    }
    // A message in Base64, and trailers after it with padding of their own: status 0, then status 14.
    for (text, expected) in
        [("AAAAAAIIBw==gAAAAA9ncnBjLXN0YXR1czowDQo=", 1), ("AAAAAAIIBw==gAAAABBncnBjLXN0YXR1czoxNA0K", 2)]
    {
        let (app, runs) = answering(layer(), "application/grpc-web-text", text.as_bytes().to_vec(), "");
        for _ in 0..2 {
            assert_eq!(send(&app, charge("k")).await.body, text);
        }
        assert_eq!(runs.get(), expected, "{text}");
    }
}

#[tokio::test]
async fn trailers_come_with_replays_over_http2() {
    let (app, runs) = answering(layer(), "application/grpc", MESSAGE.to_vec(), "0");
    let address = serve(app).await;
    let mut client = crate::support::http::Client::http2(address).await;
    for is_retry in [false, true] {
        let request = hyper::Request::post(format!("http://{address}/charges"))
            .header("idempotency-key", "k")
            .header("content-type", "application/grpc");
        let (head, body) = client.send(request.body(Full::from(MESSAGE)).unwrap()).await.into_parts();
        assert_eq!(head.headers.contains_key("idempotent-replayed"), is_retry);
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        assert_eq!(body.to_bytes(), MESSAGE);
    }
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_service_outside_of_axum_is_refused_with_statuses_too() {
    let inner = service_fn(|_| async { Ok::<_, Infallible>(HttpResponse::new(Body::empty())) });
    let service = ServiceBuilder::new().layer(layer().required()).service(inner);
    let mut request = charge("k");
    request.headers_mut().remove("idempotency-key");
    request.headers_mut().insert(header::CONTENT_TYPE, "application/grpc-web+proto".parse().unwrap());
    let answer = service.oneshot(request).await.unwrap();
    assert_eq!((answer.status(), &answer.headers()["grpc-status"]), (StatusCode::OK, &"3".parse().unwrap()));
    assert_eq!(answer.headers()["content-type"], "application/grpc-web+proto");
    assert!(answer.extensions().get::<Rejection>().is_some());
    assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
}
