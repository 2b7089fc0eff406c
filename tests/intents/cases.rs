//! The cases of the pattern: all well, no intent, a refusal, the network fails, the outcome cannot be recorded.

use std::{sync::Arc, time::Duration};

use sqlx::{Database, Postgres, Sqlite};
use tower_idempotency::{Idempotency, RejectionCode, Resource, intent::IntentState, store::Store};

use crate::{
    bank::{End, Node},
    hooked::{Hook, Hooked},
    site::{PATIENCE, Site, answer, assert_answer, layer, node, on_both_stores, reconcile, unknown},
    support::{
        db::Db,
        schema::{PooledSchema, Schema},
        upstream::{Act, Ending, Look, Upstream},
    },
};

on_both_stores!(
    a_request_that_succeeds_has_run_and_paid_once,
    a_store_that_is_down_keeps_the_call_from_being_made,
    a_table_that_is_missing_keeps_the_call_from_being_made,
    an_intent_that_cannot_be_inserted_keeps_the_call_from_being_made,
    a_refusal_is_kept,
    what_was_turned_away_is_called_again,
    a_call_that_did_not_leave_is_made_again,
    a_failing_network_holds_the_key_until_the_call_is_reconciled,
    a_failing_network_is_made_up_for_by_an_upstream_that_deduplicates,
    a_look_up_that_fails_leaves_the_intent_open,
    a_lost_reply_to_the_finalizing_write_is_asked_for_again,
    a_finalizing_write_that_fails_is_tried_again,
    a_finalizing_write_that_always_fails_is_reconciled,
);

async fn a_request_that_succeeds_has_run_and_paid_once<DB: Db>() {
    for site in Site::<DB>::both().await {
        let node = site.paying();
        site.assert_succeeds(&node, "k").await;
        site.assert_paid_once(1).await;
        assert_eq!(node.runs.get(), 1);
    }
}

async fn a_store_that_is_down_keeps_the_call_from_being_made<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let store: Arc<dyn Store> = Arc::new(Hooked::new(&site.bank.store).on_opening(Hook::Fail));
    refuses_and_recovers(&site, &site.paying_through(&store), RejectionCode::StoreUnavailable, "").await;
}

async fn a_table_that_is_missing_keeps_the_call_from_being_made<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let node = site.paying();
    node.handle.prepare().await.unwrap();
    site.bank.run("ALTER TABLE idempotency_intents RENAME TO elsewhere").await;
    let back = "ALTER TABLE elsewhere RENAME TO idempotency_intents";
    refuses_and_recovers(&site, &node, RejectionCode::StoreMisconfigured, back).await;
}

async fn an_intent_that_cannot_be_inserted_keeps_the_call_from_being_made<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let node = site.paying();
    node.handle.prepare().await.unwrap();
    let [forbid, allow] = forbid::<DB>("INSERT");
    site.bank.run(&forbid).await;
    refuses_and_recovers(&site, &node, RejectionCode::Internal, &allow).await;
}

/// Checks that a request whose intent cannot be written is refused, and makes its call once this was run.
async fn refuses_and_recovers<DB: Db>(site: &Site<DB>, node: &Node, code: RejectionCode, repair: &str) {
    node.send("k").await.assert_refused(code);
    node.until("k", End::Released).await;
    assert_eq!(site.upstream.calls(), 0);
    site.bank.run(repair).await;
    site.assert_untouched().await;
    site.assert_succeeds(node, "k").await;
    site.assert_paid_once(1).await;
}

async fn a_refusal_is_kept<DB: Db>() {
    for site in Site::<DB>::both().await {
        let node = site.paying();
        site.upstream.then(Act::before(Ending::Status(402)));
        let refused = node.send("k").await;
        assert_eq!(
            (refused.status.as_u16(), refused.problem()["code"].as_str()),
            (422, Some("upstream-refused"))
        );
        refused.assert_same_replay(&node.send("k").await);
        assert_eq!((site.upstream.calls(), site.upstream.transfers().len()), (1, 0));
        let dead = IntentState::Dead { reason: "told to".to_owned(), absent: false };
        assert_eq!(site.intent().await.state, dead);
    }
}

async fn what_was_turned_away_is_called_again<DB: Db>() {
    for site in Site::<DB>::both().await {
        let node = site.paying();
        for status in [425, 429] {
            site.upstream.then(Act::before(Ending::Status(status)));
            node.send("k").await.assert_refused(RejectionCode::UpstreamUnavailable);
        }
        site.assert_succeeds(&node, "k").await;
        site.assert_paid_once(3).await;
    }
}

async fn a_call_that_did_not_leave_is_made_again<DB: Db>() {
    for site in Site::<DB>::both().await {
        let node = site.paying();
        site.upstream.stop_listening();
        let refused = loop {
            let refused = node.send("k").await;
            // The last connection that it accepts may have been on its way.
            if refused.rejection == Some(RejectionCode::UpstreamUnavailable) || site.upstream.calls() > 0 {
                break refused;
            }
        };
        refused.assert_refused(RejectionCode::UpstreamUnavailable);
        assert_eq!(site.intents().await, 1);
        site.upstream.listen_again();
        site.assert_succeeds(&node, "k").await;
        site.assert_paid_once(1).await;
    }
}

async fn a_failing_network_holds_the_key_until_the_call_is_reconciled<DB: Db>() {
    for (act, made) in failures() {
        let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
        let node = fail_once(&site, act).await;
        for _ in 0..3 {
            node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
        }
        let done = (node.runs.get(), site.upstream.calls(), site.upstream.transfers().len());
        assert_eq!(done, (1, 1, made), "{act:?}");
        site.reconcile().await;
        site.assert_succeeds(&node, "k").await;
        site.assert_paid_once(2 - made).await;
    }
}

async fn a_failing_network_is_made_up_for_by_an_upstream_that_deduplicates<DB: Db>() {
    for (act, _) in failures() {
        let site = Site::<DB>::open(Upstream::deduplicating().await).await;
        let node = fail_once(&site, act).await;
        site.assert_succeeds(&node, "k").await;
        site.assert_paid_once(2).await;
    }
}

async fn a_look_up_that_fails_leaves_the_intent_open<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let node = fail_once(&site, Act::after(Ending::Reset)).await;
    for _ in 0..3 {
        site.upstream.then_look(Look::Fails);
    }
    site.reconcile().await;
    assert_eq!(site.upstream.lookups(), 4);
    site.assert_succeeds(&node, "k").await;
    site.assert_paid_once(1).await;
}

/// What leaves the outcome of a call unknown, and how many transfers it makes.
fn failures() -> impl Iterator<Item = (Act, usize)> {
    let endings =
        [408, 409, 500, 503].map(Ending::Status).into_iter().chain([Ending::Reset, Ending::Silence]);
    endings.flat_map(|ending| [(Act::before(ending), 0), (Act::after(ending), 1)])
}

/// A node whose first request for `k` was answered that its outcome is unknown.
async fn fail_once<DB: Db>(site: &Site<DB>, act: Act) -> Node {
    let node = site.paying();
    site.upstream.then(act);
    let silent = [Act::before(Ending::Silence), Act::after(Ending::Silence)].contains(&act);
    if silent {
        site.wait_for_upstream(Duration::from_secs(1));
    }
    assert_answer(&node.send("k").await, unknown(&site.upstream));
    assert_eq!(site.upstream.calls(), 1, "{act:?}");
    site.wait_for_upstream(PATIENCE);
    node
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn through_pgbouncer() {
    let site = Site::<Postgres>::open(Upstream::not_deduplicating().await).await;
    let Schema { name, pool } = &site.bank.home;
    let pooled = PooledSchema(Schema { name: name.clone(), pool: pool.clone() });
    let store: Arc<dyn Store> = Arc::new(pooled.store());
    let node = site.paying_through(&store);
    site.upstream.then(Act::before(Ending::Status(429)));
    node.send("k").await.assert_refused(RejectionCode::UpstreamUnavailable);
    site.upstream.then(Act::after(Ending::Reset));
    for _ in 0..3 {
        node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    }
    site.let_dangle().await;
    reconcile(&store, &site.upstream).await;
    site.assert_succeeds(&node, "k").await;
    site.assert_paid_once(2).await;
}

async fn a_lost_reply_to_the_finalizing_write_is_asked_for_again<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let store: Arc<dyn Store> = Arc::new(Hooked::new(&site.bank.store).on_settling(Hook::LoseReply));
    site.assert_succeeds(&site.paying_through(&store), "k").await;
    site.assert_paid_once(1).await;
}

async fn a_finalizing_write_that_fails_is_tried_again<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let hooked = (0..3).fold(Hooked::new(&site.bank.store), |store, _| store.on_settling(Hook::Fail));
    let store: Arc<dyn Store> = Arc::new(hooked);
    site.assert_succeeds(&site.paying_through(&store), "k").await;
    site.assert_paid_once(1).await;
}

/// The client has its answer, which is true, and it stays the answer.
async fn a_finalizing_write_that_always_fails_is_reconciled<DB: Db>() {
    let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
    let payer = site.payer();
    let layer = layer(&site.bank.store).with_lease(Duration::from_secs(2));
    let layer = layer.with_max_execution(Duration::from_secs(2));
    let pay = move |idempotency: Idempotency| {
        let payer = payer.clone();
        async move { answer(payer.pay(&idempotency).await) }
    };
    let node = node(layer, pay, |router| router);
    node.handle.prepare().await.unwrap();
    let [forbid, allow] = forbid::<DB>("UPDATE");
    site.bank.run(&forbid).await;
    let first = node.send("k").await;
    let transfers = site.upstream.transfers();
    assert!(first.status == 201 && first.body == transfers[0].id, "{first:?} {transfers:?}");
    node.handle.drain(PATIENCE).await.unwrap();
    site.bank.run(&allow).await;
    assert_eq!(site.intent().await.state, IntentState::Open { sent: true });
    site.reconcile().await;
    assert_eq!(site.intent().await.state, IntentState::Finalized(Resource::new(&transfers[0].id)));
    first.assert_same_replay(&site.paying().send("k").await);
    site.assert_paid_once(1).await;
}

/// Statements that forbid, and allow again, that the table of intents is changed so.
fn forbid<DB: Db>(change: &str) -> [String; 2] {
    let trigger = format!("CREATE TRIGGER forbidden BEFORE {change} ON idempotency_intents");
    if DB::NAME == Sqlite::NAME {
        let forbid = format!("{trigger} BEGIN SELECT RAISE(ABORT, 'no'); END");
        return [forbid, "DROP TRIGGER forbidden".to_owned()];
    }
    let function = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'";
    let forbid = format!("{function}; {trigger} FOR EACH ROW EXECUTE FUNCTION refuse()");
    [forbid, "DROP TRIGGER forbidden ON idempotency_intents".to_owned()]
}
