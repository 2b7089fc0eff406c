//! What is kept of a request before its handler runs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use axum::http::{HeaderName, StatusCode, header};
use sqlx::Postgres;
use tower::Layer;
use tower_idempotency::{
    Consumer, ConsumerExtractor, Fingerprinter, IdempotencyKey, IdempotencyLayer, MemoryStore, RejectionCode,
    recovery::KeptRequests,
    store::{Attempt, Claim, ClaimOutcome},
};

use crate::{
    records_alone::RecordsAlone,
    shop::{Act, Dialect, Node, Shop, TENANT, TOKEN, charge, is_completed, on_both_stores, until},
    support::direct,
};

on_both_stores!(
    no_credential_is_in_the_database,
    a_request_is_kept_until_its_record_is_completed,
    a_request_that_cannot_be_kept_is_not_run,
    a_request_whose_first_process_died_before_it_was_kept_is_kept_by_the_next,
    a_request_without_a_key_and_a_replay_are_not_kept,
    a_failure_that_the_client_was_told_is_not_sent_again,
);

async fn no_credential_is_in_the_database<DB: Dialect>(shop: Shop<DB>) {
    let kept = KeptRequests::new().add_header(header::ACCEPT_LANGUAGE);
    let layer = shop.layer().with_kept_requests(kept.with_abandoned_after(Duration::from_millis(1)));
    shop.abandon_behind(layer, Act::HangInCall, charge("alice", "k")).await;
    let other = shop
        .layer()
        .with_consumer(ConsumerExtractor::from_fn(|parts| parts.extensions.get::<Consumer>().cloned()));
    shop.abandon_behind(other, Act::Hang, charge("bob", "k")).await;
    assert_eq!(shop.kept_requests().await, 2);
    assert_eq!(DB::occurrences(&shop.watcher, TOKEN).await, 0);
    // The same search finds what is kept.
    for (kept, times) in [("amount=2000", 2), ("dry=no&n=1", 2), ("accept-language", 1), ("alice", 3)] {
        assert_eq!(DB::occurrences(&shop.watcher, kept).await, times, "{kept}");
    }
}

/// What a layer says when it is built wrongly.
fn refusal(build: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer) -> Option<String> {
    let layer = IdempotencyLayer::new(MemoryStore::new());
    let refused = catch_unwind(AssertUnwindSafe(|| build(layer).layer(()))).err()?;
    Some(refused.downcast_ref::<String>().expect("a message").clone())
}

#[test]
fn credentials_cannot_be_chosen_in_whatever_order() {
    let named: fn(&str) -> HeaderName = |name| name.parse().unwrap();
    let keeping = |name: &str| KeptRequests::new().add_header(header::ACCEPT).add_header(named(name));
    let credentials = [
        "authorization",
        "cookie",
        "proxy-authorization",
        "x-api-key",
        "api-key",
        "apikey",
        "x-auth-token",
        "x-access-token",
    ];
    for name in credentials {
        let refused = refusal(|layer| layer.with_kept_requests(keeping(name))).expect(name);
        assert!(refused.starts_with(name) && refused.contains("cannot be kept"), "{refused}");
        let covering = || Fingerprinter::default().add_header(named(name));
        let kept = KeptRequests::new;
        let refused =
            refusal(|layer| layer.with_fingerprint(covering()).with_kept_requests(kept())).expect(name);
        assert!(refused.starts_with(&format!("the fingerprint covers {name}")), "{refused}");
        assert!(refusal(|layer| layer.with_kept_requests(kept()).with_fingerprint(covering())).is_some());
        assert!(refusal(|layer| layer.with_fingerprint(covering())).is_none());
    }
    let by_header = || ConsumerExtractor::header(named("x-account"));
    let refused = refusal(|layer| layer.with_consumer(by_header()).with_kept_requests(keeping("x-account")));
    assert!(refused.is_some_and(|refused| refused.starts_with("x-account")));
    assert!(
        refusal(|layer| layer.with_kept_requests(keeping("x-account")).with_consumer(by_header())).is_some()
    );
    assert!(refusal(|layer| layer.with_kept_requests(keeping("x-account"))).is_none());
}

async fn a_request_is_kept_until_its_record_is_completed<DB: Dialect>(shop: Shop<DB>) {
    let node = shop.node();
    shop.stage.then([Act::Slow(300)]);
    let answer = direct::start(&node.app, charge("alice", "k"));
    until("it to run", async || shop.stage.runs.get() == 1).await;
    let kept =
        "SELECT count(*) FROM idempotency_requests WHERE consumer = 'alice' AND key = 'k' AND tries = 0";
    assert_eq!(shop.number(kept).await, 1);
    assert_eq!(answer.await.unwrap().status, StatusCode::CREATED);
    assert!(is_completed(node.record("alice", "k").await.as_ref()));
    let recovery = shop.store().recovery().unwrap();
    recovery.purge_settled(Duration::from_secs(3600), 10).await.unwrap();
    assert_eq!(shop.kept_requests().await, 0);
}

async fn a_request_that_cannot_be_kept_is_not_run<DB: Dialect>(shop: Shop<DB>) {
    let node = Node::new(shop.layer().with_lease(Duration::from_secs(100)), &shop.stage);
    node.handle.prepare().await.unwrap();
    shop.run("ALTER TABLE idempotency_requests RENAME TO away").await;
    node.send(charge("alice", "k")).await.assert_refused(RejectionCode::StoreMisconfigured);
    until("the key to be given back", async || node.record("alice", "k").await.is_none()).await;
    shop.run("ALTER TABLE away RENAME TO idempotency_requests").await;
    assert_eq!(shop.stage.runs.get(), 0);
    assert_eq!(node.send(charge("alice", "k")).await.status, StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_request_that_is_not_kept_in_time_is_not_run_postgres() {
    let shop = Shop::<Postgres>::open().await;
    let layer =
        shop.layer().with_lease(Duration::from_secs(100)).with_store_timeout(Duration::from_millis(500));
    let node = Node::new(layer, &shop.stage);
    node.handle.prepare().await.unwrap();
    let mut locked = shop.watcher.begin().await.unwrap();
    sqlx::raw_sql("LOCK TABLE idempotency_requests").execute(&mut *locked).await.unwrap();
    node.send(charge("alice", "k")).await.assert_refused(RejectionCode::StoreUnavailable);
    until("the key to be given back", async || node.record("alice", "k").await.is_none()).await;
    locked.rollback().await.unwrap();
    assert_eq!(node.send(charge("alice", "k")).await.status, StatusCode::CREATED);
    assert_eq!((shop.stage.runs.get(), shop.kept_requests().await), (1, 1));
}

#[tokio::test]
async fn a_store_that_cannot_keep_requests_refuses_them() {
    let layer = IdempotencyLayer::new(RecordsAlone::default()).with_kept_requests(KeptRequests::new());
    let handle = layer.handle();
    let (app, runs) = direct::counting(layer);
    let refused = direct::send(&app, direct::charge("k")).await;
    refused.assert_refused(RejectionCode::StoreMisconfigured);
    assert!(refused.problem()["detail"].as_str().unwrap().contains("cannot keep requests"), "{refused:?}");
    let (consumer, key) = direct::identity();
    assert!(handle.get(&consumer, &key).await.unwrap().is_none());
    assert_eq!(runs.get(), 0);
}

async fn a_request_whose_first_process_died_before_it_was_kept_is_kept_by_the_next<DB: Dialect>(
    shop: Shop<DB>,
) {
    let node = shop.node();
    node.send(charge("alice", "k")).await;
    let fingerprint = node.record("alice", "k").await.unwrap().fingerprint;
    let (consumer, key) = (Consumer::new("alice").unwrap(), IdempotencyKey::new("k").unwrap());
    assert!(node.handle.evict(&consumer, &key).await.unwrap());
    shop.run("DELETE FROM idempotency_requests").await;
    let mut claim = Claim::new(Attempt::new(consumer, key), fingerprint);
    claim.lease = Duration::from_millis(1);
    let outcome = shop.store().claim(&claim).await.unwrap();
    assert!(matches!(outcome, ClaimOutcome::Won { .. }), "{outcome:?}");
    until("the lease to be over", async || node.is_abandoned("alice", "k").await).await;
    assert_eq!(shop.kept_requests().await, 0);

    shop.abandon(Act::Hang, charge("alice", "k")).await;
    assert_eq!(shop.kept_requests().await, 1);
    assert_eq!(node.complete(&node.completer(), 1).await.completed, 1);
    assert_eq!(node.record("alice", "k").await.unwrap().attempt_number, 3);
}

async fn a_request_without_a_key_and_a_replay_are_not_kept<DB: Dialect>(shop: Shop<DB>) {
    let node = shop.node();
    let mut without = charge("alice", "k");
    without.headers_mut().remove("idempotency-key");
    assert_eq!(node.send(without).await.status, StatusCode::ACCEPTED);
    node.send(charge("alice", "k")).await;
    shop.run("DELETE FROM idempotency_requests").await;
    assert!(node.send(charge("alice", "k")).await.is_replay());
    let mut other = charge("alice", "k");
    other.headers_mut().insert(TENANT, "another".parse().unwrap());
    node.send(other).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!(shop.kept_requests().await, 0);
}

/// Nothing is left to complete of a request that failed and on whose record nothing hangs. One that has called an upstream
/// is completed.
async fn a_failure_that_the_client_was_told_is_not_sent_again<DB: Dialect>(shop: Shop<DB>) {
    let node = Node::new(shop.layer(), &shop.stage);
    node.handle.prepare().await.unwrap();
    shop.stage.then([Act::Fail, Act::CallAndFail]);
    for key in ["nothing", "call"] {
        assert_eq!(node.send(charge("alice", key)).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
    until("the first to be released", async || node.record("alice", "nothing").await.is_none()).await;
    let pass = node.complete(&node.completer(), 1).await;
    assert_eq!((pass.taken, pass.completed, shop.stage.runs.get()), (1, 1, 3), "{pass:?}");
    node.assert_replays(|| charge("alice", "call"), "alice", "call").await;
    shop.store().recovery().unwrap().purge_settled(Duration::from_secs(3600), 10).await.unwrap();
    assert_eq!(shop.kept_requests().await, 0);
}
