//! One attempt, one run of the handler: no call and no phase is made twice by a retry inside the layer, or by a loop.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Extension, Router, body::Body, extract::Request, handler::Handler, http::StatusCode, response::Response,
    routing::post,
};
use sqlx::{Postgres, Sqlite};
use tower_idempotency::{
    CallFailure, Directive, Idempotency, IdempotencyLayer, IntentError, MemoryStore, RejectionCode, Resource,
    Tx, TxError, intent::IntentBuilder, store::Store,
};

use crate::{
    bank::Node,
    phases::{Site, on_both_stores},
    support::{
        db::Db,
        log::Log,
        rerun::{self, ONCE, RERUNS},
        served::Count,
    },
};

/// The stores that need no server, with what must not be dropped before them.
async fn stores() -> [(Arc<dyn Store>, Option<Site<Sqlite>>); 2] {
    let site = Site::<Sqlite>::open().await;
    [(Arc::new(MemoryStore::new()), None), (Arc::clone(&site.store), Some(site))]
}

/// A node whose handler fails in its first run.
fn failing_first<T: 'static>(
    store: &Arc<dyn Store>,
    handler: impl Handler<T, ()>,
    inside: impl FnOnce(Router) -> Router,
) -> Node {
    let (router, runs) = rerun::failing_first(handler);
    Node::new(IdempotencyLayer::new(Arc::clone(store)), inside(router), runs)
}

/// Checks that the first request is refused after one call, and that a retry gets its resource.
async fn calls_once(node: &Node, calls: &Count, what: &str) {
    let answer = node.send(what).await;
    assert_eq!(answer.rejection, Some(RejectionCode::IntentMisused), "{what}: {answer:?}");
    assert_eq!((answer.problem()["retryable"].as_bool(), node.runs.get()), (Some(true), 2), "{what}");
    let retry = node.send_until_ended(what).await;
    assert_eq!((retry.status, &retry.body[..]), (StatusCode::CREATED, &b"ch_1"[..]), "{what}: {retry:?}");
    assert_eq!(calls.get(), 1, "{what}");
}

/// Describes the call to the bank.
type Describe = fn(IntentBuilder) -> IntentBuilder;

const DESCRIPTIONS: [(&str, Describe); 3] = [
    ("no-arguments", |intent| intent),
    ("equal-arguments", |intent| intent.with_arguments(&("DE02", 5))),
    ("a-discriminator", |intent| intent.of("DE02")),
];

async fn call(intent: IntentBuilder, calls: &Count) -> Result<(StatusCode, String), IntentError> {
    let made = intent.call(async |_| Ok(Resource::new(format!("ch_{}", calls.add())))).await?;
    Ok((StatusCode::CREATED, made.id))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_of_the_handler_makes_no_call() {
    for (store, _site) in stores().await {
        for (reruns, inside) in &RERUNS[..5] {
            for (described, describe) in DESCRIPTIONS {
                let calls = Count::default();
                let counter = calls.clone();
                let handler = move |idempotency: Idempotency| {
                    let counter = counter.clone();
                    async move { call(describe(idempotency.intent("bank")), &counter).await }
                };
                let what = format!("{}-{reruns}-{described}", uuid::Uuid::new_v4());
                calls_once(&failing_first(&store, handler, inside), &calls, &what).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_with_other_arguments_makes_no_call() {
    for (store, _site) in stores().await {
        for (what, inside) in &RERUNS[..5] {
            let calls = Count::default();
            let (counter, amounts) = (calls.clone(), Count::default());
            let handler = move |idempotency: Idempotency| {
                // The amount that the first run asked for is what the record stands for.
                let amount = if amounts.add() == 2 { 6 } else { 5 };
                let counter = counter.clone();
                async move {
                    let intent = idempotency.intent("bank").with_arguments(&("DE02", amount));
                    call(intent, &counter).await
                }
            };
            calls_once(&failing_first(&store, handler, inside), &calls, what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_beside_the_first_makes_no_call() {
    for (store, _site) in stores().await {
        let calls = Count::default();
        let counter = calls.clone();
        let handler = async move |idempotency: Idempotency| call(idempotency.intent("bank"), &counter).await;
        let node = failing_first(&store, handler, RERUNS[5].1);
        node.send("hedged").await.assert_refused(RejectionCode::IntentMisused);
        assert_eq!(calls.get(), 1);
    }
}

/// The key may be read in every run.
#[tokio::test]
async fn a_second_run_that_only_reads_its_key_is_performed() {
    for (what, inside) in &RERUNS[..5] {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let handler = async |idempotency: Idempotency| (StatusCode::CREATED, idempotency.key().to_string());
        let node = failing_first(&store, handler, inside);
        let answer = node.send("read").await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::CREATED, &b"read"[..]), "{what}");
    }
}

#[tokio::test]
async fn a_middleware_that_runs_the_handler_once_changes_no_call() {
    for (what, inside) in ONCE {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let handler =
            async |idempotency: Idempotency, raw: Extension<Idempotency>, again: Option<Idempotency>| {
                let mut made = Vec::new();
                for handle in [&idempotency, &idempotency.clone(), &raw, &again.unwrap()] {
                    made.push(handle.intent("bank").call(async |_| Ok(Resource::new("ch"))).await?.id);
                }
                Ok::<_, IntentError>((StatusCode::CREATED, made.join(" ")))
            };
        let runs = Count::default();
        let router = inside(Router::new().route("/charges", post(handler)));
        let answer = Node::new(IdempotencyLayer::new(store), router, runs).send("once").await;
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::CREATED, &b"ch ch ch ch"[..]), "{what}");
    }
}

/// A handle that a plain service takes out of the extensions is that of its only run.
#[tokio::test]
async fn a_plain_service_calls_by_the_handle_in_its_extensions() {
    use tower::{ServiceBuilder, ServiceExt};
    let inner = tower::service_fn(
        |request: axum::http::Request<tower_idempotency::layer::RequestBody<Body>>| async move {
            let idempotency = request.extensions().get::<Idempotency>().cloned().unwrap();
            let made = idempotency.intent("bank").call(async |_| Ok(Resource::new("ch"))).await.unwrap();
            Ok::<_, Infallible>(Response::new(Body::from(made.id)))
        },
    );
    let service = ServiceBuilder::new().layer(IdempotencyLayer::new(MemoryStore::new())).service(inner);
    let answer = service.oneshot(crate::support::direct::charge("k")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_with_equal_arguments_calls_once() {
    for (store, _site) in stores().await {
        let calls = Count::default();
        let counter = calls.clone();
        let handler = async move |idempotency: Idempotency| {
            let mut said = Vec::new();
            for cents in [5, 6, 5, 6, 5] {
                let intent = idempotency.intent("bank").with_arguments(&("DE02", cents));
                said.push(call(intent, &counter).await.map_err(|error| error.code()));
            }
            let misused = said.iter().filter(|said| **said == Err(RejectionCode::IntentMisused)).count();
            (StatusCode::CREATED, misused.to_string())
        };
        let runs = Count::default();
        let router = Router::new().route("/charges", post(handler));
        let node = Node::new(IdempotencyLayer::new(store), router, runs);
        let answer = node.send("loop").await;
        assert_eq!((calls.get(), &answer.body[..]), (2, &b"3"[..]), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_whose_call_was_refused_calls_once() {
    for (store, _site) in stores().await {
        let calls = Count::default();
        let counter = calls.clone();
        let handler = async move |idempotency: Idempotency| {
            let mut codes = Vec::new();
            for _ in 0..2 {
                let refused = async |_| {
                    counter.add();
                    Err(CallFailure::Refused("closed".to_owned()))
                };
                let intent = idempotency.intent("bank").with_arguments(&("DE02", 5));
                codes.push(intent.call(refused).await.unwrap_err().code().to_string());
            }
            (StatusCode::CREATED, codes.join(" "))
        };
        let router = Router::new().route("/charges", post(handler));
        let answer = Node::new(IdempotencyLayer::new(store), router, Count::default()).send("loop").await;
        assert_eq!((calls.get(), &answer.body[..]), (1, &b"upstream-refused intent-misused"[..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_with_a_discriminator_gets_what_was_recorded() {
    for (store, _site) in stores().await {
        let calls = Count::default();
        let counter = calls.clone();
        let handler = async move |idempotency: Idempotency| {
            let mut made = Vec::new();
            for _ in 0..3 {
                let intent = idempotency.intent("bank").of("DE02").with_arguments(&("DE02", 5));
                made.push(call(intent, &counter).await?.1);
            }
            Ok::<_, IntentError>((StatusCode::CREATED, made.join(" ")))
        };
        let router = Router::new().route("/charges", post(handler));
        let answer = Node::new(IdempotencyLayer::new(store), router, Count::default()).send("loop").await;
        assert_eq!((calls.get(), &answer.body[..]), (1, &b"ch_1 ch_1 ch_1"[..]));
    }
}

on_both_stores!(
    a_second_run_of_the_handler_makes_no_phase,
    a_transaction_of_a_second_run_after_a_phase_is_refused,
    without_arguments_the_next_of_a_name_is_another_call,
);

async fn a_second_run_of_the_handler_makes_no_phase<DB: Db>(site: Site<DB>) {
    for (what, inside) in &RERUNS[..5] {
        let handler = async |idempotency: Idempotency| {
            let step = async |tx: &mut DB::Connection| {
                DB::run(tx, "INSERT INTO steps VALUES ('step')").await?;
                Ok::<_, TxError>("done".to_owned())
            };
            Ok::<_, TxError>((StatusCode::CREATED, idempotency.phase("step", step).await?))
        };
        let before = site.steps("step").await;
        let node = failing_first(&site.store, handler, inside);
        node.send(what).await.assert_refused(RejectionCode::IntentMisused);
        assert_eq!((node.runs.get(), site.steps("step").await - before), (2, 1), "{what}");
        let retry = node.send_until_ended(what).await;
        assert_eq!((retry.status, &retry.body[..]), (StatusCode::CREATED, &b"done"[..]), "{what}: {retry:?}");
        assert_eq!(site.steps("step").await - before, 1, "{what}");
    }
}

async fn a_transaction_of_a_second_run_after_a_phase_is_refused<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |idempotency: Idempotency, request: Request| {
        let run = counter.add();
        async move {
            if run == 1 {
                idempotency.phase("step", async |_: &mut DB::Connection| Ok::<_, TxError>(())).await?;
                return Ok(StatusCode::SERVICE_UNAVAILABLE);
            }
            let mut tx = Tx::<DB>::begin(request.extensions()).await?;
            DB::run(&mut tx, "INSERT INTO steps VALUES ('second')").await?;
            Ok::<_, TxError>(StatusCode::CREATED)
        }
    };
    let router = RERUNS[0].1(Router::new().route("/charges", post(handler)));
    let node = Node::new(IdempotencyLayer::new(Arc::clone(&site.store)), router, runs);
    node.send("k").await.assert_refused(RejectionCode::TransactionInUse);
    assert_eq!(site.steps("second").await, 0);
    assert_eq!(node.send_until_ended("k").await.status, StatusCode::CREATED);
    assert_eq!(site.steps("second").await, 1);
}

async fn without_arguments_the_next_of_a_name_is_another_call<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let mut made = Vec::new();
        for n in 0..3 {
            let intent = idempotency.intent("bank");
            made.push(intent.call(async |_| Ok(Resource::new(format!("ch_{n}")))).await?.id);
        }
        Ok::<_, IntentError>((StatusCode::CREATED, made.join(" ")))
    };
    let answer = site.node(handler).send().await;
    assert_eq!(&answer.body[..], b"ch_0 ch_1 ch_2");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_second_run_of_the_handler_makes_no_call_on_postgres() {
    let store = Site::<Postgres>::open().await;
    let calls = Count::default();
    let counter = calls.clone();
    let handler = async move |idempotency: Idempotency| call(idempotency.intent("bank"), &counter).await;
    calls_once(&failing_first(&store.store, handler, RERUNS[0].1), &calls, "k").await;
}

#[tokio::test]
async fn a_second_run_is_logged_with_its_remedy() {
    let (log, _guard) = Log::listen();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let handler = async |idempotency: Idempotency| call(idempotency.intent("bank"), &Count::default()).await;
    failing_first(&store, handler, RERUNS[0].1).send("logged").await;
    let lines = log.lines(&["ERROR", "and is refused"]);
    assert!(
        lines.len() == 1 && lines[0].contains("with_reruns") && lines[0].contains("key=logged"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn a_success_that_is_stored_while_an_intent_is_open_is_logged() {
    let (log, _guard) = Log::listen();
    let warned = || log.lines(&["WARN", "an intent is open"]);
    let handler = async |idempotency: Idempotency, request: Request| {
        let key = idempotency.key().as_str().to_owned();
        let outcome = async |_| match key.as_str() {
            "unknown" | "released" | "failed" => Err(CallFailure::unknown("reply lost")),
            "not sent" => Err(CallFailure::not_sent("connection refused")),
            _ => Ok(Resource::new("ch")),
        };
        let _ = idempotency.intent("bank").call(outcome).await;
        drop(request);
        let directive = if key == "released" { Directive::Release } else { Directive::Store };
        let status = if key == "failed" { StatusCode::CONFLICT } else { StatusCode::OK };
        (status, Extension(directive))
    };
    let router = Router::new().route("/charges", post(handler));
    let node = Node::new(IdempotencyLayer::new(MemoryStore::new()), router, Count::default());
    for (key, expected) in [("settled", 0), ("unknown", 1), ("not sent", 2), ("released", 2), ("failed", 2)] {
        node.send(&format!("\"{key}\"")).await;
        assert_eq!(warned().len(), expected, "{key}");
    }
    assert!(
        warned()[0].contains("intent=\"bank\"") && warned()[0].contains("upstream_key="),
        "{:?}",
        warned()
    );
}
