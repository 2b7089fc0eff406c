//! The reconciler beside running attempts, and as a task.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use axum::http::StatusCode;
use tower_idempotency::{
    IdempotencyLayer, Reconciler, intent::IntentState, recovery::ReconcilerPass, store::StoreErrorKind,
};

use super::lookups::{dangle, intent};
use crate::{
    payouts::{Bank, Node, Say, Transfer, World, made, on_both_stores, until},
    records_alone::RecordsAlone,
    support::db::Db,
};

on_both_stores! {
    a_call_whose_attempt_owns_the_record_is_not_looked_up,
    an_attempt_that_comes_back_during_the_lookup_wins,
    a_call_that_is_made_again_during_the_lookup_wins,
    a_call_that_ends_after_it_was_declared_absent_is_reported,
    the_task_begins_at_once_and_goes_on,
    the_task_survives_a_store_that_fails,
    draining_waits_for_the_lookups_under_way_and_begins_no_more,
}

async fn a_call_whose_attempt_owns_the_record_is_not_looked_up<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::Waits);
    let request = node.start("k");
    bank.until_waiting(1).await;
    world.age_intents().await;
    assert_eq!(node.handle.count_intents().await.unwrap().dangling, 1);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap(), ReconcilerPass::default());

    world.end_leases().await;
    bank.says("k", &[Say::NotFound]);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().again, 1);
    bank.open();
    assert_eq!(request.await.unwrap().body, made("k"), "not found once is no reason to lose the call");
    assert_eq!(bank.lookups().values().sum::<usize>(), 1);
}

async fn an_attempt_that_comes_back_during_the_lookup_wins<DB: Db>(world: World<DB>) {
    let (bank, lookups) = (Bank::default(), Bank::default());
    let node = world.node(&bank);
    bank.transfers(Transfer::Waits);
    let request = node.start("k");
    bank.until_waiting(1).await;
    world.age_intents().await;
    world.end_leases().await;
    lookups.says("k", &[Say::NotFound, Say::WaitsAndFindsNothing]);
    assert_eq!(node.handle.reconcile(&lookups.reconciler()).await.unwrap().again, 1);
    world.age_intents().await;
    let pass = pass(&node, lookups.reconciler());
    lookups.until_waiting(1).await;
    bank.open();
    assert_eq!(request.await.unwrap().body, made("k"));
    lookups.open();
    assert_eq!(pass.await.unwrap().lost, 1);
    let key = bank.calls("k")[0];
    assert!(matches!(intent(&node, key).await.state, IntentState::Finalized(_)));
    assert!(node.pay("k").await.is_replay());
}

fn pass(node: &Node, reconciler: Reconciler) -> tokio::task::JoinHandle<ReconcilerPass> {
    let handle = node.handle.clone();
    tokio::spawn(async move { handle.reconcile(&reconciler).await.unwrap() })
}

async fn a_call_that_is_made_again_during_the_lookup_wins<DB: Db>(world: World<DB>) {
    let (bank, lookups) = (Bank::default(), Bank::default());
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    lookups.says("k", &[Say::NotFound, Say::WaitsAndFindsNothing]);
    assert_eq!(node.handle.reconcile(&lookups.reconciler()).await.unwrap().again, 1);
    world.age_intents().await;
    let pass = pass(&node, lookups.reconciler());
    lookups.until_waiting(1).await;
    let absent = tower_idempotency::intent::IntentResolution::Absent;
    node.handle.resolve_intent(key, absent).await.unwrap();
    bank.transfers(Transfer::Unknown);
    node.pay("k").await.assert_refused(tower_idempotency::RejectionCode::OutcomeUnknown);
    lookups.open();
    assert_eq!(pass.await.unwrap().lost, 1, "it was another call that was not found");
    let intent = intent(&node, key).await;
    assert_eq!((intent.state, intent.calls, intent.absences), (IntentState::Open { sent: true }, 2, 0));
}

async fn a_call_that_ends_after_it_was_declared_absent_is_reported<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::Waits);
    let request = node.start("k");
    bank.until_waiting(1).await;
    world.end_leases().await;
    bank.says("k", &[Say::NotFound]);
    for _ in 0..2 {
        world.age_intents().await;
        node.handle.reconcile(&bank.reconciler()).await.unwrap();
    }
    let key = bank.calls("k")[0];
    assert!(matches!(intent(&node, key).await.state, IntentState::Dead { absent: true, .. }));
    bank.open();
    assert_eq!(request.await.unwrap().body, made("k"));
    assert_eq!(node.need_attention().await[0].upstream_key, key);
    assert!(matches!(intent(&node, key).await.state, IntentState::Finalized(_)));
}

async fn the_task_begins_at_once_and_goes_on<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let first = dangle(&world, &node, &bank, "first").await;
    let found = async |key| matches!(intent(&node, key).await.state, IntentState::Finalized(_));
    bank.says("first", &[Say::Found]);
    node.handle.start_reconciler(bank.reconciler().with_interval(Duration::from_secs(1000))).unwrap();
    until("the first pass is over", || found(first)).await;

    bank.says("second", &[Say::Panics, Say::Fails, Say::Found]);
    let second = dangle(&world, &node, &bank, "second").await;
    let eager = bank.reconciler().with_interval(Duration::from_millis(20));
    node.handle.start_reconciler(eager.with_backoff(SOON, SOON)).unwrap();
    until("a later pass has found it", || found(second)).await;
    assert_eq!(bank.lookups()[&second], 3);
    node.handle.drain(Duration::from_secs(30)).await.unwrap();
}

async fn the_task_survives_a_store_that_fails<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    bank.says("k", &[Say::Found]);
    world.run("ALTER TABLE idempotency_intents RENAME TO gone").await;
    node.handle.start_reconciler(bank.reconciler().with_interval(Duration::from_millis(20))).unwrap();
    assert!(node.handle.reconcile(&bank.reconciler()).await.is_err());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(bank.lookups().len(), 0);
    world.run("ALTER TABLE gone RENAME TO idempotency_intents").await;
    let found = async || matches!(intent(&node, key).await.state, IntentState::Finalized(_));
    until("it is found", found).await;
}

async fn draining_waits_for_the_lookups_under_way_and_begins_no_more<DB: Db>(world: World<DB>) {
    let (bank, lookups) = (Bank::default(), Bank::default());
    let node = world.node(&bank);
    let mut keys = Vec::new();
    for name in ["one", "other"] {
        keys.push(dangle(&world, &node, &bank, name).await);
        lookups.says(name, &[Say::WaitsAndFindsNothing]);
    }
    node.handle.start_reconciler(lookups.reconciler().with_concurrency(1)).unwrap();
    lookups.until_waiting(1).await;
    let timed_out = node.handle.drain(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(timed_out.running, 1);
    let handle = node.handle.clone();
    let drained = tokio::spawn(async move { handle.drain(Duration::from_secs(30)).await });
    lookups.open();
    drained.await.unwrap().unwrap();
    let mut absences = Vec::new();
    for key in &keys {
        absences.push(intent(&node, *key).await.absences);
    }
    absences.sort_unstable();
    assert_eq!((absences, lookups.lookups().len()), (vec![0, 1], 1));
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap(), ReconcilerPass::default());
}

#[tokio::test]
async fn a_store_without_intents_has_nothing_to_reconcile() {
    let handle = IdempotencyLayer::new(RecordsAlone::default()).handle();
    let reconciler = Bank::default().reconciler();
    let refused = [
        handle.start_reconciler(reconciler.clone()).unwrap_err(),
        handle.reconcile(&reconciler).await.unwrap_err(),
    ];
    assert!(refused.iter().all(|error| error.kind() == StoreErrorKind::Misconfigured), "{refused:?}");
}

#[tokio::test]
async fn a_task_ends_with_its_layer() {
    let world = World::<sqlx::Sqlite>::open().await;
    let bank = Bank::default();
    let node = world.node(&bank);
    assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
    node.handle.start_reconciler(bank.reconciler().with_interval(Duration::from_millis(10))).unwrap();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    drop(node);
    until("the task has ended", || async { tasks() < before }).await;
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let with = |change: fn(Reconciler) -> Reconciler| {
        let reconciler = Bank::default().reconciler();
        catch_unwind(AssertUnwindSafe(|| change(reconciler))).is_err()
    };
    assert!(!with(|reconciler| reconciler.with_batch(1).with_concurrency(1).with_max_lookups(1)));
    assert!(!with(|reconciler| reconciler.with_backoff(SOON, SOON).with_timeout(SOON)));
    assert!(!with(|reconciler| reconciler.with_recheck_after(Duration::ZERO)), "it means never");
    assert!(with(|reconciler| reconciler.with_interval(Duration::ZERO)));
    assert!(with(|reconciler| reconciler.with_batch(0)));
    assert!(with(|reconciler| reconciler.with_concurrency(0)));
    assert!(with(|reconciler| reconciler.with_timeout(Duration::ZERO)));
    assert!(with(|reconciler| reconciler.with_confirmation_after(Duration::ZERO)));
    assert!(with(|reconciler| reconciler.with_max_lookups(0)));
    assert!(with(|reconciler| reconciler.with_backoff(Duration::ZERO, Duration::from_secs(1))));
    assert!(with(|reconciler| reconciler.with_backoff(Duration::from_secs(2), Duration::from_secs(1))));
}

const SOON: Duration = Duration::from_millis(1);
