//! Where a second call could slip in, or an outcome be lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    http::{Extensions, StatusCode},
    response::IntoResponse,
};
use sqlx::Sqlite;
use tokio::time::{sleep, timeout};
use tower_idempotency::{
    CallFailure, Idempotency, IdempotencyKey, IdempotencyLayer, Intent, IntentError, Lookup, Reaper,
    Reconciler, RejectionCode, Resource, ResultPolicy, Tx, TxError,
    intent::{IntentFilter, Opened},
    store::{IntentFence, IntentUpdate, Resolution, ResolveOutcome},
};

use crate::{
    phases::{Site, on_both_stores},
    support::{app::consumer, db::Db, served::Count},
};

impl<DB: Db> Site<DB> {
    async fn intents(&self, filter: IntentFilter) -> Vec<Intent> {
        self.store.recovery().unwrap().list_intents(filter, 10).await.unwrap()
    }
}

on_both_stores!(
    what_is_settled_after_the_expiry_is_not_called_for_again,
    a_key_that_is_released_after_its_expiry_is_not_called_for_again,
    a_takeover_after_the_expiry_keeps_what_it_finalized,
    without_deduplication_a_loop_calls_once,
    without_deduplication_a_clock_that_is_set_back_changes_nothing,
    the_stricter_declaration_of_an_upstream_counts,
    a_call_that_outlives_its_handler_is_recorded,
    what_is_settled_inside_the_transaction_is_recorded_after_it,
    what_is_settled_inside_a_phase_is_recorded_after_it,
    the_next_call_is_not_taken_for_one_that_was_not_sent,
    a_step_that_commits_and_panics_holds_the_key,
    a_step_that_commits_and_is_dropped_holds_the_key,
    a_call_may_have_no_time_out,
    a_repeated_call_never_leaves_after_the_upstream_has_forgotten_its_key,
    a_reason_may_hold_what_a_database_cannot_store,
);

/// How long `short` keeps a record.
const RETENTION: Duration = Duration::from_secs(3);

fn short(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer
        .with_retention(Duration::from_secs(600 + 31))
        .with_lease(Duration::from_secs(1))
        .with_max_execution(RETENTION / 2)
        .with_retention(RETENTION)
        .with_reaper(Reaper::off())
}

/// A charge at an upstream that does not deduplicate; the first is made, but its reply is lost.
async fn what_is_settled_after_the_expiry_is_not_called_for_again<DB: Db>(site: Site<DB>) {
    let charges = Count::default();
    let counter = charges.clone();
    let handler = async move |idempotency: Idempotency| {
        let call = async |_| match counter.add() {
            1 => Err(CallFailure::unknown("reply lost")),
            n => Ok(Resource::new(format!("ch_{n}"))),
        };
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let node = site.node_with(handler, short);
    node.send().await.assert_refused(RejectionCode::OutcomeUnknown);
    let looks_up = Reconciler::new().on("charge", |_| async { Ok(Lookup::Unknown) });
    node.handle.start_reconciler(looks_up).unwrap();
    sleep(RETENTION + Duration::from_millis(100)).await;
    // Past its expiry the key is still held, and the client may ask again.
    let held = node.send().await;
    held.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(
        (held.problem()["retryable"].as_bool(), &held.headers["retry-after"]),
        (Some(true), &"60".parse().unwrap())
    );
    assert_eq!(charges.get(), 1);
    // Now it is found out that the charge was made.
    let open = site.intents(IntentFilter::Open).await.remove(0);
    let found = IntentUpdate::Finalize(Resource::new("ch_1"));
    let recovery = site.store.recovery().unwrap();
    recovery.update_intent(open.upstream_key, IntentFence::Operator, &found, None).await.unwrap();
    let answer = node.send().await;
    assert_eq!((charges.get(), &answer.body[..]), (1, &b"ch_1"[..]), "charged twice: {answer:?}");
}

async fn a_key_that_is_released_after_its_expiry_is_not_called_for_again<DB: Db>(site: Site<DB>) {
    let charges = Count::default();
    let counter = charges.clone();
    let handler = async move |idempotency: Idempotency| {
        let made = idempotency
            .intent("charge")
            .call(async |_| Ok(Resource::new(format!("ch_{}", counter.add()))))
            .await?;
        assert!(idempotency.attempt_number() > 1, "told to");
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let node = site.node_with(handler, |layer| short(layer).with_policy(ResultPolicy::at_most_once()));
    node.send().await.assert_refused(RejectionCode::HandlerPanicked);
    sleep(RETENTION + Duration::from_millis(100)).await;
    node.send().await.assert_refused(RejectionCode::OutcomeUnknown);
    let key = IdempotencyKey::new("key").unwrap();
    let resolved = node.handle.resolve(&consumer(), &key, Resolution::Release).await.unwrap();
    assert_eq!(resolved, ResolveOutcome::Resolved);
    let answer = node.send().await;
    assert_eq!(charges.get(), 1, "charged twice: {answer:?}");
}

async fn a_takeover_after_the_expiry_keeps_what_it_finalized<DB: Db>(site: Site<DB>) {
    let charges = Count::default();
    let counter = charges.clone();
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        let counter = counter.clone();
        async move {
            let call = async |_| match run {
                1 => Err(CallFailure::not_sent("upstream is down")),
                _ => Ok(Resource::new(format!("ch_{}", counter.add()))),
            };
            let made = idempotency.intent("charge").call(call).await?;
            if run == 2 {
                return Ok(StatusCode::INTERNAL_SERVER_ERROR.into_response());
            }
            Ok::<_, IntentError>((StatusCode::CREATED, made.id).into_response())
        }
    };
    let node = site.node_with(handler, short);
    node.send().await.assert_refused(RejectionCode::UpstreamUnavailable);
    sleep(RETENTION + Duration::from_millis(100)).await;
    // The old record goes on: it has an open intent.
    assert_eq!(node.send().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(charges.get(), 1);
    // A moment later.
    let answer = node.send().await;
    assert_eq!(charges.get(), 1, "charged twice: {answer:?}");
}

/// An upstream that does not deduplicate.
async fn without_deduplication_a_loop_calls_once<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let calls = AtomicUsize::new(0);
        let mut worst = 0;
        for i in 0..300 {
            calls.store(0, Ordering::SeqCst);
            for _ in 0..4 {
                let call = async |_| {
                    calls.fetch_add(1, Ordering::SeqCst);
                    Err(CallFailure::unknown("connection reset"))
                };
                let _ = idempotency.intent("charge").of(i).call(call).await;
            }
            worst = worst.max(calls.load(Ordering::SeqCst));
        }
        (StatusCode::CREATED, worst.to_string())
    };
    let answer = site.node(handler).send().await;
    assert_eq!(
        &answer.body[..],
        b"1",
        "a charge of unknown outcome was sent again to an upstream that does not deduplicate"
    );
}

async fn without_deduplication_a_clock_that_is_set_back_changes_nothing<DB: Db>(site: Site<DB>) {
    let charges = Count::default();
    let counter = charges.clone();
    let handler = async move |idempotency: Idempotency| {
        let call = async |_| {
            counter.add();
            Err(CallFailure::unknown("reply lost"))
        };
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let node = site.node(handler);
    node.send().await.assert_refused(RejectionCode::OutcomeUnknown);
    // The clock of the store steps back by a minute (time synchronization, failover): all its times lie a minute later.
    match DB::NAME {
        "SQLite" => {
            site.run("UPDATE idempotency_intents SET repeatable_until = repeatable_until + 60000").await;
            site.run("UPDATE idempotency_records SET lease_until = lease_until + 0, repeatable_until = repeatable_until + 60000").await;
        }
        _ => {
            site.run(
                "UPDATE idempotency_intents SET repeatable_until = repeatable_until + interval '1 minute'",
            )
            .await;
            site.run(
                "UPDATE idempotency_records SET repeatable_until = repeatable_until + interval '1 minute'",
            )
            .await;
        }
    }
    let answer = node.send().await;
    assert_eq!(charges.get(), 1, "charged twice: {answer:?}");
}

async fn the_stricter_declaration_of_an_upstream_counts<DB: Db>(site: Site<DB>) {
    let charges = Count::default();
    let counter = charges.clone();
    let v1 = async move |idempotency: Idempotency| {
        let call = async |_| {
            counter.add();
            Err(CallFailure::unknown("reply lost"))
        };
        let made =
            idempotency.intent("charge").deduplicates_for(Duration::from_secs(86400)).call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    site.node(v1).send().await.assert_refused(RejectionCode::OutcomePending);
    let counter = charges.clone();
    let v2 = async move |idempotency: Idempotency| {
        let call = async |_| {
            counter.add();
            Ok(Resource::new("ch_2"))
        };
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let answer = site.node(v2).send_after_end().await;
    assert_eq!(charges.get(), 1, "called again though the upstream is said not to deduplicate: {answer:?}");
}

async fn a_call_that_outlives_its_handler_is_recorded<DB: Db>(site: Site<DB>) {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let handler = async move |idempotency: Idempotency| {
        let sender = sender.clone();
        let Opened::Call(open) = idempotency.intent("charge").open().await? else { panic!() };
        tokio::spawn(async move {
            // The upstream takes its time.
            sleep(Duration::from_millis(300)).await;
            let done = open.finalize("ch_1").await;
            let _ = sender.send(format!("{done:?}")).await;
        });
        Ok::<_, IntentError>(StatusCode::ACCEPTED)
    };
    let node = site.node(handler);
    assert_eq!(node.send().await.status, StatusCode::ACCEPTED);
    let said = receiver.recv().await.unwrap();
    assert!(site.intents(IntentFilter::Open).await.is_empty(), "the charge is made and not recorded: {said}");
}

async fn what_is_settled_inside_the_transaction_is_recorded_after_it<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency, extensions: Extensions| {
        let Opened::Call(open) = idempotency.intent("charge").open().await? else { panic!() };
        // The charge is made here; then it is written down.
        let mut tx = Tx::<DB>::begin(&extensions).await?;
        DB::run(&mut tx, "INSERT INTO steps VALUES ('ch_1')").await?;
        drop(tx);
        let said = format!("{:?}", open.finalize("ch_1").await);
        Ok::<_, TxError>((StatusCode::CREATED, said))
    };
    let answer = site.node(handler).send().await;
    assert_eq!(answer.status, StatusCode::CREATED);
    sleep(Duration::from_secs(2)).await;
    assert!(site.intents(IntentFilter::Open).await.is_empty(), "the charge is never recorded: {answer:?}");
}

async fn what_is_settled_inside_a_phase_is_recorded_after_it<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let Opened::Call(open) = idempotency.intent("charge").open().await? else { panic!() };
        let started = Instant::now();
        let mut said = String::new();
        let step = async |tx: &mut DB::Connection| {
            DB::run(tx, "INSERT INTO steps VALUES ('ch_1')").await?;
            said = format!("{:?}", open.finalize("ch_1").await);
            Ok::<_, TxError>(())
        };
        let phase = idempotency.phase("note", step).await;
        Ok::<_, TxError>((StatusCode::CREATED, format!("{:?} {said} {phase:?}", started.elapsed())))
    };
    let started = Instant::now();
    let answer = site.node(handler).send().await;
    assert!(started.elapsed() < Duration::from_secs(2), "waits for itself: {answer:?}");
}

/// Pays each of two out; goes on with the next when one cannot be reached.
async fn the_next_call_is_not_taken_for_one_that_was_not_sent<DB: Db>(site: Site<DB>) {
    let paid: Arc<[AtomicUsize; 2]> = Arc::default();
    let book = Arc::clone(&paid);
    let down = AtomicBool::new(true);
    let down = Arc::new(down);
    let handler = async move |idempotency: Idempotency| {
        let mut got = Vec::new();
        for (recipient, paid) in book.iter().enumerate() {
            let call = async |_| {
                if down.swap(false, Ordering::SeqCst) {
                    return Err(CallFailure::not_sent("connection refused"));
                }
                paid.fetch_add(1, Ordering::SeqCst);
                Ok(Resource::new(format!("to {recipient}")))
            };
            got.push(
                idempotency
                    .intent("payout")
                    .call(call)
                    .await
                    .map(|made| made.id)
                    .map_err(|error| error.to_string()),
            );
        }
        let all = got.iter().all(Result::is_ok);
        let status = if all { StatusCode::CREATED } else { StatusCode::SERVICE_UNAVAILABLE };
        (status, format!("{got:?}"))
    };
    let node = site.node(handler);
    let first = node.send().await;
    let second = node.send_after_end().await;
    let paid = [paid[0].load(Ordering::SeqCst), paid[1].load(Ordering::SeqCst)];
    assert_eq!(paid, [1, 1], "{:?} then {:?}", first.body, second.body);
}

async fn a_step_that_commits_and_panics_holds_the_key<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            DB::run(tx, "INSERT INTO steps VALUES ('step')").await?;
            DB::run(tx, "COMMIT").await?;
            if true {
                panic!("told to");
            }
            Ok::<_, TxError>(())
        };
        idempotency.phase("step", step).await.map(|()| StatusCode::CREATED)
    };
    let node = site.node(handler);
    node.send().await;
    let answer = node.send_after_end().await;
    assert_eq!(site.all_steps().await, 1, "not held: {answer:?}");
}

async fn a_step_that_commits_and_is_dropped_holds_the_key<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let step = async |tx: &mut DB::Connection| {
            DB::run(tx, "INSERT INTO steps VALUES ('step')").await?;
            DB::run(tx, "COMMIT").await?;
            sleep(Duration::from_secs(60)).await;
            Ok::<_, TxError>(())
        };
        match timeout(Duration::from_millis(200), idempotency.phase("step", step)).await {
            Ok(done) => done.map(|()| StatusCode::CREATED),
            Err(_) => Ok(StatusCode::SERVICE_UNAVAILABLE),
        }
    };
    let node = site.node(handler);
    node.send().await;
    let answer = node.send_after_end().await;
    assert_eq!(site.all_steps().await, 1, "not held: {answer:?}");
}

async fn a_call_may_have_no_time_out<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let call = async |_| Ok(Resource::new("ch_1"));
        let made = idempotency.intent("charge").with_timeout(Duration::MAX).call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let answer = site.node(handler).send().await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
}

/// An upstream that recognizes a key for 2 s.
async fn a_repeated_call_never_leaves_after_the_upstream_has_forgotten_its_key<DB: Db>(site: Site<DB>) {
    let first: Arc<std::sync::Mutex<Option<Instant>>> = Arc::default();
    let charges = Count::default();
    let counter = charges.clone();
    let runs = Count::default();
    let handler = async move |idempotency: Idempotency| {
        let run = runs.add();
        let call = async |_| {
            if run == 2 {
                // A pooled connection must be made first, a token fetched: well within the time-out of 30 s.
                sleep(Duration::from_millis(1500)).await;
            }
            let now = Instant::now();
            let mut known = first.lock().unwrap();
            if known.is_none_or(|at| now - at > Duration::from_secs(2)) {
                counter.add();
                *known = Some(now);
            }
            if run == 1 { Err(CallFailure::unknown("reply lost")) } else { Ok(Resource::new("ch")) }
        };
        let made = idempotency.intent("charge").deduplicates_for(Duration::from_secs(2)).call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let node = site.node(handler);
    node.send().await;
    sleep(Duration::from_millis(1200)).await;
    let answer = node.send_after_end().await;
    assert_eq!(charges.get(), 1, "charged twice: {answer:?}");
}

async fn a_reason_may_hold_what_a_database_cannot_store<DB: Db>(site: Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let call = async |_| Err(CallFailure::from_status(StatusCode::UNPROCESSABLE_ENTITY, "bad iban \0"));
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let started = Instant::now();
    let answer = site.node(handler).send().await;
    let took = started.elapsed();
    let open = site.intents(IntentFilter::Open).await;
    assert!(
        open.is_empty() && took < Duration::from_secs(3),
        "{took:?} {:?} open: {}",
        answer.rejection,
        open.len()
    );
}

/// Also for a handler whose errors are those of its transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_stored_as_the_answer_of_the_handler() {
    let site = Site::<Sqlite>::open().await;
    let handler = async |idempotency: Idempotency| {
        idempotency.intent("charge").call(async |_| Err(CallFailure::refused("card declined"))).await?;
        Ok::<_, TxError>(StatusCode::CREATED)
    };
    let node = site.node(handler);
    let first = node.send().await;
    assert_eq!((first.status, first.rejection), (StatusCode::UNPROCESSABLE_ENTITY, None), "{first:?}");
    first.assert_same_replay(&node.send().await);
}
