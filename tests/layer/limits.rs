//! Every duration, size and count that can be set, with zero, one, 30 days and the maximum: it is refused where it is
//! made or used, with the reason, or the layer works with it.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    http::{Method, StatusCode, header},
    routing::post,
};
use sqlx::{Postgres, Sqlite};
use tower::Layer;
use tower_idempotency::{
    Consumer, ConsumerExtractor, Idempotency, IdempotencyLayer, IntentLog, KeySyntax, Lookup, MemoryStore,
    Reaper, Reconciler, RejectionCode, Resource, TransactionOptions, Tx,
    jobs::LogOutcome,
    recovery::{Completer, KeptRequests, Refused, Restore},
    store::Store,
};

use crate::support::{
    app::consumer,
    direct::{charge, request, send},
    schema::Schema,
    served::layer,
    sqlite::SqliteFile,
};

const DURATIONS: [Duration; 4] =
    [Duration::ZERO, Duration::from_nanos(1), Duration::from_secs(30 * 24 * 60 * 60), Duration::MAX];
const SIZES: [usize; 4] = [0, 1, 30, usize::MAX];
const COUNTS: [u32; 4] = [0, 1, 30, u32::MAX];

/// What becomes of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    /// It panics, and says what to do instead.
    Refused,
    /// A request is performed and replayed.
    Works,
    /// A request is performed, and its response not kept.
    NotKept,
    /// The body of the request is too large.
    TooLarge,
}
use Becomes::{NotKept, Refused as No, TooLarge, Works};

type Set<V> = fn(IdempotencyLayer, V) -> IdempotencyLayer;

/// Needs two settings that may contradict each other.
fn long(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer.with_retention(Duration::MAX)
}

const OF_DURATIONS: [(&str, Set<Duration>, [Becomes; 4]); 19] = [
    ("retention", IdempotencyLayer::with_retention, [No, No, Works, Works]),
    ("lease", IdempotencyLayer::with_lease, [No, No, No, No]),
    ("lease, long retention", |layer, value| long(layer.with_lease(value)), [No, No, Works, Works]),
    ("renewal", IdempotencyLayer::with_renewal_interval, [No, No, No, No]),
    ("max_execution", IdempotencyLayer::with_max_execution, [No, No, No, No]),
    (
        "max_execution, long retention",
        |layer, value| long(layer.with_max_execution(value)),
        [No, No, Works, Works],
    ),
    (
        "all that go together",
        |layer, value| layer.with_lease(value).with_max_execution(value).with_retention(value),
        [No, No, No, Works],
    ),
    ("store time-out", IdempotencyLayer::with_store_timeout, [No, No, Works, Works]),
    ("derived key", IdempotencyLayer::with_derived_key, [No, No, Works, Works]),
    ("request body time-out", IdempotencyLayer::with_request_body_timeout, [No, No, Works, Works]),
    ("response body time-out", IdempotencyLayer::with_response_body_timeout, [Works; 4]),
    ("reaper's interval", |layer, value| layer.with_reaper(Reaper::every(value, 10)), [No, No, Works, Works]),
    (
        "retention of intents",
        |layer, value| {
            layer.with_reaper(Reaper::every(Duration::from_millis(1), 9).with_intent_retention(value))
        },
        [Works; 4],
    ),
    (
        "kept requests",
        |layer, value| layer.with_kept_requests(KeptRequests::new().with_abandoned_after(value)),
        [Works; 4],
    ),
    (
        "idle time-out",
        |layer, value| layer.with_transactions(TransactionOptions::default().with_idle_timeout(value)),
        [No, No, Works, Works],
    ),
    (
        "statement time-out",
        |layer, value| layer.with_transactions(TransactionOptions::default().with_statement_timeout(value)),
        [No, No, Works, Works],
    ),
    (
        "time limit of transactions",
        |layer, value| layer.with_transactions(TransactionOptions::default().with_time_limit(value)),
        [No, No, Works, Works],
    ),
    (
        "long lease, default time-outs of transactions",
        |layer, value| long(layer.with_lease(value.max(Duration::from_secs(1)))),
        [Works; 4],
    ),
    (
        "time-outs of transactions and store",
        |layer, value| {
            let options = TransactionOptions::default().with_statement_timeout(value).with_time_limit(value);
            layer.with_transactions(options.with_idle_timeout(value)).with_store_timeout(value)
        },
        [No, No, Works, Works],
    ),
];

const OF_SIZES: [(&str, Set<usize>, [Becomes; 4]); 6] = [
    ("places", IdempotencyLayer::with_max_in_flight, [No, Works, Works, Works]),
    ("request body", IdempotencyLayer::with_request_body_limit, [TooLarge, TooLarge, Works, No]),
    ("all request bodies", IdempotencyLayer::with_request_buffer_limit, [No, No, No, Works]),
    (
        "both",
        |layer, value| layer.with_request_body_limit(value).with_request_buffer_limit(value),
        [TooLarge, TooLarge, Works, Works],
    ),
    ("response body", IdempotencyLayer::with_response_body_limit, [NotKept, NotKept, Works, Works]),
    (
        "length of keys",
        |layer, value| layer.with_key_syntax(KeySyntax::default().with_length(1, value)),
        [No, Works, Works, No],
    ),
];

const OF_COUNTS: [(&str, Set<u32>, [Becomes; 4]); 2] = [
    (
        "reaper's batch",
        |layer, value| layer.with_reaper(Reaper::every(Duration::from_millis(1), value)),
        [No, Works, Works, Works],
    ),
    (
        "reruns",
        |layer, value| layer.with_transactions(TransactionOptions::default().with_reruns(value)),
        [Works; 4],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_is_refused_or_works_memory() {
    let handler = post(async || (StatusCode::CREATED, "done"));
    every_setting(&Arc::new(MemoryStore::new()), &Router::new().route("/charges", handler)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_is_refused_or_works_sqlite() {
    let file = SqliteFile::new();
    let handler = post(async |mut tx: Tx<Sqlite>| {
        sqlx::query("SELECT 1").execute(&mut *tx).await.unwrap();
        (StatusCode::CREATED, "done")
    });
    let store = Arc::new(file.store());
    every_setting(&store, &Router::new().route("/charges", handler)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn every_setting_is_refused_or_works_postgres() {
    let handler = post(async |mut tx: Tx<Postgres>| {
        sqlx::query("SELECT 1").execute(&mut *tx).await.unwrap();
        (StatusCode::CREATED, "done")
    });
    let store = Arc::new(Schema::create().await.store());
    every_setting(&store, &Router::new().route("/charges", handler)).await;
}

async fn every_setting<S: Store>(store: &Arc<S>, router: &Router) {
    let store: Arc<dyn Store> = Arc::clone(store) as _;
    let (store, router) = (&store, router);
    for (name, set, becomes) in OF_DURATIONS {
        check(store, router, name, set, DURATIONS, becomes).await;
    }
    for (name, set, becomes) in OF_SIZES {
        check(store, router, name, set, SIZES, becomes).await;
    }
    for (name, set, becomes) in OF_COUNTS {
        check(store, router, name, set, COUNTS, becomes).await;
    }
}

async fn check<V: Copy + fmt::Debug>(
    store: &Arc<dyn Store>,
    router: &Router,
    name: &str,
    set: Set<V>,
    values: [V; 4],
    becomes: [Becomes; 4],
) {
    for (number, (value, expected)) in values.into_iter().zip(becomes).enumerate() {
        let what = format!("{name} of {value:?}");
        let app = catch_unwind(AssertUnwindSafe(|| {
            router.clone().layer(set(IdempotencyLayer::new(Arc::clone(store)), value))
        }));
        assert_eq!(app.is_err(), expected == No, "{what}");
        match app {
            Ok(app) => assert_eq!(performed(&app, name, number).await, expected, "{what}"),
            Err(panic) => {
                assert!(reason(&*panic).contains(':'), "{what}: {}", reason(&*panic))
            }
        }
    }
}

/// Sends a request and its retry.
async fn performed(app: &Router, name: &str, number: usize) -> Becomes {
    let letter = char::from(b'a' + u8::try_from(number).unwrap());
    let (key, body) = match name {
        "derived key" => (None, format!("derived {number}")),
        // One letter is as short as a key can be.
        "length of keys" => (Some(letter.to_string()), "2000".to_owned()),
        _ => (Some(format!("{name} {number}").replace([' ', ','], "-")), "2000".to_owned()),
    };
    let send_it = || send(app, request(Method::POST, key.as_deref(), body.clone()));
    let first = send_it().await;
    if first.rejection == Some(RejectionCode::RequestTooLarge) {
        return TooLarge;
    }
    assert_eq!(first.status, StatusCode::CREATED, "{name}: {first:?}");
    let retry = send_it().await;
    if retry.rejection == Some(RejectionCode::ResponseNotKept) {
        return NotKept;
    }
    first.assert_same_replay(&retry);
    Works
}

fn reason(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).expect("the panic has a reason")
}

/// Checks which values are refused, and returns what was made of the others.
fn built<V: Copy + fmt::Debug, T>(
    name: &str,
    values: [V; 4],
    refused: [bool; 4],
    make: impl Fn(V) -> T,
) -> Vec<T> {
    let mut built = Vec::new();
    for (value, refused) in values.into_iter().zip(refused) {
        let made = catch_unwind(AssertUnwindSafe(|| make(value)));
        assert_eq!(made.is_err(), refused, "{name} of {value:?}");
        built.extend(made.ok());
    }
    built
}

const TOO_SHORT: [bool; 4] = [true, true, false, false];
const ZERO: [bool; 4] = [true, false, false, false];
const NONE: [bool; 4] = [false; 4];

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_of_a_reconciler_is_refused_or_works() {
    let lookup = || Reconciler::new().on("bank", async |_| Ok(Lookup::Unknown));
    let minute = Duration::from_secs(60);
    let reconcilers = [
        built("interval", DURATIONS, TOO_SHORT, |value| lookup().with_interval(value)),
        built("time-out", DURATIONS, TOO_SHORT, |value| lookup().with_timeout(value)),
        built("confirmation", DURATIONS, ZERO, |value| lookup().with_confirmation_after(value)),
        built("recheck", DURATIONS, NONE, |value| lookup().with_recheck_after(value)),
        built("first pause", DURATIONS, [true, true, true, true], |value| {
            lookup().with_backoff(value, minute)
        }),
        built("pauses", DURATIONS, TOO_SHORT, |value| lookup().with_backoff(value, value)),
        built("batch", COUNTS, ZERO, |value| lookup().with_batch(value)),
        built("concurrency", COUNTS, ZERO, |value| lookup().with_concurrency(value)),
        built("look-ups", COUNTS, ZERO, |value| lookup().with_max_lookups(value)),
    ];
    let file = SqliteFile::new();
    let handle = IdempotencyLayer::new(file.store()).handle();
    for reconciler in reconcilers.iter().flatten() {
        handle.reconcile(reconciler).await.unwrap();
        handle.start_reconciler(reconciler.clone()).unwrap();
    }
    handle.drain(Duration::MAX).await.unwrap();
}

struct RestoresNothing;

#[async_trait::async_trait]
impl Restore for RestoresNothing {
    async fn restore(&self, _: &mut http::Request<()>, _: &Consumer) -> Result<(), Refused> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_of_a_completer_is_refused_or_works() {
    let completer = || Completer::new::<Router, axum::body::Body, _>(Router::new(), RestoresNothing);
    let completers = [
        built("interval", DURATIONS, TOO_SHORT, |value| completer().with_interval(value)),
        built("time-out", DURATIONS, TOO_SHORT, |value| completer().with_timeout(value)),
        built("pauses", DURATIONS, TOO_SHORT, |value| completer().with_backoff(value, value)),
        built("batch", COUNTS, ZERO, |value| completer().with_batch(value)),
        built("concurrency", COUNTS, ZERO, |value| completer().with_concurrency(value)),
        built("tries", COUNTS, ZERO, |value| completer().with_max_tries(value)),
    ];
    let file = SqliteFile::new();
    let handle = IdempotencyLayer::new(file.store()).handle();
    for completer in completers.iter().flatten() {
        handle.complete_abandoned(completer).await.unwrap();
        handle.start_completer(completer.clone()).unwrap();
    }
    handle.drain(Duration::MAX).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_of_an_intent_is_refused_or_works() {
    type Opens = fn(Idempotency, Duration) -> tower_idempotency::intent::IntentBuilder;
    let cases: [(&str, Opens, [bool; 4]); 3] = [
        ("time-out", |idempotency, value| idempotency.intent("bank").with_timeout(value), TOO_SHORT),
        ("grace", |idempotency, value| idempotency.intent("bank").with_grace(value), NONE),
        ("window", |idempotency, value| idempotency.intent("bank").deduplicates_for(value), NONE),
    ];
    let file = SqliteFile::new();
    for (name, open, refused) in cases {
        for (number, (value, refused)) in DURATIONS.into_iter().zip(refused).enumerate() {
            let handler = move |idempotency: Idempotency| async move {
                let call = async |_| Ok(Resource::from("1".to_owned()));
                open(idempotency, value).call(call).await.map(|resource| resource.id)
            };
            let app = Router::new().route("/charges", post(handler));
            for store in [Arc::new(MemoryStore::new()) as Arc<dyn Store>, Arc::new(file.store())] {
                let app = app.clone().layer(IdempotencyLayer::new(store));
                let answer = send(&app, charge(&format!("{name}-{number}"))).await;
                let expected = if refused { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
                assert_eq!(answer.status, expected, "{name} of {value:?}: {answer:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_of_a_log_is_refused_or_works() {
    let file = SqliteFile::new();
    let log = || IntentLog::new(file.store());
    let made = [
        built("store time-out", DURATIONS, TOO_SHORT, |value| log().with_store_timeout(value)),
        built("lease", DURATIONS, TOO_SHORT, |value| log().with_lease(value).with_retention(Duration::MAX)),
        built("limit", DURATIONS, TOO_SHORT, |value| {
            log().with_max_execution(value).with_retention(Duration::MAX)
        }),
    ];
    for (number, log) in made.iter().flatten().enumerate() {
        let key = tower_idempotency::IdempotencyKey::new(format!("job-{number}")).unwrap();
        let LogOutcome::Run(attempt) = log.attempt(&consumer(), &key, "work").await.unwrap() else {
            panic!("a new key runs")
        };
        attempt.complete("done").await.unwrap();
    }
    let contradiction = log().with_retention(Duration::from_secs(1));
    let used = tokio::spawn(async move {
        let key = tower_idempotency::IdempotencyKey::new("never").unwrap();
        contradiction.attempt(&consumer(), &key, "work").await.map(drop)
    });
    let panic = used.await.unwrap_err().into_panic();
    assert!(reason(&*panic).contains("max_execution and lease"), "{}", reason(&*panic));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn every_setting_of_the_postgres_store_is_refused_or_works() {
    let schema = Schema::create().await;
    let stores = [
        built("statement time-out", DURATIONS, TOO_SHORT, |value| {
            schema.store().with_statement_timeout(value)
        }),
        built("connections", COUNTS, NONE, |value| schema.store().with_max_connections(value)),
    ];
    for (number, store) in stores.into_iter().flatten().enumerate() {
        let app = Router::new().route("/charges", post(async || StatusCode::CREATED));
        let app = app.layer(IdempotencyLayer::new(store));
        assert_eq!(send(&app, charge(&format!("k{number}"))).await.status, StatusCode::CREATED);
        assert!(send(&app, charge(&format!("k{number}"))).await.is_replay());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_an_operator_takes_any_duration_and_count() {
    let file = SqliteFile::new();
    for layer in [layer(), IdempotencyLayer::new(file.store())] {
        let handle = layer.handle();
        for (duration, count) in DURATIONS.into_iter().zip(COUNTS) {
            assert_eq!(handle.purge_settled(duration, count).await.unwrap(), 0);
            assert_eq!(handle.purge(count).await.unwrap(), 0);
        }
    }
    for limit in DURATIONS {
        assert!(layer().handle().drain(limit).await.is_ok(), "{limit:?}");
    }
}

#[test]
fn the_order_of_settings_does_not_matter() {
    let second = Duration::from_secs(1);
    // Each is impossible beside a default, and all are possible together.
    let sets: [fn(IdempotencyLayer) -> IdempotencyLayer; 5] = [
        |layer| layer.with_retention(Duration::from_secs(5)),
        |layer| layer.with_lease(Duration::from_secs(2)),
        |layer| layer.with_max_execution(Duration::from_secs(3)),
        |layer| layer.with_request_buffer_limit(1000),
        |layer| layer.with_request_body_limit(1000),
    ];
    for first in 0..sets.len() {
        for step in 1..sets.len() {
            let mut layer = layer();
            for number in 0..sets.len() {
                layer = sets[(first + number * step) % sets.len()](layer);
            }
            let _ = layer.layer(());
        }
    }
    let kept = KeptRequests::new().add_header("x-account".parse().unwrap());
    let named = ConsumerExtractor::header("x-account".parse().unwrap());
    for layer in [
        layer().with_kept_requests(kept.clone()).with_consumer(named.clone()),
        layer().with_consumer(named.clone()).with_kept_requests(kept.clone()),
        layer().with_retention(second),
        layer().with_kept_requests(KeptRequests::new().add_header(header::COOKIE)),
        layer().with_renewal_interval(Duration::from_secs(29)),
        layer().with_request_buffer_limit(10),
    ] {
        // And made possible again.
        let mended = layer
            .clone()
            .with_kept_requests(KeptRequests::new())
            .with_retention(Duration::MAX)
            .with_renewal_interval(second)
            .with_request_body_limit(10);
        let _ = mended.layer(());
        assert!(catch_unwind(AssertUnwindSafe(|| layer.layer(()))).is_err());
    }
}
