//! Look-ups are registered by the names of intents.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tower_idempotency::{
    IdempotencyLayer, Intent, Lookup, MemoryStore, Reconcile, Reconciler, RejectionCode, Resource,
    intent::IntentState, recovery::ReconcilerPass, store::StoreErrorKind,
};

use super::lookups::{dangle, intent};
use crate::{
    payouts::{Bank, Say, Transfer, World, on_both_stores},
    support::db::Db,
};

on_both_stores! {
    a_look_up_of_another_upstream_never_touches_the_intent,
    two_services_look_up_their_own_intents,
    what_was_not_sent_is_closed_under_its_name_alone,
}

/// Knows nothing of what it is asked, and does not look at names.
fn careless() -> impl Reconcile {
    |_: Intent| async { Ok(Lookup::NotFound) }
}

async fn a_look_up_of_another_upstream_never_touches_the_intent<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    let before = intent(&node, key).await;
    let other = Reconciler::new().on("mail.send", careless()).on("bank.transfer ", careless());
    for _ in 0..3 {
        let pass = node.handle.reconcile(&other).await.unwrap();
        assert_eq!((pass.taken, pass.absent, pass.overlooked), (0, 0, 1), "{pass:?}");
        world.age_intents().await;
    }
    let after = intent(&node, key).await;
    assert_eq!((after.state, after.looks, after.takes), (before.state, 0, 0));
    node.pay("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(bank.calls("k").len(), 1);

    bank.says("k", &[Say::NotFound]);
    for _ in 0..2 {
        node.handle.reconcile(&bank.reconciler()).await.unwrap();
        world.age_intents().await;
    }
    let dead = node.handle.reconcile(&other).await.unwrap();
    assert_eq!((dead.taken, dead.overlooked), (0, 0), "the last look at what is absent is made by name too");
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().closed, 1);
}

async fn two_services_look_up_their_own_intents<DB: Db>(world: World<DB>) {
    let banks = [Bank::default(), Bank::default()];
    let nodes = [
        world.node(&banks[0]),
        crate::payouts::Node::new(world.another_store(), &banks[1], tower_idempotency::Reaper::off()),
    ];
    let key = dangle(&world, &nodes[0], &banks[0], "k").await;
    let found = |_: Intent| async { Ok(Lookup::Found(Resource::new("tr_1"))) };
    let own = Reconciler::new().on("stripe.charge", careless()).on("bank.transfer", found);
    let others = Reconciler::new().on("mail.send", careless()).on("sms.send", careless());
    let (one, other) = tokio::join!(nodes[1].handle.reconcile(&others), nodes[0].handle.reconcile(&own));
    assert_eq!((one.unwrap().taken, other.unwrap().found), (0, 1));
    assert!(matches!(intent(&nodes[0], key).await.state, IntentState::Finalized(_)));
}

async fn what_was_not_sent_is_closed_under_its_name_alone<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::NotSent);
    node.pay("k").await.assert_refused(RejectionCode::UpstreamUnavailable);
    world.age_intents().await;
    let other = Reconciler::new().on("mail.send", careless());
    assert_eq!(node.handle.reconcile(&other).await.unwrap().taken, 0);
    assert_eq!(node.handle.reconcile(&bank.reconciler()).await.unwrap().absent, 1);
    assert_eq!(bank.lookups().len(), 0);
}

#[tokio::test]
async fn a_reconciler_without_a_look_up_is_refused_when_it_is_started() {
    let handle = IdempotencyLayer::new(MemoryStore::new()).handle();
    for refused in [
        handle.start_reconciler(Reconciler::new()).unwrap_err(),
        handle.reconcile(&Reconciler::default()).await.map(|_: ReconcilerPass| ()).unwrap_err(),
    ] {
        assert_eq!(refused.kind(), StoreErrorKind::Misconfigured);
        assert!(refused.to_string().contains("Reconciler::on"), "{refused}");
    }
}

#[test]
fn a_name_is_registered_once_and_is_the_name_of_an_intent() {
    let long = "n".repeat(256);
    for name in ["", "bank.transfer", "a\0b", &long] {
        let reconciler = Reconciler::new().on("bank.transfer", careless());
        let refused = catch_unwind(AssertUnwindSafe(|| reconciler.on(name, careless())));
        assert!(refused.is_err(), "{name:?}");
    }
    let _ = Reconciler::new().on("bank.transfer", careless()).on(&long[1..], careless()).on("ä", careless());
}
