//! What clients and operators are told of calls whose outcome is unknown, and of attempts. Time is tokio's, and paused.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, http::StatusCode, response::IntoResponse, routing::post};
use tower_idempotency::{
    CallFailure, Idempotency, IdempotencyHandle, IdempotencyKey, IdempotencyLayer, Intent, Lookup,
    MemoryStore, Reconciler, RejectionCode, Resource,
    intent::{IntentFilter, IntentResolution},
    layer::KeyLogging,
    store::Resolution,
};

use crate::support::{
    direct::{self, Answer},
    log::Log,
};

/// A node whose handler makes a transfer. Its outcome is unknown at first.
struct Desk {
    app: Router,
    handle: IdempotencyHandle,
    store: MemoryStore,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
}

#[derive(Clone, Copy)]
enum Outcome {
    Unknown,
    MadeAndFailed,
    Made,
}

impl Desk {
    fn open() -> Self {
        Self::over(MemoryStore::new(), |layer| layer)
    }

    fn over(store: MemoryStore, set: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer) -> Self {
        let layer = set(IdempotencyLayer::new(store.clone()));
        let handle = layer.handle();
        let outcomes = Arc::new(Mutex::new(vec![Outcome::Unknown]));
        let next = Arc::clone(&outcomes);
        let pay = move |idempotency: Idempotency| async move {
            let outcome = next.lock().unwrap().pop().unwrap_or(Outcome::Made);
            let call = async |_| match outcome {
                Outcome::Unknown => Err(CallFailure::unknown("reset")),
                Outcome::Made | Outcome::MadeAndFailed => Ok(Resource::new("tr_1")),
            };
            match idempotency.intent("bank.transfer").call(call).await {
                Ok(_) if matches!(outcome, Outcome::MadeAndFailed) => {
                    StatusCode::INTERNAL_SERVER_ERROR.into_response()
                }
                Ok(made) => (StatusCode::CREATED, made.id).into_response(),
                Err(error) => error.into_response(),
            }
        };
        Self { app: Router::new().route("/charges", post(pay)).layer(layer), handle, store, outcomes }
    }

    async fn send(&self) -> Answer {
        direct::send(&self.app, direct::charge("k")).await
    }

    /// Sends, and must be refused because the outcome is unknown. Returns what the client is told.
    async fn refused(&self) -> Told {
        let answer = self.send().await;
        answer.assert_refused(RejectionCode::OutcomeUnknown);
        let problem = answer.problem();
        Told {
            looked_up: problem["detail"].as_str().unwrap().contains("being looked up"),
            operator: problem["detail"].as_str().unwrap().contains("the operator of the API"),
            retryable: problem["retryable"].as_bool().unwrap(),
            retry_after: answer.headers.contains_key("retry-after"),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Told {
    looked_up: bool,
    operator: bool,
    retryable: bool,
    retry_after: bool,
}

const LOOKED_UP: Told = Told { looked_up: true, operator: false, retryable: true, retry_after: true };
const UNCLEAR: Told = Told { looked_up: false, operator: false, retryable: true, retry_after: false };
const BY_OPERATOR: Told = Told { looked_up: false, operator: true, retryable: false, retry_after: false };

fn unknown() -> impl tower_idempotency::Reconcile {
    |_: Intent| async { Ok(Lookup::Unknown) }
}

const MINUTE: Duration = Duration::from_secs(60);
const UNREGISTERED: &str = "no reconciler of this process looks up the call";

#[tokio::test(start_paused = true)]
async fn without_a_reconciler_no_look_up_is_promised_and_an_error_says_so_once() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    let first = desk.refused().await;
    assert!(!first.looked_up && !first.operator, "{first:?}");
    for _ in 0..3 {
        assert_eq!(desk.refused().await, UNCLEAR);
    }
    tokio::time::sleep(6 * MINUTE).await;
    for _ in 0..2 {
        assert_eq!(desk.refused().await, BY_OPERATOR);
    }
    let error = log.one(&["ERROR", UNREGISTERED]);
    for part in ["consumer=", "key=k", "attempt=", "intent=\"bank.transfer\""] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_stays_held_is_a_warning_once() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    for _ in 0..5 {
        desk.refused().await;
    }
    log.one(&["WARN", "conflict: held", "key=k"]);
    assert_eq!(log.lines(&["DEBUG", "conflict: held", "key=k"]).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_look_up_is_promised_where_a_reconciler_for_the_name_was_started() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    desk.refused().await;
    desk.handle.start_reconciler(Reconciler::new().on("mail.send", unknown())).unwrap();
    assert_eq!(desk.refused().await, UNCLEAR, "another name");
    desk.handle.start_reconciler(Reconciler::new().on("bank.transfer", unknown())).unwrap();
    assert_eq!(desk.refused().await, LOOKED_UP);
    tokio::time::sleep(6 * MINUTE).await;
    assert_eq!(desk.refused().await, LOOKED_UP);
    log.one(&["ERROR", UNREGISTERED]);
}

#[tokio::test(start_paused = true)]
async fn no_look_up_is_promised_of_a_call_that_needs_attention() {
    let desk = Desk::open();
    desk.refused().await;
    let once = Reconciler::new().on("bank.transfer", unknown()).with_max_lookups(1);
    desk.handle.start_reconciler(once).unwrap();
    tokio::time::sleep(6 * MINUTE).await;
    assert_eq!(desk.handle.list_intents(IntentFilter::NeedsAttention, 10).await.unwrap().len(), 1);
    assert_eq!(desk.refused().await, BY_OPERATOR);
}

#[tokio::test(start_paused = true)]
async fn a_process_whose_calls_another_one_looks_up_neither_promises_nor_complains() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    let worker = Desk::over(desk.store.clone(), |layer| layer);
    desk.send().await.assert_refused(RejectionCode::OutcomeUnknown);
    worker.handle.start_reconciler(Reconciler::new().on("bank.transfer", unknown())).unwrap();
    tokio::time::sleep(6 * MINUTE).await;
    assert_eq!(desk.refused().await, UNCLEAR);
    assert_eq!(log.lines(&["ERROR", UNREGISTERED]), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_look_up_that_learned_nothing_says_when_the_next_one_is() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    desk.refused().await;
    tokio::time::sleep(6 * MINUTE).await;
    let reconciler = Reconciler::new().on("bank.transfer", unknown()).with_backoff(MINUTE, MINUTE);
    assert_eq!(desk.handle.reconcile(&reconciler).await.unwrap().again, 1);
    let line = log.one(&["INFO", "a look-up has not settled its intent"]);
    for part in ["consumer=", "key=k", "attempt=", "looks=1", "next_after="] {
        assert!(line.contains(part), "{part} in {line}");
    }
}

#[tokio::test(start_paused = true)]
async fn overlooked_names_are_reported_once() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    desk.refused().await;
    let reconciler = Reconciler::new().on("mail.send", unknown());
    let overlooked = async || desk.handle.reconcile(&reconciler).await.unwrap().overlooked;
    tokio::time::sleep(19 * MINUTE).await;
    assert_eq!(overlooked().await, 0, "another service has had a quarter of an hour only");
    tokio::time::sleep(2 * MINUTE).await;
    for _ in 0..3 {
        assert_eq!(overlooked().await, 1);
    }
    log.one(&["ERROR", "looked up by no process", "bank.transfer"]);
}

#[tokio::test(start_paused = true)]
async fn names_of_another_reconciler_of_the_process_are_not_overlooked() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    desk.refused().await;
    let rarely = Reconciler::new().on("bank.transfer", unknown()).with_interval(1000 * MINUTE);
    desk.handle.start_reconciler(rarely).unwrap();
    tokio::time::sleep(30 * MINUTE).await;
    let other = Reconciler::new().on("mail.send", unknown());
    assert_eq!(desk.handle.reconcile(&other).await.unwrap().overlooked, 0);
    assert_eq!(log.lines(&["looked up by no process"]), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_takeover_is_one_line() {
    let (log, _guard) = Log::listen();
    let desk = Desk::open();
    desk.outcomes.lock().unwrap().push(Outcome::MadeAndFailed);
    assert_eq!(desk.send().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(log.lines(&["takeover"]), [""; 0]);
    tokio::time::sleep(MINUTE).await;
    assert_eq!(desk.send().await.status, StatusCode::CREATED);
    let line = log.one(&["INFO", "takeover"]);
    for part in ["consumer=", "key=k", "attempt=", "attempt_number=2", "taken_over=1", "age=60"] {
        assert!(line.contains(part), "{part} in {line}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_operators_do_is_one_line_each() {
    for (logging, key) in [(KeyLogging::Plain, "key=k"), (KeyLogging::Redacted, "key=[redacted]")] {
        let (log, _guard) = Log::listen();
        let desk = Desk::over(MemoryStore::new(), |layer| layer.with_key_logging(logging));
        let (consumer, name) = (consumer_of(&desk).await, IdempotencyKey::new("k").unwrap());
        let open = desk.handle.list_intents(IntentFilter::Open, 10).await.unwrap().remove(0);
        desk.handle.resolve_intent(open.upstream_key, IntentResolution::Absent).await.unwrap();
        log.one(&["INFO", "an operator has resolved an intent", "consumer=", key, "bank.transfer"]);
        desk.handle.resolve(&consumer, &name, Resolution::Release).await.unwrap();
        log.one(&["INFO", "an operator has resolved a record", "consumer=", key, "released"]);
        assert!(desk.handle.evict(&consumer, &name).await.unwrap());
        assert!(!desk.handle.evict(&consumer, &name).await.unwrap());
        log.one(&["INFO", "an operator has evicted a record", "consumer=", key]);
    }
}

async fn consumer_of(desk: &Desk) -> tower_idempotency::Consumer {
    desk.refused().await;
    let open = desk.handle.list_intents(IntentFilter::Open, 10).await.unwrap().remove(0);
    open.consumer
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_runs_for_long_says_so_after_pauses_that_double() {
    let (log, _guard) = Log::listen();
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let (app, _) = direct::waiting(layer, Duration::from_secs(130));
    assert_eq!(direct::send(&app, direct::charge("k")).await.status, StatusCode::OK);
    let lines = log.lines(&["WARN", "still running after", "key=k", "consumer=", "attempt="]);
    let after: Vec<bool> = ["30s", "60s", "120s"]
        .iter()
        .zip(&lines)
        .map(|(after, line)| line.contains(&format!("still running after {after}")))
        .collect();
    assert!(after == [true; 3] && lines.len() == 3, "{lines:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_runs_for_less_than_half_a_minute_says_nothing() {
    let (log, _guard) = Log::listen();
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let (app, _) = direct::waiting(layer, Duration::from_secs(29));
    direct::send(&app, direct::charge("k")).await;
    assert_eq!(log.lines(&["still running"]), [""; 0]);
}
