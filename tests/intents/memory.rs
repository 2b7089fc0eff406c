//! The same on the memory store, with which a handler can be tested without a database.

use std::sync::Arc;

use axum::http::StatusCode;
use sqlx::SqliteConnection;
use tower_idempotency::{
    Consumer, Idempotency, IdempotencyKey, IntentLog, MemoryStore, RejectionCode, Resource, TxError,
    intent::{IntentFilter, IntentResolution, IntentState},
    jobs::LogOutcome,
    recovery::KeptRequests,
    store::Store,
};

use crate::{
    bank::{End, Node},
    hooked::{Hook, Hooked},
    shop::{self, Stage, charge, until},
    site::{Payer, answer, layer, node, reconcile, unknown},
    support::upstream::{Act, Ending, Upstream},
};

/// A store, an upstream service, and handlers that call it.
struct Desk {
    store: Arc<dyn Store>,
    upstream: Upstream,
}

impl Desk {
    fn open(upstream: Upstream) -> Self {
        Self { store: Arc::new(MemoryStore::new()), upstream }
    }

    async fn both() -> [Self; 2] {
        [Upstream::deduplicating().await, Upstream::not_deduplicating().await].map(Self::open)
    }

    fn paying(&self) -> Node {
        self.paying_through(&self.store)
    }

    fn paying_through(&self, store: &Arc<dyn Store>) -> Node {
        let payer = Payer::of(&self.upstream);
        let pay = move |idempotency: Idempotency| {
            let payer = payer.clone();
            async move { answer(payer.pay(&idempotency).await) }
        };
        node(layer(store), pay, |router| router)
    }

    /// Checks that the request succeeds and is replayed, with one transfer that took so many calls, and that this is
    /// recorded.
    async fn assert_succeeds(&self, node: &Node, calls: usize) {
        let first = node.send("k").await;
        let transfers = self.upstream.transfers();
        assert_eq!((self.upstream.calls(), transfers.len()), (calls, 1), "{first:?} {transfers:?}");
        assert!(first.status == StatusCode::CREATED && first.body == transfers[0].id, "{first:?}");
        first.assert_same_replay(&node.send("k").await);
        let intent = self.upstream.requests()[0].key;
        let intent = node.handle.get_intent(intent).await.unwrap().expect("what is called has an intent");
        assert_eq!(intent.state, IntentState::Finalized(Resource::new(&transfers[0].id)));
    }

    /// Finds out what became of the open intent, whose grace period is not over.
    async fn reconcile(&self, node: &Node) {
        let open = node.handle.list_intents(IntentFilter::Open, 10).await.unwrap();
        assert_eq!(open.len(), 1, "{open:?}");
        node.handle.resolve_intent(open[0].upstream_key, IntentResolution::LookAgain).await.unwrap();
        until("the intent to be settled", async || {
            reconcile(&self.store, &self.upstream).await;
            node.handle.count_intents().await.unwrap().open == 0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_a_request_that_succeeds_has_run_and_paid_once() {
    for desk in Desk::both().await {
        let node = desk.paying();
        desk.assert_succeeds(&node, 1).await;
        assert_eq!(node.runs.get(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_an_intent_that_cannot_be_written_keeps_the_call_from_being_made() {
    let desk = Desk::open(Upstream::not_deduplicating().await);
    let failing: Arc<dyn Store> = Arc::new(Hooked::new(&desk.store).on_opening(Hook::Fail));
    let node = desk.paying_through(&failing);
    node.send("k").await.assert_refused(RejectionCode::StoreUnavailable);
    node.until("k", End::Released).await;
    assert_eq!(desk.upstream.calls(), 0);
    desk.assert_succeeds(&node, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_a_refusal_is_kept() {
    for desk in Desk::both().await {
        let node = desk.paying();
        desk.upstream.then(Act::before(Ending::Status(402)));
        let refused = node.send("k").await;
        assert_eq!(refused.problem()["code"].as_str(), Some("upstream-refused"), "{refused:?}");
        refused.assert_same_replay(&node.send("k").await);
        assert_eq!((desk.upstream.calls(), desk.upstream.transfers().len()), (1, 0));
        let dead = node.handle.list_intents(IntentFilter::Dead, 10).await.unwrap();
        assert_eq!(dead[0].state, IntentState::Dead { reason: "told to".to_owned(), absent: false });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_a_failing_network_holds_the_key_unless_the_upstream_deduplicates() {
    for act in [Act::before(Ending::Reset), Act::after(Ending::Reset)] {
        for desk in Desk::both().await {
            let node = desk.paying();
            desk.upstream.then(act);
            node.send("k").await.assert_refused(unknown(&desk.upstream));
            let made = desk.upstream.transfers().len();
            if desk.upstream.deduplicates() {
                desk.assert_succeeds(&node, 2).await;
                continue;
            }
            node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
            assert_eq!((node.runs.get(), desk.upstream.calls()), (1, 1), "{act:?}");
            desk.reconcile(&node).await;
            desk.assert_succeeds(&node, 2 - made).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_a_finalizing_write_that_fails_is_tried_again() {
    let desk = Desk::open(Upstream::not_deduplicating().await);
    let failing = Hooked::new(&desk.store).on_settling(Hook::Fail).on_settling(Hook::LoseReply);
    let failing: Arc<dyn Store> = Arc::new(failing);
    desk.assert_succeeds(&desk.paying_through(&failing), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_an_abandoned_request_is_completed_without_its_client() {
    let (store, stage): (Arc<dyn Store>, _) = (Arc::new(MemoryStore::new()), Stage::default());
    let layer = layer(&store)
        .with_lease(shop::LEASE)
        .with_consumer(tower_idempotency::ConsumerExtractor::extension())
        .with_kept_requests(KeptRequests::new().with_abandoned_after(std::time::Duration::from_millis(1)));
    let node = shop::Node::new(layer, &stage);
    stage.then([shop::Act::CallAndFail]);
    assert_eq!(node.send(charge("alice", "k")).await.status, 500);
    let pass = node.complete(&node.completer(), 1).await;
    assert_eq!((pass.completed, stage.runs.get()), (1, 2), "{pass:?} {:?}", node.needs().await);
    node.assert_replays(|| charge("alice", "k"), "alice", "k").await;
}

#[tokio::test]
async fn memory_a_job_is_done_once() {
    let log = IntentLog::new(MemoryStore::new());
    let (queue, message) = (Consumer::new("queue").unwrap(), IdempotencyKey::new("m").unwrap());
    let LogOutcome::Run(attempt) = log.attempt(&queue, &message, &1).await.unwrap() else { panic!() };
    let sent = attempt.idempotency().intent("transfer").call(async |_| Ok("tr_1".into())).await.unwrap();
    attempt.complete(sent.id).await.unwrap();
    let outcome = log.attempt(&queue, &message, &1).await.unwrap();
    assert!(matches!(&outcome, LogOutcome::Completed(result) if result == "tr_1"), "{outcome:?}");
}

/// There are no transactions that it could run in.
#[tokio::test]
async fn memory_a_phase_is_refused() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let handler = async |idempotency: Idempotency| -> Result<String, TxError> {
        let step = async |_: &mut SqliteConnection| panic!("a phase has begun");
        idempotency.phase("step", step).await
    };
    let node = node(layer(&store), handler, |router| router);
    node.send("k").await.assert_refused(RejectionCode::StoreMisconfigured);
    node.until("k", End::Released).await;
}
