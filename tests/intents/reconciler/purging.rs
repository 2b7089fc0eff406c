//! What is purged of requests that made calls.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::{IdempotencyLayer, Reaper, RejectionCode, intent::IntentResolution};

use super::lookups::dangle;
use crate::{
    payouts::{Bank, Node, Say, Transfer, World, on_both_stores, until},
    records_alone::RecordsAlone,
    support::{
        db::Db,
        direct::{self, charge},
    },
};

on_both_stores! {
    an_expired_record_stays_until_its_intents_are_settled,
    a_key_that_is_used_anew_has_another_upstream_key,
    settled_intents_are_purged_after_their_retention_once_their_record_is_gone,
    the_reaper_purges_records_and_their_settled_intents,
}

/// Longer than any time that a test makes pass.
const YEAR: Duration = Duration::from_secs(365 * 86_400);
const HOUR: Duration = Duration::from_secs(3600);

async fn an_expired_record_stays_until_its_intents_are_settled<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::NotSent);
    node.pay("not sent").await.assert_refused(RejectionCode::UpstreamUnavailable);
    dangle(&world, &node, &bank, "open").await;
    world.expire_records().await;
    assert_eq!(node.handle.purge(100).await.unwrap(), 0);
    assert_eq!(node.record("open").await.unwrap().unresolved, 1);
    node.pay("open").await.assert_refused(RejectionCode::OutcomeUnknown);

    bank.says("open", &[Say::Found]);
    let pass = node.handle.reconcile(&bank.reconciler()).await.unwrap();
    assert_eq!((pass.found, pass.absent), (1, 1));
    assert_eq!(node.handle.purge(100).await.unwrap(), 2);
    assert!(node.record("open").await.is_none());
}

async fn a_key_that_is_used_anew_has_another_upstream_key<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    for purges in [false, true] {
        assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
        world.expire_records().await;
        if purges {
            assert_eq!(node.handle.purge(100).await.unwrap(), 1);
        }
    }
    assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
    let mut keys = bank.calls("k");
    keys.dedup();
    assert_eq!(keys.len(), 3, "{keys:?}");
}

async fn settled_intents_are_purged_after_their_retention_once_their_record_is_gone<DB: Db>(
    world: World<DB>,
) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let purged = async |retention| node.handle.purge_settled(retention, 100).await.unwrap();
    let intents = async || world.number("SELECT count(*) FROM idempotency_intents").await;
    assert_eq!(node.pay("settled").await.status, StatusCode::CREATED);
    let open = dangle(&world, &node, &bank, "open").await;
    assert_eq!((purged(HOUR).await, intents().await), (0, 2), "their records are there");
    world.run("DELETE FROM idempotency_records").await;
    assert_eq!((purged(YEAR).await, intents().await), (0, 2), "they are not old enough");
    assert_eq!((purged(HOUR).await, intents().await), (1, 1), "one is open");

    bank.says("open", &[Say::NotFound, Say::NotFound, Say::Found]);
    for _ in 0..2 {
        node.handle.reconcile(&bank.reconciler()).await.unwrap();
        world.age_intents().await;
    }
    assert_eq!(purged(HOUR).await, 0, "it is to be looked up a last time");
    node.handle.reconcile(&bank.reconciler()).await.unwrap();
    assert_eq!(purged(HOUR).await, 0, "it needs attention");
    node.handle.resolve_intent(open, IntentResolution::Acknowledge).await.unwrap();
    assert_eq!((purged(HOUR).await, intents().await), (1, 0));
}

async fn the_reaper_purges_records_and_their_settled_intents<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let reaper = Reaper::every(Duration::from_millis(20), 2);
    let node =
        Node::new(std::sync::Arc::clone(&world.store), &bank, reaper.clone().with_intent_retention(HOUR));
    for n in 0..9 {
        assert_eq!(node.pay(&n.to_string()).await.status, StatusCode::CREATED);
    }
    world.age_intents().await;
    world.expire_records().await;
    let left = async |table| world.number(&format!("SELECT count(*) FROM idempotency_{table}")).await;
    until("all is purged", async || left("records").await + left("intents").await == 0).await;

    let other = Node::new(std::sync::Arc::clone(&world.store), &bank, reaper);
    node.handle.drain(Duration::from_secs(30)).await.unwrap();
    assert_eq!(other.pay("paper trail").await.status, StatusCode::CREATED);
    world.age_intents().await;
    world.expire_records().await;
    until("the record is purged", async || left("records").await == 0).await;
    other.handle.drain(Duration::from_secs(30)).await.unwrap();
    assert_eq!(left("intents").await, 1, "it is kept for 90 days");
}

#[tokio::test]
async fn the_reaper_purges_a_store_without_intents() {
    let reaper = Reaper::every(Duration::from_millis(10), 10).with_intent_retention(Duration::ZERO);
    let layer = IdempotencyLayer::new(RecordsAlone::default()).with_reaper(reaper);
    let layer = layer.with_max_execution(Duration::from_millis(50)).with_lease(Duration::from_millis(100));
    let layer = layer.with_retention(Duration::from_millis(200));
    let handle = layer.handle();
    let (app, _) = direct::counting(layer);
    direct::send(&app, charge("k")).await;
    let (consumer, key) = direct::identity();
    until("the record is purged", async || handle.get(&consumer, &key).await.unwrap().is_none()).await;
}
