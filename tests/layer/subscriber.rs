//! Events reach the subscriber that the server runs with, although the work is done in other tasks.

use std::time::{Duration, Instant};

use axum::{
    Router,
    extract::Request,
    http::{Method, StatusCode},
    middleware::{Next, from_fn},
    routing::post,
};
use tokio::time::sleep;
use tower_idempotency::Reaper;
use tracing::{Instrument, instrument::WithSubscriber};

use crate::support::{
    direct::{charge, counting, request, send},
    http::{exchange, post as raw_charge},
    log::Log,
    served::{layer, serve},
};

/// The subscriber of the server, and not that of the process, gets every event.
#[tokio::test]
async fn events_of_handler_and_layer_reach_the_subscriber_of_the_server() {
    let log = Log::default();
    let handler = || async {
        tracing::info!("in the handler");
        StatusCode::CREATED
    };
    let subscriber = log.subscriber();
    // Around all that the server does for a request.
    let subscribed =
        from_fn(move |request: Request, next: Next| next.run(request).with_subscriber(subscriber.clone()));
    let app = Router::new().route("/charges", post(handler)).layer(layer()).layer(subscribed);
    let address = serve(app).await;
    for _ in 0..2 {
        exchange(address, raw_charge("k", &[], "2000")).await;
    }
    for event in ["in the handler", "performed", "replay"] {
        assert_eq!(log.lines(&[event]).len(), 1, "{event}: {:?}", log.lines(&[]));
    }
}

#[tokio::test]
async fn the_span_travels_with_the_subscriber() {
    let log = Log::default();
    let (app, _) = counting(layer());
    let work = async {
        let span = tracing::info_span!("around", request = 7);
        send(&app, charge("k")).instrument(span).await
    };
    assert_eq!(work.with_subscriber(log.subscriber()).await.status, StatusCode::CREATED);
    let performed = log.lines(&["performed"]);
    assert!(performed.len() == 1 && performed[0].contains("around{request=7}"), "{performed:?}");
}

#[tokio::test]
async fn a_background_task_has_the_subscriber_of_its_caller() {
    let log = Log::default();
    let layer = layer().with_reaper(Reaper::every(Duration::from_millis(10), 9));
    let (app, _) = counting(layer.clone().with_derived_key(Duration::from_millis(20)));
    let keyless = || request(Method::POST, None, "1");
    async { send(&app, keyless()).await }.with_subscriber(log.subscriber()).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while log.lines(&["purged"]).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", log.lines(&[]));
        sleep(Duration::from_millis(10)).await;
    }
}
