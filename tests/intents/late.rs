//! Completers, jobs and look-ups that come late, or to something else than they expect.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Waker},
    time::Duration,
};

use axum::{Router, body::Body, extract::Request, http::StatusCode, response::IntoResponse, routing::post};
use sqlx::Database as _;
use tower_idempotency::{
    CallFailure, Consumer, Idempotency, IdempotencyKey, IntentLog, Reaper, ResultPolicy,
    intent::{IntentFilter, IntentResolution},
    jobs::LogOutcome,
    layer::AbandonedAttempts,
    recovery::{Completer, Refused, Restore},
    store::RecordState,
};

use crate::shop::{Act, Dialect, LEASE, Node, Shop, charge, completer, on_both_stores, restore_user, until};

on_both_stores!(
    who_is_late_does_not_undo_what_others_have_found_out,
    a_route_that_has_lost_its_layer_is_sent_to_once,
    a_record_that_counts_as_absent_stays_so_when_its_intents_are_looked_at,
    a_job_that_nobody_waits_for_when_it_is_won_is_given_back,
    a_hung_job_does_not_keep_its_key_from_its_own_process,
    a_client_error_because_of_a_header_that_was_not_kept_is_not_stored,
    a_target_in_absolute_form_without_a_path_can_be_sent_again,
    what_was_not_sent_is_no_try,
);

struct Gated {
    calls: AtomicU32,
    gate: tokio::sync::Notify,
    entered: tokio::sync::Notify,
}
struct GatedRestore(Arc<Gated>);
#[async_trait::async_trait]
impl Restore for GatedRestore {
    async fn restore(&self, _: &mut axum::http::Request<()>, _: &Consumer) -> Result<(), Refused> {
        if self.0.calls.fetch_add(1, Ordering::SeqCst) == 0 {
            self.0.entered.notify_one();
            self.0.gate.notified().await;
            return Err(Refused::for_now("the user database is away"));
        }
        Err(Refused::new("the user was revoked"))
    }
}

async fn who_is_late_does_not_undo_what_others_have_found_out<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let (a, b) = (shop.node(), shop.node());
    let gated =
        Arc::new(Gated { calls: AtomicU32::new(0), gate: Default::default(), entered: Default::default() });
    let make = |node: &Node| {
        let pause = Duration::from_millis(10);
        Completer::new(node.app.clone().into_service::<Body>(), GatedRestore(Arc::clone(&gated)))
            .with_backoff(pause, pause)
    };
    let (slow, fast) = (make(&a), make(&b));
    let a2 = a.clone();
    until("abandoned", async || a2.is_abandoned("alice", "k").await).await;
    let late = tokio::spawn(async move {
        loop {
            let pass = a2.handle.complete_abandoned(&slow).await.unwrap();
            if pass.taken > 0 {
                return pass;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    gated.entered.notified().await;
    // Past the pause: another node takes it, and its user is refused for good.
    let pass = b.complete(&fast, 1).await;
    assert_eq!(pass.need_attention, 1, "{pass:?}");
    assert_eq!(b.needs().await, ["the user was revoked"]);
    gated.gate.notify_one();
    late.await.unwrap();
    let tries = shop.number("SELECT tries FROM idempotency_requests").await;
    assert_eq!((b.needs().await, tries), (vec!["the user was revoked".to_owned()], 2));
}

async fn a_route_that_has_lost_its_layer_is_sent_to_once<DB: Dialect>(shop: Shop<DB>) {
    for (key, status) in [("k1", StatusCode::SEE_OTHER), ("k2", StatusCode::GATEWAY_TIMEOUT)] {
        shop.abandon(Act::Hang, charge("alice", key)).await;
        let node = shop.node();
        let charges = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&charges);
        // The new release has lost its layer on this route: it charges the card, and answers with a redirect or too late.
        let unguarded = Router::new().fallback(move |_: Request| {
            counter.fetch_add(1, Ordering::SeqCst);
            async move { status }
        });
        let completer = completer(unguarded, restore_user);
        node.complete(&completer, 1).await;
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            node.handle.complete_abandoned(&completer).await.unwrap();
        }
        assert_eq!(charges.load(Ordering::SeqCst), 1, "{status}: {:?}", node.needs().await);
    }
}

async fn a_record_that_counts_as_absent_stays_so_when_its_intents_are_looked_at<DB: Dialect>(shop: Shop<DB>) {
    let log = IntentLog::new(shop.store()).with_lease(LEASE).with_reaper(Reaper::off());
    let (consumer, key) = (Consumer::new("queue").unwrap(), IdempotencyKey::new("m").unwrap());
    let LogOutcome::Run(attempt) = log.attempt(&consumer, &key, &1).await.unwrap() else { panic!() };
    let _ = attempt.idempotency().intent("transfer").call(async |_| Err(CallFailure::unknown("reset"))).await;
    drop(attempt);
    let handle = log.handle();
    let mut intents = Vec::new();
    until("the intent and the release", async || {
        intents = handle.list_intents(IntentFilter::Open, 10).await.unwrap();
        let record = handle.get(&consumer, &key).await.unwrap();
        intents.len() == 1
            && record.is_some_and(|record| record.attempt.is_none() || record.state == RecordState::Held)
    })
    .await;
    // An operator, or the reconciler by Absent(recheck): the upstream does not know it.
    let intent = intents[0].upstream_key;
    handle.resolve_intent(intent, IntentResolution::Absent).await.unwrap();
    // The record expires. No lease, nothing unresolved: from now on it counts as absent.
    let past = if DB::NAME == sqlx::Sqlite::NAME {
        "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER) - 1000"
    } else {
        "now() - interval '1 second'"
    };
    let created = if DB::NAME == sqlx::Sqlite::NAME {
        "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER) - 86401000"
    } else {
        "now() - interval '86401 seconds'"
    };
    shop.run(&format!("UPDATE idempotency_records SET expires_at = {past}, created_at = {created}")).await;
    // The last look-up of an intent that was declared absent, or an operator.
    handle.resolve_intent(intent, IntentResolution::LookAgain).await.unwrap();
    let outcome = log.attempt(&consumer, &key, &2).await.unwrap();
    assert!(matches!(outcome, LogOutcome::Run(_)), "an expired record counts as absent: {outcome:?}");
}

async fn a_job_that_nobody_waits_for_when_it_is_won_is_given_back<DB: Dialect>(shop: Shop<DB>) {
    let log = IntentLog::new(shop.store())
        .with_lease(LEASE)
        .with_reaper(Reaper::off())
        .with_abandoned(AbandonedAttempts::Hold);
    log.handle().prepare().await.unwrap();
    let (consumer, key) = (Consumer::new("queue").unwrap(), IdempotencyKey::new("m").unwrap());
    {
        let mut attempt = Box::pin(log.attempt(&consumer, &key, &1));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(attempt.as_mut().poll(&mut cx).is_pending());
        // The worker is busy with something else; the claim is won and its answer lies in the channel.
        tokio::time::sleep(Duration::from_millis(500)).await;
        // And the caller's `select!` or `timeout` takes the other branch.
    }
    tokio::time::sleep(LEASE * 2).await;
    let record = log.handle().get(&consumer, &key).await.unwrap();
    assert!(record.is_none(), "no work was begun: {record:?}");
}

async fn a_hung_job_does_not_keep_its_key_from_its_own_process<DB: Dialect>(shop: Shop<DB>) {
    let log = IntentLog::new(shop.store())
        .with_reaper(Reaper::off())
        .with_lease(LEASE)
        .with_max_execution(Duration::from_millis(500));
    let (consumer, key) = (Consumer::new("queue").unwrap(), IdempotencyKey::new("m").unwrap());
    let LogOutcome::Run(_hung) = log.attempt(&consumer, &key, &1).await.unwrap() else { panic!() };
    tokio::time::sleep(LEASE * 4).await;
    let outcome = log.attempt(&consumer, &key, &1).await.unwrap();
    let elsewhere = IntentLog::new(shop.store()).attempt(&consumer, &key, &1).await.unwrap();
    assert!(matches!(outcome, LogOutcome::Run(_)), "here {outcome:?}, another process {elsewhere:?}");
}

async fn a_client_error_because_of_a_header_that_was_not_kept_is_not_stored<DB: Dialect>(shop: Shop<DB>) {
    let runs = Arc::new(AtomicU32::new(0));
    let make = || {
        let layer = shop.layer();
        let handle = layer.handle();
        let runs = Arc::clone(&runs);
        let handler = move |request: Request| {
            let runs = Arc::clone(&runs);
            async move {
                // As axum-extra's TypedHeader does it, or a check of a webhook's signature.
                if request.headers().get("x-signature").is_none() {
                    return StatusCode::BAD_REQUEST.into_response();
                }
                let idempotency = request.extensions().get::<Idempotency>().unwrap().clone();
                idempotency.intent("charge").call(async |_| Ok("ch_1".into())).await.unwrap();
                match runs.fetch_add(1, Ordering::SeqCst) {
                    0 => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
                    _ => (StatusCode::CREATED, "ch_1").into_response(),
                }
            }
        };
        let app = Router::new().route("/pay", post(handler)).layer(layer);
        let app = app.layer(axum::middleware::map_request(async |mut request: Request| {
            request.extensions_mut().insert(Consumer::new("alice").unwrap());
            request
        }));
        Node { app, handle }
    };
    let pay = || {
        Request::post("/pay")
            .header("idempotency-key", "k")
            .header("x-signature", "s")
            .body(Body::from("1"))
            .unwrap()
    };
    let node = make();
    assert_eq!(node.send(pay()).await.status, 500);
    let completer = completer(node.app.clone(), restore_user);
    let pass = node.complete(&completer, 1).await;
    assert_eq!((pass.need_attention, node.needs().await.len()), (1, 1), "{pass:?}");
    let retry = node.send(pay()).await;
    assert_eq!((retry.status.as_u16(), &retry.body[..]), (201, &b"ch_1"[..]), "{retry:?}");
}

async fn a_target_in_absolute_form_without_a_path_can_be_sent_again<DB: Dialect>(shop: Shop<DB>) {
    let layer = shop.layer();
    let handle = layer.handle();
    let runs = Arc::new(AtomicU32::new(0));
    let handler = {
        let runs = Arc::clone(&runs);
        move |request: Request| {
            let runs = Arc::clone(&runs);
            async move {
                let idempotency = request.extensions().get::<Idempotency>().unwrap().clone();
                idempotency.intent("charge").call(async |_| Ok("ch_1".into())).await.unwrap();
                if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                    StatusCode::INTERNAL_SERVER_ERROR
                } else {
                    StatusCode::CREATED
                }
            }
        }
    };
    let app = Router::new().route("/", post(handler)).layer(layer);
    let app = app.layer(axum::middleware::map_request(async |mut request: Request| {
        request.extensions_mut().insert(Consumer::new("alice").unwrap());
        request
    }));
    let node = Node { app, handle };
    let request =
        Request::post("http://pay.example?x=1").header("idempotency-key", "k").body(Body::empty()).unwrap();
    assert_eq!(node.send(request).await.status, 500);
    let pass = node.complete(&completer(node.app.clone(), restore_user), 1).await;
    assert_eq!(pass.completed, 1, "{pass:?} {:?}", node.needs().await);
}

async fn what_was_not_sent_is_no_try<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let (node, leaving) = (shop.node(), shop.node());
    // As in five rolling restarts that each come while the request is taken.
    leaving.handle.drain(Duration::from_secs(1)).await.unwrap();
    let completer_ = completer(leaving.app.clone(), restore_user);
    for _ in 0..5 {
        let pass = node.complete(&completer_, 1).await;
        assert_eq!(pass.again, 1, "{pass:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pass = node.complete(&node.completer(), 1).await;
    assert_eq!(pass.completed, 1, "{pass:?} {:?} runs {}", node.needs().await, shop.stage.runs.get());
}

/// A trigger ends the lease at once: stands for a process that is stopped between its claim and keeping its request.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_could_not_be_kept_in_time_is_given_back() {
    let shop = Shop::<sqlx::Sqlite>::open().await;
    let layer = shop.layer().with_lease(Duration::from_secs(20)).with_policy(ResultPolicy::at_most_once());
    let node = Node::new(layer, &shop.stage);
    node.handle.prepare().await.unwrap();
    shop.run("CREATE TRIGGER frozen AFTER INSERT ON idempotency_records BEGIN UPDATE idempotency_records SET lease_until = 0; END").await;
    node.send(charge("alice", "k")).await;
    shop.run("DROP TRIGGER frozen").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(shop.stage.runs.get(), 0);
    let retry = node.send(charge("alice", "k")).await;
    assert_eq!(
        retry.status,
        201,
        "the handler was never started: {retry:?} {:?}",
        node.record("alice", "k").await
    );
}

/// The row of a running transaction is locked, and its lease is not renewed meanwhile.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn a_request_in_a_long_transaction_is_not_abandoned() {
    let shop = Shop::<sqlx::Postgres>::open().await;
    let layer = shop.layer().with_lease(Duration::from_secs(2));
    let handle = layer.handle();
    handle.prepare().await.unwrap();
    let handler = |request: Request| async move {
        let mut tx = tower_idempotency::Tx::<sqlx::Postgres>::begin(request.extensions()).await.unwrap();
        for _ in 0..60 {
            sqlx::query("SELECT pg_sleep(0.3)").execute(&mut *tx).await.unwrap();
        }
        StatusCode::CREATED
    };
    let app = Router::new().route("/pay", post(handler)).layer(layer);
    let app = app.layer(axum::middleware::map_request(async |mut request: Request| {
        request.extensions_mut().insert(Consumer::new("alice").unwrap());
        request
    }));
    let node = Node { app, handle };
    let client = node.clone();
    let running = tokio::spawn(async move {
        client.send(Request::post("/pay").header("idempotency-key", "k").body(Body::from("1")).unwrap()).await
    });
    let other = shop.node();
    let completer = completer(other.app.clone(), restore_user).with_max_tries(1);
    let started = std::time::Instant::now();
    let mut passes = Vec::new();
    while !running.is_finished() && other.needs().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = std::time::Instant::now();
        let pass = other.handle.complete_abandoned(&completer).await.unwrap();
        if pass.taken > 0 {
            passes.push((begun.elapsed(), pass));
        }
    }
    let (needs, finished) = (other.needs().await, running.is_finished());
    assert!(
        needs.is_empty(),
        "{needs:?} after {:?}, finished: {finished}, passes {passes:?}; the client: {:?}",
        started.elapsed(),
        running.await
    );
}

/// The reconciler's last look-up comes when the record has expired.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_look_does_not_bring_an_expired_request_back() {
    let shop = Shop::<sqlx::Sqlite>::open().await;
    shop.abandon(Act::HangInCall, charge("alice", "k")).await;
    let node = shop.node();
    let ms = Duration::from_millis(1);
    let reconciler = tower_idempotency::Reconciler::new()
        .on("transfer", |_| async { Ok(tower_idempotency::Lookup::NotFound) })
        .with_confirmation_after(ms)
        .with_recheck_after(ms);
    until("the lease to be over", async || {
        node.record("alice", "k").await.unwrap().state == RecordState::Held
    })
    .await;
    shop.run("UPDATE idempotency_intents SET look_at = 0, dangling_at = 0").await;
    let mut absent = 0;
    until("it to be absent", async || {
        absent += node.handle.reconcile(&reconciler).await.unwrap().absent;
        absent == 1
    })
    .await;
    let now = "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)";
    shop.run(&format!(
        "UPDATE idempotency_records SET expires_at = {now} - 1, created_at = {now} - 86400001"
    ))
    .await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let before = node.handle.complete_abandoned(&node.completer()).await.unwrap();
    assert_eq!((before.taken, shop.stage.runs.get()), (0, 1), "expired");
    node.handle.reconcile(&reconciler).await.unwrap();
    let after = node.handle.complete_abandoned(&node.completer()).await.unwrap();
    assert_eq!(
        (after.taken, shop.stage.runs.get()),
        (0, 1),
        "it had expired: {after:?} {:?}",
        node.record("alice", "k").await
    );
}
