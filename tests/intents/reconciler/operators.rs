//! Intents are resolved by hand.

use axum::http::{HeaderMap, StatusCode};
use tower_idempotency::{
    Consumer, IdempotencyKey, Resource, UpstreamKey,
    intent::{
        IntentFilter, IntentResolution, IntentState,
        ResolveIntentOutcome::{Absent, AlreadySettled, InProgress, Resolved, StillOpen},
    },
    store::{Resolution, ResolveOutcome, StoredResponse},
};
use uuid::Uuid;

use super::lookups::{dangle, intent};
use crate::{
    payouts::{Bank, Say, Transfer, World, made, on_both_stores},
    support::{app::consumer, db::Db},
};

on_both_stores! {
    a_resolved_intent_makes_its_record_claimable,
    one_that_needs_attention_is_looked_up_again,
    a_call_that_may_be_under_way_is_not_resolved,
    what_is_settled_stays_so,
    an_intent_outlives_its_record,
    a_record_is_resolved_after_its_intents,
}

async fn a_resolved_intent_makes_its_record_claimable<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let resource = || Resource::new("by hand").with_payload("p");
    let cases = [
        ("found", IntentResolution::Finalize(resource()), StatusCode::CREATED, "by hand".to_owned(), 1),
        (
            "refused",
            IntentResolution::Refuse("closed".to_owned()),
            StatusCode::UNPROCESSABLE_ENTITY,
            String::new(),
            1,
        ),
        ("absent", IntentResolution::Absent, StatusCode::CREATED, made("absent"), 2),
    ];
    for (name, resolution, status, body, calls) in cases {
        let key = dangle(&world, &node, &bank, name).await;
        assert_eq!(node.record(name).await.unwrap().unresolved, 1);
        assert_eq!(node.handle.resolve_intent(key, resolution).await.unwrap(), Resolved, "{name}");
        assert_eq!(node.record(name).await.unwrap().unresolved, 0);
        assert_eq!(done(&node, &bank).await, 0, "{name} is looked up");
        let retry = node.pay(name).await;
        assert!(retry.status == status && retry.body.starts_with(body.as_bytes()), "{name}: {retry:?}");
        assert_eq!(bank.calls(name).len(), calls, "{name}");
    }
}

async fn done(node: &crate::payouts::Node, bank: &Bank) -> usize {
    node.handle.reconcile(&bank.reconciler()).await.unwrap();
    bank.lookups().len()
}

async fn one_that_needs_attention_is_looked_up_again<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    let reconciler = bank.reconciler().with_max_lookups(2);
    bank.says("k", &[Say::Unknown, Say::Unknown, Say::Unknown, Say::Found]);
    for attention in [0, 1] {
        assert_eq!(node.handle.reconcile(&reconciler).await.unwrap().need_attention, attention);
        world.age_intents().await;
    }
    assert_eq!(node.need_attention().await.len(), 1);
    let again = node.handle.resolve_intent(key, IntentResolution::LookAgain).await.unwrap();
    assert_eq!((again, node.need_attention().await.len()), (Resolved, 0));
    world.age_intents().await;
    // As often as one that was never looked up.
    assert_eq!(node.handle.reconcile(&reconciler).await.unwrap().again, 1);
    world.age_intents().await;
    assert_eq!(node.handle.reconcile(&reconciler).await.unwrap().found, 1);
}

async fn a_call_that_may_be_under_way_is_not_resolved<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::Waits);
    let request = node.start("k");
    bank.until_waiting(1).await;
    world.age_intents().await;
    let key = bank.calls("k")[0];
    let resolutions = [
        IntentResolution::Finalize("x".into()),
        IntentResolution::Refuse("x".to_owned()),
        IntentResolution::Absent,
        IntentResolution::LookAgain,
    ];
    for resolution in resolutions {
        assert_eq!(node.handle.resolve_intent(key, resolution).await.unwrap(), InProgress);
    }
    assert_eq!(intent(&node, key).await.state, IntentState::Open { sent: true });
    bank.open();
    assert_eq!(request.await.unwrap().body, made("k"));
}

async fn what_is_settled_stays_so<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let resolve = async |key, resolution| node.handle.resolve_intent(key, resolution).await.unwrap();
    let unknown = UpstreamKey::from_uuid(Uuid::new_v4());
    assert_eq!(resolve(unknown, IntentResolution::Absent).await, Absent);

    let key = dangle(&world, &node, &bank, "k").await;
    assert_eq!(resolve(key, IntentResolution::Acknowledge).await, StillOpen);
    assert_eq!(resolve(key, IntentResolution::Refuse("no".to_owned())).await, Resolved);
    assert_eq!(resolve(key, IntentResolution::LookAgain).await, AlreadySettled);
    // The operator was wrong.
    assert_eq!(resolve(key, IntentResolution::Absent).await, Resolved);
    assert_eq!(resolve(key, IntentResolution::Acknowledge).await, AlreadySettled);
    assert_eq!(resolve(key, IntentResolution::LookAgain).await, Resolved);
    bank.says("k", &[Say::Found]);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().need_attention, 1);

    let settled =
        [IntentResolution::Finalize("x".into()), IntentResolution::Absent, IntentResolution::LookAgain];
    for resolution in settled {
        assert_eq!(resolve(key, resolution).await, AlreadySettled);
    }
    assert_eq!(node.need_attention().await.len(), 1);
    assert_eq!(resolve(key, IntentResolution::Acknowledge).await, Resolved);
    assert_eq!(node.need_attention().await, []);
    assert!(matches!(intent(&node, key).await.state, IntentState::Finalized(found) if found.id == made("k")));
}

async fn an_intent_outlives_its_record<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let old = dangle(&world, &node, &bank, "k").await;
    assert!(node.handle.evict(&consumer(), &IdempotencyKey::new("k").unwrap()).await.unwrap());
    let new = dangle(&world, &node, &bank, "k").await;
    assert_ne!(old, new, "another record has another upstream key");
    assert_eq!(node.handle.resolve_intent(old, IntentResolution::Absent).await.unwrap(), Resolved);
    assert_eq!(node.record("k").await.unwrap().unresolved, 1, "the intent of the next record");
    bank.says("k", &[Say::Found]);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().found, 1);
    assert_eq!(node.pay("k").await.body, made("k"));
    assert_eq!(node.handle.list_intents(IntentFilter::Dead, 10).await.unwrap()[0].upstream_key, old);
}

async fn a_record_is_resolved_after_its_intents<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    let (consumer, name): (Consumer, _) = (consumer(), IdempotencyKey::new("k").unwrap());
    let release = async || node.handle.resolve(&consumer, &name, Resolution::Release).await.unwrap();
    assert_eq!(release().await, ResolveOutcome::UnresolvedIntents);
    // A response settles the record, and leaves the intent to the reconciler.
    let response = StoredResponse::new(StatusCode::CREATED, HeaderMap::new(), "by hand").encode();
    let complete = Resolution::Complete(response);
    assert_eq!(node.handle.resolve(&consumer, &name, complete).await.unwrap(), ResolveOutcome::Resolved);
    assert_eq!(node.pay("k").await.body, "by hand");
    bank.says("k", &[Say::Found]);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().found, 1);
    assert!(matches!(intent(&node, key).await.state, IntentState::Finalized(_)));
    assert_eq!(node.pay("k").await.body, "by hand");
}
