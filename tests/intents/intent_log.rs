//! Intents and phases outside HTTP.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use tokio::runtime::Runtime;
use tower_idempotency::{
    CallFailure, Consumer, IdempotencyKey, IntentError, IntentLog, Reaper, Resource, TransactionOptions,
    TxError,
    jobs::{IntentLogError, LogAttempt, LogOutcome},
    layer::AbandonedAttempts,
    store::{Resolution, ResolveOutcome, StoredResponse},
};

use crate::{
    shop::{Dialect, Shop, charge, on_both_stores, until},
    support::served::Count,
};

on_both_stores!(
    a_finalized_intent_is_not_called_again,
    a_finalized_intent_of_a_dead_process_is_not_called_again,
    a_completed_result_is_returned,
    other_arguments_are_refused,
    the_lease_is_kept_while_the_work_goes_on,
    an_attempt_that_is_dropped_or_released_is_given_back,
    what_must_not_run_again_is_held,
    an_attempt_that_lost_its_record_gets_the_result_of_its_successor,
    an_attempt_whose_record_has_gone_stores_nothing,
    the_end_is_stored_once_the_store_is_back,
    draining_waits_for_attempts_and_begins_no_more,
    requests_and_jobs_share_the_store,
);

const ARGUMENTS: (&str, u32) = ("DE02", 1000);

const LEASE: Duration = Duration::from_secs(2);

struct Log(IntentLog, Consumer, IdempotencyKey);

impl Log {
    fn new<DB: Dialect>(shop: &Shop<DB>) -> Self {
        let log = IntentLog::new(shop.store()).with_lease(LEASE).with_reaper(Reaper::off());
        Self(log, Consumer::new("queue").unwrap(), IdempotencyKey::new("message 17").unwrap())
    }

    fn with(self, change: impl FnOnce(IntentLog) -> IntentLog) -> Self {
        Self(change(self.0), self.1, self.2)
    }

    async fn ask(&self) -> LogOutcome {
        self.0.attempt(&self.1, &self.2, &ARGUMENTS).await.unwrap()
    }

    /// Begins an attempt as soon as nobody else is running one.
    async fn begin(&self) -> LogAttempt {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match self.ask().await {
                LogOutcome::Run(attempt) => return attempt,
                LogOutcome::InProgress => tokio::time::sleep(Duration::from_millis(10)).await,
                other @ (LogOutcome::Completed(_) | LogOutcome::Held | LogOutcome::OtherArguments) => {
                    panic!("{other:?}")
                }
            }
            assert!(Instant::now() < deadline, "waited 30 s in vain for an attempt");
        }
    }

    async fn result(&self) -> String {
        let outcome = self.ask().await;
        let LogOutcome::Completed(result) = outcome else { panic!("{outcome:?}") };
        String::from_utf8(result.to_vec()).unwrap()
    }

    async fn is_in_progress(&self) -> bool {
        matches!(self.ask().await, LogOutcome::InProgress)
    }
}

async fn transfer(attempt: &LogAttempt, calls: &Count) -> Result<Resource, IntentError> {
    let intent = attempt.idempotency().intent("transfer").with_arguments(&ARGUMENTS);
    intent.call(async |_| Ok(format!("tr_{}", calls.add()).into())).await
}

async fn a_finalized_intent_is_not_called_again<DB: Dialect>(shop: Shop<DB>) {
    let (log, calls) = (Log::new(&shop), Count::default());
    let attempt = log.begin().await;
    let id = attempt.idempotency().record_id();
    assert_eq!(transfer(&attempt, &calls).await.unwrap().id, "tr_1");
    attempt.release().await.unwrap();
    let again = log.begin().await;
    assert_eq!((again.idempotency().record_id(), again.idempotency().attempt_number()), (id, 2));
    assert_eq!(transfer(&again, &calls).await.unwrap().id, "tr_1");
    assert_eq!(again.complete("tr_1").await.unwrap(), "tr_1");
    assert_eq!((log.result().await.as_str(), calls.get()), ("tr_1", 1));
}

async fn a_finalized_intent_of_a_dead_process_is_not_called_again<DB: Dialect>(shop: Shop<DB>) {
    let (log, calls, called) = (Log::new(&shop), Count::default(), Count::default());
    let process = Runtime::new().unwrap();
    let (first, its_calls, done) = (Log::new(&shop), calls.clone(), called.clone());
    process.spawn(async move {
        first.0.handle().prepare().await.unwrap();
        let attempt = first.begin().await;
        transfer(&attempt, &its_calls).await.unwrap();
        done.add();
        std::future::pending::<()>().await;
        drop(attempt);
    });
    until("the call", async || called.get() == 1).await;
    process.shutdown_background();
    let again = log.begin().await;
    assert_eq!(again.idempotency().attempt_number(), 2);
    assert_eq!(transfer(&again, &calls).await.unwrap().id, "tr_1");
    again.complete("done").await.unwrap();
    assert_eq!((log.result().await.as_str(), calls.get()), ("done", 1));
}

async fn a_completed_result_is_returned<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let result = [0, 159, 255];
    assert_eq!(log.begin().await.complete(result.to_vec()).await.unwrap(), &result[..]);
    for log in [log, Log::new(&shop)] {
        let LogOutcome::Completed(stored) = log.ask().await else { panic!("it is completed") };
        assert_eq!(stored, &result[..]);
    }
}

async fn other_arguments_are_refused<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let ask = async |arguments: serde_json::Value| log.0.attempt(&log.1, &log.2, &arguments).await.unwrap();
    let ours = serde_json::json!({"to": "DE02", "cents": 1000});
    let LogOutcome::Run(attempt) = ask(ours.clone()).await else { panic!("it is new") };
    let other = serde_json::json!({"to": "DE02", "cents": 1001});
    assert!(matches!(ask(other.clone()).await, LogOutcome::OtherArguments));
    assert!(matches!(ask(ours.clone()).await, LogOutcome::InProgress));
    attempt.complete("done").await.unwrap();
    assert!(matches!(ask(other).await, LogOutcome::OtherArguments));
    let reordered: serde_json::Value = serde_json::from_str(r#"{"cents":1000,"to":"DE02"}"#).unwrap();
    assert!(matches!(ask(reordered).await, LogOutcome::Completed(_)));
}

async fn the_lease_is_kept_while_the_work_goes_on<DB: Dialect>(shop: Shop<DB>) {
    let (log, other) = (Log::new(&shop), Log::new(&shop));
    let attempt = log.begin().await;
    let begun = Instant::now();
    while begun.elapsed() < LEASE * 3 / 2 {
        assert!(other.is_in_progress().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!attempt.idempotency().is_cancelled());
    attempt.complete("done").await.unwrap();
    assert_eq!(other.result().await, "done");
}

async fn an_attempt_that_is_dropped_or_released_is_given_back<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop).with(|log| log.with_lease(Duration::from_secs(1000)));
    let failing = async |log: &Log| -> Result<(), std::fmt::Error> {
        let _attempt = log.begin().await;
        Err(std::fmt::Error)
    };
    failing(&log).await.unwrap_err();
    log.begin().await.release().await.unwrap();
    let panicking = log.begin().await;
    let panicked = tokio::spawn(async move {
        let _attempt = panicking;
        panic!("as the test wants it");
    });
    panicked.await.unwrap_err();
    // In a thread without a runtime its lease has to run out, or an operator must help.
    let attempt = log.begin().await;
    std::thread::spawn(move || drop(attempt)).join().unwrap();
    assert!(Log::new(&shop).is_in_progress().await);
    assert!(log.0.handle().evict(&log.1, &log.2).await.unwrap());
    log.begin().await.complete("done").await.unwrap();
    assert_eq!(log.result().await, "done");
}

async fn what_must_not_run_again_is_held<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let attempt = log.begin().await;
    let call = attempt.idempotency().intent("transfer").call(async |_| Err(CallFailure::unknown("reset")));
    assert!(matches!(call.await, Err(IntentError::Unknown { .. })));
    drop(attempt);
    until("it to be held", async || matches!(log.ask().await, LogOutcome::Held)).await;

    let key = IdempotencyKey::new("once").unwrap();
    let log = Log(log.0, log.1, key).with(|log| log.with_abandoned(AbandonedAttempts::Hold));
    drop(log.begin().await);
    until("it to be held", async || matches!(log.ask().await, LogOutcome::Held)).await;
    let found = StoredResponse::new(StatusCode::OK, Default::default(), "found");
    let resolved = log.0.handle().resolve(&log.1, &log.2, Resolution::complete(&found)).await.unwrap();
    assert_eq!(resolved, ResolveOutcome::Resolved);
    assert_eq!(log.result().await, "found");

    let log = Log(log.0, log.1, IdempotencyKey::new("contradiction").unwrap());
    let attempt = log.begin().await;
    transfer(&attempt, &Count::default()).await.unwrap();
    attempt.release().await.unwrap();
    let again = log.begin().await;
    let other = again.idempotency().intent("transfer").with_arguments(&2).call(async |_| Ok("tr".into()));
    assert!(matches!(other.await, Err(IntentError::OtherArguments)));
    assert!(matches!(again.complete("done").await, Err(IntentLogError::Held)));
    assert!(matches!(log.ask().await, LogOutcome::Held));
}

async fn an_attempt_that_lost_its_record_gets_the_result_of_its_successor<DB: Dialect>(shop: Shop<DB>) {
    let short = Log::new(&shop).with(|log| log.with_max_execution(Duration::from_millis(100)));
    let first = short.begin().await;
    let other = Log::new(&shop);
    let second = other.begin().await;
    assert!(first.idempotency().is_cancelled());
    assert_eq!(second.idempotency().record_id(), first.idempotency().record_id());
    second.complete("second").await.unwrap();
    assert_eq!(first.complete("first").await.unwrap(), "second");
    assert_eq!(other.result().await, "second");
}

async fn an_attempt_whose_record_has_gone_stores_nothing<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let attempt = log.begin().await;
    assert!(log.0.handle().evict(&log.1, &log.2).await.unwrap());
    assert!(matches!(attempt.complete("done").await, Err(IntentLogError::Lost)));
    assert!(log.0.handle().get(&log.1, &log.2).await.unwrap().is_none());
}

async fn the_end_is_stored_once_the_store_is_back<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let attempt = log.begin().await;
    shop.run("ALTER TABLE idempotency_records RENAME TO away").await;
    let (unstored, ()) = tokio::join!(attempt.complete("done"), async {
        tokio::time::sleep(LEASE * 3 / 2).await;
        shop.run("ALTER TABLE away RENAME TO idempotency_records").await;
    });
    assert!(matches!(unstored, Err(IntentLogError::Store(_))), "{unstored:?}");
    until("the result", async || matches!(log.ask().await, LogOutcome::Completed(_))).await;
    assert_eq!(log.result().await, "done");
}

async fn draining_waits_for_attempts_and_begins_no_more<DB: Dialect>(shop: Shop<DB>) {
    let log = Log::new(&shop);
    let attempt = log.begin().await;
    let handle = log.0.handle();
    assert_eq!(handle.drain(Duration::from_millis(50)).await.unwrap_err().running, 1);
    assert!(matches!(log.0.attempt(&log.1, &log.2, &ARGUMENTS).await, Err(IntentLogError::ShuttingDown)));
    let drained = tokio::spawn(async move { handle.drain(Duration::from_secs(30)).await });
    attempt.complete("done").await.unwrap();
    drained.await.unwrap().unwrap();
    assert_eq!(Log::new(&shop).result().await, "done");
}

async fn requests_and_jobs_share_the_store<DB: Dialect>(shop: Shop<DB>) {
    let node = shop.node();
    assert_eq!(node.send(charge("alice", "k")).await.status, StatusCode::CREATED);
    let log = node.handle.intent_log();
    let (alice, key) = (Consumer::new("alice").unwrap(), IdempotencyKey::new("k").unwrap());
    assert!(matches!(log.attempt(&alice, &key, &ARGUMENTS).await.unwrap(), LogOutcome::OtherArguments));
    let job = IdempotencyKey::new("job").unwrap();
    let LogOutcome::Run(attempt) = log.attempt(&alice, &job, &ARGUMENTS).await.unwrap() else {
        panic!("it is new")
    };
    attempt.complete("done").await.unwrap();
    let refused = node.send(charge("alice", "job")).await;
    refused.assert_refused(tower_idempotency::RejectionCode::FingerprintUnknown);
    assert_eq!(shop.stage.runs.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_keeps_to_the_time_limit_of_its_log() {
    let shop = Shop::<sqlx::Sqlite>::open().await;
    let options = TransactionOptions::default().with_time_limit(Duration::from_millis(100));
    let log = Log::new(&shop).with(|log| log.with_lease(Duration::from_secs(100)).with_transactions(options));
    let attempt = log.begin().await;
    let hangs = async |_: &mut sqlx::SqliteConnection| std::future::pending::<Result<(), TxError>>().await;
    let step = attempt.idempotency().phase("step", hangs);
    let error = tokio::time::timeout(Duration::from_secs(30), step).await.unwrap().unwrap_err();
    assert_eq!(error.code(), tower_idempotency::RejectionCode::TransactionLost);
}
