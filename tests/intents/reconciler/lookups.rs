//! What becomes of an intent, by what its look-ups come to.

use std::time::Duration;

use axum::http::StatusCode;
use tokio::task::JoinSet;
use tower_idempotency::{
    Intent, Lookup, Reconciler, RejectionCode, UpstreamKey,
    intent::{IntentFilter, IntentState},
    recovery::ReconcilerPass,
};

use crate::{
    payouts::{Bank, Node, Say, Transfer, World, made, on_both_stores},
    support::db::Db,
};

on_both_stores! {
    many_intents_are_settled_once_by_two_reconcilers,
    what_is_found_is_finalized,
    what_is_not_found_twice_is_called_again,
    what_is_found_the_second_time_is_finalized,
    what_turns_up_after_it_was_declared_absent_is_reported,
    what_was_declared_absent_at_the_last_lookup_is_looked_up_a_last_time,
    what_stays_absent_is_looked_up_a_last_time,
    what_was_not_sent_is_absent_without_a_lookup,
    what_fails_hangs_and_panics_is_looked_up_again_and_then_needs_attention,
    an_intent_that_is_not_found_at_the_last_lookup_gets_its_confirmation,
    a_lookup_that_nobody_came_to_the_end_of_counts,
    what_a_closure_finds_is_finalized,
}

/// A request whose call may have arrived, or not.
pub(super) async fn dangle<DB: Db>(world: &World<DB>, node: &Node, bank: &Bank, name: &str) -> UpstreamKey {
    bank.transfers(Transfer::Unknown);
    node.pay(name).await.assert_refused(RejectionCode::OutcomeUnknown);
    bank.transfers(Transfer::Made);
    world.age_intents().await;
    *bank.calls(name).last().unwrap()
}

pub(super) async fn intent(node: &Node, key: UpstreamKey) -> Intent {
    node.handle.get_intent(key).await.unwrap().expect("the intent")
}

/// Checks what the last pass of several has done; a day is between two passes.
async fn passes<DB: Db>(world: &World<DB>, node: &Node, reconciler: &Reconciler, last: &[(&str, u64)]) {
    for expected in last {
        let pass = node.handle.reconcile(reconciler).await.unwrap();
        assert_eq!(done(pass), vec![*expected], "{pass:?}");
        assert_eq!(done(node.handle.reconcile(reconciler).await.unwrap()), vec![], "nothing is due");
        world.age_intents().await;
    }
}

/// What a pass has done, but for what it has not done at all.
fn done(pass: ReconcilerPass) -> Vec<(&'static str, u64)> {
    let ReconcilerPass { taken, found, absent, again, need_attention, closed, lost, failed, .. } = pass;
    assert_eq!(taken, found + absent + again + need_attention + closed + lost + failed, "{pass:?}");
    let counts = [
        ("found", found),
        ("absent", absent),
        ("again", again),
        ("attention", need_attention),
        ("closed", closed),
        ("lost", lost),
        ("failed", failed),
    ];
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

async fn many_intents_are_settled_once_by_two_reconcilers<DB: Db>(world: World<DB>) {
    const COUNT: usize = 1000;
    let bank = Bank::default();
    bank.transfers(Transfer::Unknown);
    let nodes =
        [world.node(&bank), Node::new(world.another_store(), &bank, tower_idempotency::Reaper::off())];
    let names: Vec<String> = (0..COUNT).map(|n| format!("payout {n}")).collect();
    for (n, name) in names.iter().enumerate() {
        bank.says(name, &[if n % 2 == 0 { Say::Found } else { Say::NotFound }]);
    }
    let clients: JoinSet<()> = (0..16)
        .map(|client| {
            let (node, names) = (nodes[0].clone(), names.clone());
            async move {
                for name in names.iter().skip(client).step_by(16) {
                    node.pay(name).await.assert_refused(RejectionCode::OutcomeUnknown);
                }
            }
        })
        .collect();
    clients.join_all().await;
    world.age_intents().await;

    let reconciler = bank.reconciler().with_batch(50);
    let both = async || {
        let (one, other) =
            tokio::join!(nodes[0].handle.reconcile(&reconciler), nodes[1].handle.reconcile(&reconciler));
        let (one, other) = (one.unwrap(), other.unwrap());
        assert_eq!((one.lost, other.lost, one.failed, other.failed), (0, 0, 0, 0));
        [one.found + other.found, one.again + other.again, one.absent + other.absent]
    };
    assert_eq!(both().await, [500, 500, 0]);
    assert!(bank.lookups().len() == COUNT && bank.lookups().values().all(|lookups| *lookups == 1));
    world.age_intents().await;
    assert_eq!(both().await, [0, 0, 500]);
    for (n, name) in names.iter().enumerate() {
        assert_eq!(bank.lookups()[&bank.calls(name)[0]], 1 + n % 2, "look-ups of {name}");
    }
    let counts = nodes[0].handle.count_intents().await.unwrap();
    assert_eq!((counts.open, counts.need_attention, counts.oldest), (0, 0, None));
}

async fn what_is_found_is_finalized<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    let counts = node.handle.count_intents().await.unwrap();
    assert_eq!((counts.open, counts.dangling, counts.need_attention), (1, 1, 0));
    assert!(counts.oldest.unwrap() >= Duration::from_secs(86_400), "{counts:?}");
    node.pay("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    bank.says("k", &[Say::Found]);
    passes(&world, &node, &bank.reconciler(), &[("found", 1)]).await;
    let IntentState::Finalized(resource) = intent(&node, key).await.state else { panic!("not finalized") };
    assert_eq!((resource.id, resource.payload.as_deref()), (made("k"), Some(&b"looked up"[..])));

    let retry = node.pay("k").await;
    assert_eq!((retry.status, &*retry.body), (StatusCode::CREATED, made("k").as_bytes()));
    assert!(!retry.is_replay() && node.pay("k").await.is_replay());
    assert_eq!(bank.calls("k"), [key]);
}

async fn what_is_not_found_twice_is_called_again<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    bank.says("k", &[Say::NotFound]);
    passes(&world, &node, &bank.reconciler(), &[("again", 1)]).await;
    node.pay("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    passes(&world, &node, &bank.reconciler(), &[("absent", 1)]).await;
    let dead = node.handle.list_intents(IntentFilter::Dead, 10).await.unwrap();
    assert!(matches!(&dead[..], [Intent { state: IntentState::Dead { absent: true, .. }, .. }]), "{dead:?}");

    assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
    assert_eq!(bank.calls("k"), [key, key]);
    assert!(matches!(intent(&node, key).await.state, IntentState::Finalized(_)));
    passes(&world, &node, &bank.reconciler(), &[]).await;
}

async fn what_is_found_the_second_time_is_finalized<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    // Whatever comes between them: not found counts twice in a row.
    bank.says("k", &[Say::NotFound, Say::Unknown, Say::NotFound, Say::Found]);
    passes(&world, &node, &bank.reconciler(), &[("again", 1), ("again", 1), ("again", 1), ("found", 1)])
        .await;
    assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
    assert_eq!((bank.calls("k"), bank.lookups()[&key]), (vec![key], 4));
}

async fn what_turns_up_after_it_was_declared_absent_is_reported<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    bank.says("k", &[Say::NotFound, Say::NotFound, Say::Found]);
    passes(&world, &node, &bank.reconciler(), &[("again", 1), ("absent", 1), ("attention", 1)]).await;
    let attention = node.need_attention().await;
    assert_eq!(attention.len(), 1);
    assert!(attention[0].attention.as_ref().unwrap().contains("turned up"), "{attention:?}");
    assert_eq!(node.pay("k").await.body, made("k"));
    assert_eq!(bank.calls("k"), [key]);
    passes(&world, &node, &bank.reconciler(), &[]).await;
}

async fn what_was_declared_absent_at_the_last_lookup_is_looked_up_a_last_time<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    dangle(&world, &node, &bank, "k").await;
    bank.says("k", &[Say::NotFound, Say::NotFound, Say::Found]);
    let reconciler = bank.reconciler().with_max_lookups(1);
    passes(&world, &node, &reconciler, &[("again", 1), ("absent", 1), ("attention", 1)]).await;
    assert_eq!(node.need_attention().await.len(), 1);
}

async fn what_stays_absent_is_looked_up_a_last_time<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    for (name, last) in [("stays", Say::NotFound), ("cannot be told", Say::Unknown)] {
        dangle(&world, &node, &bank, name).await;
        bank.says(name, &[Say::NotFound, Say::NotFound, last]);
    }
    let reconciler = bank.reconciler().with_max_lookups(4);
    passes(&world, &node, &reconciler, &[("again", 2), ("absent", 2)]).await;
    let pass = node.handle.reconcile(&reconciler).await.unwrap();
    assert_eq!(done(pass), [("again", 1), ("closed", 1)]);
    world.age_intents().await;
    passes(&world, &node, &reconciler, &[("closed", 1)]).await;
    assert_eq!(done(node.handle.reconcile(&reconciler).await.unwrap()), []);

    dangle(&world, &node, &bank, "is not").await;
    bank.says("is not", &[Say::NotFound]);
    let reconciler = reconciler.with_recheck_after(Duration::ZERO);
    passes(&world, &node, &reconciler, &[("again", 1), ("absent", 1)]).await;
    assert_eq!(done(node.handle.reconcile(&reconciler).await.unwrap()), []);
    assert_eq!(node.need_attention().await, []);
}

async fn what_was_not_sent_is_absent_without_a_lookup<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    bank.transfers(Transfer::NotSent);
    node.pay("k").await.assert_refused(RejectionCode::UpstreamUnavailable);
    world.age_intents().await;
    passes(&world, &node, &bank.reconciler(), &[("absent", 1)]).await;
    assert_eq!(bank.lookups().len(), 0);
    bank.transfers(Transfer::Made);
    assert_eq!(node.pay("k").await.status, StatusCode::CREATED);
}

async fn what_fails_hangs_and_panics_is_looked_up_again_and_then_needs_attention<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let stubborn = [
        ("a fails", Say::Fails),
        ("b panics", Say::Panics),
        ("c hangs", Say::Hangs),
        ("d unknown", Say::Unknown),
    ];
    for (name, say) in stubborn.into_iter().chain([("e found", Say::Found)]) {
        dangle(&world, &node, &bank, name).await;
        bank.says(name, &[say]);
    }
    let reconciler = bank.reconciler().with_max_lookups(3).with_timeout(Duration::from_millis(50));
    let pass = node.handle.reconcile(&reconciler).await.unwrap();
    assert_eq!((pass.found, pass.again), (1, 4), "{pass:?}");
    world.age_intents().await;
    passes(&world, &node, &reconciler, &[("again", 4), ("attention", 4)]).await;
    assert_eq!(done(node.handle.reconcile(&reconciler).await.unwrap()), []);

    let attention = node.need_attention().await;
    assert_eq!(
        attention.iter().map(|intent| intent.key.as_str()).collect::<Vec<_>>(),
        stubborn.map(|(name, _)| name)
    );
    for intent in attention {
        assert_eq!((intent.state, intent.looks), (IntentState::Open { sent: true }, 3));
        node.pay(intent.key.as_str()).await.assert_refused(RejectionCode::OutcomeUnknown);
        assert_eq!((bank.calls(intent.key.as_str()).len(), bank.lookups()[&intent.upstream_key]), (1, 3));
    }
}

async fn an_intent_that_is_not_found_at_the_last_lookup_gets_its_confirmation<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    dangle(&world, &node, &bank, "absent").await;
    dangle(&world, &node, &bank, "unclear").await;
    bank.says("absent", &[Say::Unknown, Say::NotFound]);
    bank.says("unclear", &[Say::Unknown, Say::NotFound, Say::Unknown]);
    let reconciler = bank.reconciler().with_max_lookups(2);
    passes(&world, &node, &reconciler, &[("again", 2), ("again", 2)]).await;
    let pass = node.handle.reconcile(&reconciler).await.unwrap();
    assert_eq!((pass.absent, pass.need_attention), (1, 1), "{pass:?}");
}

async fn a_lookup_that_nobody_came_to_the_end_of_counts<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    bank.says("k", &[Say::Found]);
    let recovery = world.store.recovery().unwrap();
    let (names, pause) = (["bank.transfer".to_owned()], Duration::from_secs(60));
    for looks in 1..=4 {
        assert_eq!(recovery.take_dangling(&names, 10, pause).await.unwrap()[0].looks, looks);
        assert_eq!(recovery.take_dangling(&names, 10, pause).await.unwrap(), []);
        world.age_intents().await;
    }
    // A look-up that ends the process must not be tried for ever.
    let reconciler = bank.reconciler().with_max_lookups(3);
    passes(&world, &node, &reconciler, &[("attention", 1)]).await;
    assert_eq!((bank.lookups().len(), intent(&node, key).await.state), (0, IntentState::Open { sent: true }));
}

async fn what_a_closure_finds_is_finalized<DB: Db>(world: World<DB>) {
    let bank = Bank::default();
    let node = world.node(&bank);
    let key = dangle(&world, &node, &bank, "k").await;
    let reconciler = Reconciler::new().on("bank.transfer", |intent: Intent| async move {
        Ok(Lookup::Found(intent.upstream_key.to_string().into()))
    });
    passes(&world, &node, &reconciler, &[("found", 1)]).await;
    assert_eq!(node.pay("k").await.body, key.to_string());
}
