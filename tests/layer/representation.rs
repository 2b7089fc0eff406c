//! Responses of which a representation is stored, without a socket.

use std::{
    convert::Infallible,
    future::{pending, ready},
    io,
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
    routing::post,
};
use tower::BoxError;
use tower_idempotency::{
    Directive, IdempotencyLayer, RejectionCode, Representation, Tx,
    layer::StoredRepresentation,
    store::{Record, Resolution, StoredBody, StoredResponse},
};

use crate::support::{
    direct::{
        abandon, answering, answering_after, begin, charge, claim, fingerprint_of_charge, identity, request,
        send, with_store,
    },
    served::{Count, layer},
    sqlite::SqliteFile,
};

#[tokio::test]
async fn the_first_response_is_rendered_and_equals_its_replays() {
    let rendered = Count::default();
    let counter = rendered.clone();
    let layer = layer().with_representation(move |stored: StoredRepresentation| {
        counter.add();
        ready(page(&stored))
    });
    let handle = layer.handle();
    let (app, runs) = represented(layer);
    let first = send(&app, charge("k")).await;
    let replays = [send(&app, charge("k")).await, send(&app, charge("k")).await];

    assert_eq!((first.status, &first.body[..]), (StatusCode::CREATED, &b"id 1 of [anonymous]"[..]));
    assert_eq!(first.headers["x-page"], "1");
    assert_eq!(first.headers.get("x-handler"), None, "headers of the handler are not sent");
    for replay in &replays {
        first.assert_same_replay(replay);
    }
    assert_eq!((runs.get(), rendered.get()), (1, 3));

    let (consumer, key) = identity();
    let record = handle.get(&consumer, &key).await.unwrap().unwrap();
    let stored = StoredResponse::represented(StatusCode::CREATED, Representation::new("id 1"));
    assert_eq!(record.response().unwrap(), Some(stored));
}

#[tokio::test]
async fn headers_of_the_connection_and_those_not_kept_are_in_no_rendered_response() {
    let render = |stored: StoredRepresentation| async move {
        let mut response = page(&stored)?;
        for name in ["connection", "content-length", "x-secret"] {
            response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static("7"));
        }
        Ok::<_, Infallible>(response)
    };
    let layer = layer().with_representation(render).add_header_not_kept(HeaderName::from_static("x-secret"));
    let (app, _) = represented(layer);
    let first = send(&app, charge("k")).await;
    let names = first.headers.keys().filter(|name| **name != header::CONTENT_LENGTH).collect::<Vec<_>>();
    assert_eq!(names, ["x-page"]);
    assert_ne!(first.headers.get(header::CONTENT_LENGTH).unwrap(), "7");
    first.assert_same_replay(&send(&app, charge("k")).await);
}

#[tokio::test]
async fn a_renderer_that_fails_is_500_and_the_handler_never_runs_again() {
    type Fail = fn() -> Result<(), BoxError>;
    let fails: [Fail; 2] =
        [|| Err(io::Error::other("the database is away").into()), || panic!("the renderer breaks")];
    for fail in fails {
        let calls = Count::default();
        let counter = calls.clone();
        let layer = layer().with_representation(move |stored: StoredRepresentation| {
            let call = counter.add();
            async move {
                if call < 3 {
                    fail()?;
                }
                Ok::<_, BoxError>(page(&stored)?)
            }
        });
        assert_recovers(layer, calls).await;
    }
}

#[tokio::test]
async fn a_renderer_that_hangs_is_500_after_the_store_time_out() {
    let calls = Count::default();
    let counter = calls.clone();
    let render = move |stored: StoredRepresentation| {
        let call = counter.add();
        async move {
            if call < 3 {
                pending::<()>().await;
            }
            page(&stored)
        }
    };
    let layer = layer().with_store_timeout(Duration::from_millis(100)).with_representation(render);
    assert_recovers(layer, calls).await;
}

#[tokio::test]
async fn without_a_renderer_the_record_is_completed_all_the_same() {
    let (store, plain) = with_store();
    let (app, runs) = represented(plain);
    for _ in 0..2 {
        send(&app, charge("k")).await.assert_refused(RejectionCode::RepresentationUnrenderable);
    }
    assert_eq!(runs.get(), 1);

    let (app, runs) = represented(IdempotencyLayer::new(store).with_representation(render));
    let answer = send(&app, charge("k")).await;
    assert!(answer.is_replay() && answer.body == "id 1 of [anonymous]");
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn what_is_not_stored_or_not_guarded_is_sent_as_it_is() {
    let (app, runs) = answering(layer().with_representation(render), |run| match run {
        1 => (StatusCode::BAD_GATEWAY, id(run), "upstream").into_response(),
        2 => (Extension(Directive::Release), id(run), "released").into_response(),
        3 => (id(run), "no key").into_response(),
        _ => (Extension(Directive::Hold), id(run), "held").into_response(),
    });
    assert_eq!(send(&app, charge("k")).await.body, "upstream");
    assert_eq!(send(&app, charge("k")).await.body, "released");
    assert_eq!(send(&app, request(http::Method::POST, None, "2000")).await.body, "no key");
    assert_eq!(send(&app, charge("k")).await.body, "held");
    send(&app, charge("k")).await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(runs.get(), 4);
}

#[tokio::test]
async fn a_directive_stores_the_representation_of_a_failure() {
    let (app, runs) = answering(layer().with_representation(render), |run| {
        (StatusCode::BAD_GATEWAY, Extension(Directive::Store), id(run)).into_response()
    });
    let first = send(&app, charge("k")).await;
    assert_eq!((first.status, &first.body[..]), (StatusCode::BAD_GATEWAY, &b"id 1 of [anonymous]"[..]));
    first.assert_same_replay(&send(&app, charge("k")).await);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_body_beside_the_representation_does_not_matter() {
    let (app, runs) = answering(layer().with_response_body_limit(8).with_representation(render), |run| {
        (id(run), "more than eight bytes").into_response()
    });
    let first = send(&app, charge("k")).await;
    assert_eq!(first.body, "id 1 of [anonymous]");
    first.assert_same_replay(&send(&app, charge("k")).await);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_representation_over_the_limit_is_rendered_once_and_not_kept() {
    let (app, runs) = represented(layer().with_response_body_limit(3).with_representation(render));
    assert_eq!(send(&app, charge("k")).await.body, "id 1 of [anonymous]");
    send(&app, charge("k")).await.assert_refused(RejectionCode::ResponseNotKept);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn an_outer_layer_stores_what_was_rendered() {
    let (app, runs) = represented(layer().with_representation(render));
    let app = app.layer(layer());
    let first = send(&app, charge("k")).await;
    assert_eq!(first.body, "id 1 of [anonymous]");
    first.assert_same_replay(&send(&app, charge("k")).await);
    assert_eq!(runs.get(), 1);
}

#[tokio::test]
async fn a_record_that_another_attempt_completed_is_rendered() {
    let (store, layer) = with_store();
    let wait = Duration::from_millis(300);
    let (app, runs) = answering_after(layer.with_representation(render), wait, |_| id(1).into_response());
    let first = begin(&app, charge("k"), &runs).await;
    let (consumer, key) = identity();
    store.evict(&consumer, &key).await.unwrap();
    let other = claim(&*store, fingerprint_of_charge().await).await;
    let stored = StoredResponse::represented(StatusCode::ACCEPTED, Representation::new("id 7"));
    store.complete(&other, stored.encode()).await.unwrap();
    let first = first.await.unwrap();
    assert_eq!((first.status, &first.body[..]), (StatusCode::ACCEPTED, &b"id 7 of [anonymous]"[..]));
}

#[tokio::test]
async fn an_operator_completes_a_record_with_a_representation() {
    let (store, layer) = with_store();
    abandon(&*store).await;
    let handle = layer.handle();
    let (app, runs) = represented(layer.with_representation(render));
    let found = StoredResponse::represented(StatusCode::CREATED, Representation::new("id 9"));
    let (consumer, key) = identity();
    handle.resolve(&consumer, &key, Resolution::complete(&found)).await.unwrap();
    assert_eq!(send(&app, charge("k")).await.body, "id 9 of [anonymous]");
    assert_eq!(runs.get(), 0);
}

#[tokio::test]
async fn the_renderer_reads_what_the_transaction_of_the_handler_committed() {
    let file = SqliteFile::new();
    let pool = file.pool();
    sqlx::query("CREATE TABLE charges (id INTEGER PRIMARY KEY, amount INTEGER)")
        .execute(&pool)
        .await
        .unwrap();
    let charges = pool.clone();
    let layer =
        IdempotencyLayer::new(pool.clone()).with_representation(move |stored: StoredRepresentation| {
            let charges = charges.clone();
            async move {
                let id: i64 = std::str::from_utf8(&stored.data)?.parse()?;
                let (amount,): (i64,) = sqlx::query_as("SELECT amount FROM charges WHERE id = ?")
                    .bind(id)
                    .fetch_one(&charges)
                    .await?;
                Ok::<_, BoxError>(
                    Response::builder().status(stored.status).body(format!("charge {id}: {amount}"))?,
                )
            }
        });
    let handler = |mut tx: Tx<sqlx::Sqlite>| async move {
        let done = sqlx::query("INSERT INTO charges (amount) VALUES (2000)").execute(&mut *tx).await.unwrap();
        (StatusCode::CREATED, Extension(Representation::new(done.last_insert_rowid().to_string())))
    };
    let app = Router::new().route("/charges", post(handler)).layer(layer);
    let first = send(&app, charge("k")).await;
    assert_eq!((first.status, &first.body[..]), (StatusCode::CREATED, &b"charge 1: 2000"[..]));
    first.assert_same_replay(&send(&app, charge("k")).await);

    sqlx::query("UPDATE charges SET amount = 3000").execute(&pool).await.unwrap();
    assert_eq!(send(&app, charge("k")).await.body, "charge 1: 3000");
    sqlx::query("DELETE FROM charges").execute(&pool).await.unwrap();
    send(&app, charge("k")).await.assert_refused(RejectionCode::RepresentationUnrenderable);
    let (charges,): (i64,) = sqlx::query_as("SELECT count(*) FROM charges").fetch_one(&pool).await.unwrap();
    assert_eq!(charges, 0, "the handler ran again");
}

/// An application whose response is represented by the number of the run.
fn represented(layer: IdempotencyLayer) -> (Router, Count) {
    answering(layer, |run| {
        (
            StatusCode::CREATED,
            [("x-handler", "1"), (header::ETAG.as_str(), "\"1\"")],
            id(run),
            Body::from("unseen"),
        )
            .into_response()
    })
}

fn id(run: usize) -> Extension<Representation> {
    Extension(Representation::new(format!("id {run}")))
}

async fn render(stored: StoredRepresentation) -> Result<Response<String>, Infallible> {
    page(&stored)
}

fn page(stored: &StoredRepresentation) -> Result<Response<String>, Infallible> {
    let id = std::str::from_utf8(&stored.data).unwrap();
    let mut response = Response::new(format!("{id} of {}", stored.consumer));
    *response.status_mut() = stored.status;
    response.headers_mut().insert("x-page", HeaderValue::from_static("1"));
    Ok(response)
}

/// Sends until the renderer, which fails twice, recovers.
async fn assert_recovers(layer: IdempotencyLayer, calls: Count) {
    let handle = layer.handle();
    let (app, runs) = represented(layer);
    for _ in 0..2 {
        let answer = send(&app, charge("k")).await;
        answer.assert_refused(RejectionCode::RepresentationUnrenderable);
        assert_eq!(answer.problem()["retryable"], true);
        let (consumer, key) = identity();
        let record: Record = handle.get(&consumer, &key).await.unwrap().unwrap();
        assert!(matches!(record.response().unwrap().unwrap().body, StoredBody::Representation(_)));
    }
    let answer = send(&app, charge("k")).await;
    assert!(answer.is_replay() && answer.body == "id 1 of [anonymous]", "{answer:?}");
    assert_eq!((runs.get(), calls.get()), (1, 3));
}
