//! Closures of the application that panic: every connection lives on, and no key stays claimed.

use axum::{
    Router,
    http::{Method, StatusCode},
    routing::post,
};
use bytes::Bytes;
use http_body_util::Full;
use tower_idempotency::{
    ConsumerExtractor, Directive, Fingerprinter, IdempotencyLayer, Rejection, RejectionCode, Representation,
    ResultPolicy,
    layer::StoredRepresentation,
    store::{RecordFilter, RecordState},
};

use crate::support::{
    direct::{charge, counting, request, send},
    http::{Client, RawConnection, post as raw_charge, request as raw_request},
    served::{layer, serve},
};

fn broken_renderer(_: &Rejection) -> http::Response<Bytes> {
    panic!("the renderer breaks")
}

type Layers = Vec<(&'static str, IdempotencyLayer)>;

/// Layers one of whose closures panics before the handler runs.
fn broken_before_the_handler() -> Layers {
    let renderer = || layer().with_renderer(broken_renderer);
    let nobody = ConsumerExtractor::from_fn(|_| None);
    vec![
        ("consumer", layer().with_consumer(ConsumerExtractor::from_fn(|_| panic!("the extractor breaks")))),
        ("fingerprint", layer().with_fingerprint(Fingerprinter::custom(1, |_, _| panic!("it breaks")))),
        ("renderer of a 403", renderer().with_consumer(nobody)),
        ("renderer of a 413", renderer().with_request_body_limit(1)),
    ]
}

#[tokio::test]
async fn a_closure_that_panics_is_a_500_and_nothing_is_claimed() {
    for (name, layer) in broken_before_the_handler() {
        let handle = layer.handle();
        let (app, runs) = counting(layer.with_policy(ResultPolicy::at_most_once()));
        for _ in 0..2 {
            let answer = send(&app, charge("k")).await;
            assert_eq!(answer.rejection, Some(RejectionCode::Internal), "{name}: {answer:?}");
            answer.assert_refused(RejectionCode::Internal);
        }
        assert!(handle.list(RecordFilter::All, 9).await.unwrap().is_empty(), "{name}");
        assert_eq!(runs.get(), 0, "{name}");
    }
}

#[tokio::test]
async fn after_a_closure_that_panics_a_connection_of_http1_goes_on() {
    for (name, layer) in broken_before_the_handler() {
        let app = Router::new().route("/charges", post(|| async { "done" }));
        let address = serve(app.layer(layer)).await;
        let mut connection = RawConnection::open(address).await;
        for _ in 0..2 {
            connection.send(raw_charge("k", &[], "2000")).await;
            let answer = connection.read().await;
            assert_eq!((answer.status, &answer.json()["code"]), (500, &"internal".into()), "{name}");
            connection.send(raw_request("POST", "/charges", &[], "2000")).await;
            assert_eq!(connection.read().await.text(), "done", "{name}");
        }
    }
}

#[tokio::test]
async fn after_a_closure_that_panics_a_connection_of_http2_goes_on() {
    for (name, layer) in broken_before_the_handler() {
        let app = Router::new().route("/charges", post(|| async { "done" }));
        let address = serve(app.layer(layer)).await;
        let mut client = Client::http2(address).await;
        let url = format!("http://{address}/charges");
        for _ in 0..2 {
            let keyed = hyper::Request::post(&url).header("idempotency-key", "k");
            let answer = client.send(keyed.body(Full::from("2000")).unwrap()).await;
            assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR, "{name}");
            let plain = hyper::Request::post(&url).body(Full::from("2000")).unwrap();
            assert_eq!(client.send(plain).await.status(), StatusCode::OK, "{name}");
        }
    }
}

#[tokio::test]
async fn a_renderer_that_panics_takes_no_refusal_of_the_layer_with_it() {
    let (app, runs) = counting(layer().required().with_renderer(broken_renderer));
    assert_eq!(send(&app, charge("k")).await.status, StatusCode::CREATED);
    for refused in
        [request(Method::POST, None, "2000"), charge("a,b"), request(Method::POST, Some("k"), "3000")]
    {
        send(&app, refused).await.assert_refused(RejectionCode::Internal);
    }
    assert!(send(&app, charge("k")).await.is_replay());
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_closure_that_panics_after_the_handler_leaves_no_key_in_progress() {
    let represented = || async { (StatusCode::CREATED, axum::Extension(Representation::new("1"))) };
    let render = |_: StoredRepresentation| async {
        if true {
            panic!("the rendering breaks");
        }
        Ok::<_, std::io::Error>(http::Response::new(Bytes::new()))
    };
    let policy = ResultPolicy::from_fn(|_| -> Directive { panic!("the policy breaks") });
    for (name, layer, expected) in [
        ("policy", layer().with_policy(policy), RejectionCode::Internal),
        ("representation", layer().with_representation(render), RejectionCode::RepresentationUnrenderable),
    ] {
        let handle = layer.handle();
        let app = Router::new().route("/charges", post(represented)).layer(layer);
        send(&app, charge("k")).await.assert_refused(expected);
        let records = handle.list(RecordFilter::All, 9).await.unwrap();
        let in_progress = |state: &RecordState| matches!(state, RecordState::InProgress { .. });
        assert!(!records.iter().any(|record| in_progress(&record.state)), "{name}: {records:?}");
    }
}

#[tokio::test]
async fn a_closure_of_an_inner_layer_that_panics_does_not_end_the_outer_one() {
    let broken = layer().with_consumer(ConsumerExtractor::from_fn(|_| panic!("the extractor breaks")));
    let (app, runs) = counting(broken);
    let outer = layer();
    let handle = outer.handle();
    let app = app.layer(outer);
    send(&app, charge("k")).await.assert_refused(RejectionCode::Internal);
    assert!(handle.list(RecordFilter::All, 9).await.unwrap().is_empty());
    assert_eq!(runs.get(), 0);
}
