//! For how long intents and requests are taken, by processes that live and by those that die.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, http::Request, routing::post};
use tower_idempotency::{
    CallFailure, Consumer, Idempotency, IdempotencyLayer, Intent, IntentError, Lookup, MemoryStore,
    Reconciler, Resource,
    recovery::{Completer, KeptRequests, Refused, Restore},
};

use crate::{
    payouts::{Bank, Node, Say, Transfer, World, on_both_stores, until},
    support::{db::Db, direct},
};

on_both_stores! {
    intents_of_a_reconciler_that_died_are_free_within_a_minute,
}

async fn intents_of_a_reconciler_that_died_are_free_within_a_minute<DB: Db>(world: World<DB>) {
    const COUNT: usize = 12;
    let (bank, lookups) = (Bank::default(), Bank::default());
    let node = world.node(&bank);
    bank.transfers(Transfer::Unknown);
    for n in 0..COUNT {
        let name = format!("k{n}");
        node.pay(&name).await;
        lookups.says(&name, &[Say::Hangs]);
        bank.says(&name, &[Say::Found]);
    }
    world.age_intents().await;

    let dying = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (store, asked) = (world.another_store(), lookups.clone());
    dying.spawn(async move {
        let reconciler = asked.reconciler().with_concurrency(4).with_timeout(Duration::from_secs(600));
        Node::new(store, &asked, tower_idempotency::Reaper::off()).handle.reconcile(&reconciler).await
    });
    until("it has its hands full", || async { lookups.lookups().len() == 4 }).await;
    dying.shutdown_background();

    let others = node.handle.reconcile(&bank.reconciler()).await.unwrap();
    assert_eq!((others.taken, others.found), (8, 8), "those that it had not begun with");
    world.age_intents_by_seconds(60).await;
    let rest = node.handle.reconcile(&bank.reconciler()).await.unwrap();
    assert_eq!((rest.taken, rest.found), (4, 4), "{rest:?}");
}

const SECOND: Duration = Duration::from_secs(1);

/// A layer over the store, whose handler makes a transfer with an unknown outcome.
fn node(store: &MemoryStore) -> (Router, IdempotencyLayer) {
    let layer = IdempotencyLayer::new(store.clone());
    let pay = async |idempotency: Idempotency| {
        let call = async |_| Err(CallFailure::unknown("reset"));
        Ok::<_, IntentError>(idempotency.intent("bank.transfer").call(call).await?.id)
    };
    (Router::new().route("/charges", post(pay)).layer(layer.clone()), layer)
}

#[tokio::test(start_paused = true)]
async fn a_look_up_that_takes_long_is_made_by_one_node_at_a_time() {
    let store = MemoryStore::new();
    let ((app, one), (_, other)) = (node(&store), node(&store));
    direct::send(&app, direct::charge("k")).await;
    tokio::time::sleep(300 * SECOND).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let reconciler = Reconciler::new().with_timeout(600 * SECOND).on("bank.transfer", move |_: Intent| {
        counter.fetch_add(1, Ordering::SeqCst);
        async {
            tokio::time::sleep(280 * SECOND).await;
            Ok(Lookup::Found(Resource::new("tr_1")))
        }
    });
    let (handle, slow) = (one.handle(), reconciler.clone());
    let slow = tokio::spawn(async move { handle.reconcile(&slow).await.unwrap() });
    for _ in 0..27 {
        tokio::time::sleep(10 * SECOND).await;
        assert_eq!(other.handle().reconcile(&reconciler).await.unwrap().taken, 0);
    }
    assert_eq!(slow.await.unwrap().found, 1);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reconciler_takes_no_more_than_it_looks_up() {
    let store = MemoryStore::new();
    let ((app, one), (_, other)) = (node(&store), node(&store));
    for n in 0..5 {
        direct::send(&app, direct::charge(&format!("k{n}"))).await;
    }
    tokio::time::sleep(300 * SECOND).await;
    let slow = Reconciler::new().on("bank.transfer", |_: Intent| pending()).with_concurrency(2);
    let handle = one.handle();
    let _slow = tokio::spawn(async move { handle.reconcile(&slow).await });
    tokio::time::sleep(SECOND).await;
    let quick = Reconciler::new().on("bank.transfer", |_: Intent| async { Ok(Lookup::Unknown) });
    assert_eq!(other.handle().reconcile(&quick).await.unwrap().taken, 3);
}

/// Counts, and takes five minutes.
struct Slow(Arc<AtomicUsize>);

#[async_trait::async_trait]
impl Restore for Slow {
    async fn restore(&self, _: &mut Request<()>, _: &Consumer) -> Result<(), Refused> {
        self.0.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(300 * SECOND).await;
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_request_is_sent_by_one_node_at_a_time() {
    let store = MemoryStore::new();
    let layer = || {
        let kept = KeptRequests::new().with_abandoned_after(SECOND);
        IdempotencyLayer::new(store.clone()).with_kept_requests(kept)
    };
    let app = |layer: IdempotencyLayer| {
        let charge = async |idempotency: Idempotency| {
            let call = async |_| Ok(Resource::new("tr_1"));
            let made = idempotency.intent("bank.transfer").call(call).await?;
            assert!(idempotency.attempt_number() > 1, "the first attempt fails, as it should in this test");
            Ok::<_, IntentError>(made.id)
        };
        Router::new().route("/charges", post(charge)).layer(layer)
    };
    let (one, other) = (layer(), layer());
    direct::send(&app(one.clone()), direct::charge("k")).await;
    tokio::time::sleep(60 * SECOND).await;
    let restored = Arc::new(AtomicUsize::new(0));
    let completer = |layer: &IdempotencyLayer| {
        let slow = Slow(Arc::clone(&restored));
        Completer::new(app(layer.clone()).into_service::<Body>(), slow).with_timeout(600 * SECOND)
    };
    let (handle, first) = (one.handle(), completer(&one));
    let first = tokio::spawn(async move { handle.complete_abandoned(&first).await.unwrap() });
    for _ in 0..28 {
        tokio::time::sleep(10 * SECOND).await;
        assert_eq!(other.handle().complete_abandoned(&completer(&other)).await.unwrap().taken, 0);
    }
    assert_eq!(first.await.unwrap().completed, 1);
    assert_eq!(restored.load(Ordering::SeqCst), 1);
}
