//! What the upstream has done stays known, whatever becomes of the attempt that had it done.

use std::sync::{Arc, Mutex};

use axum::{
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use tokio::sync::Notify;
use tower_idempotency::{
    Idempotency, IntentError, RejectionCode, Tx,
    intent::{IntentFilter, IntentState},
    store::Store,
};

use crate::{
    bank::{End, Gate, Node},
    hooked::{Hook, Hooked},
    site::{Payer, Site, answer, assert_answer, created, idempotency, layer, node, on_both_stores},
    support::{
        db::Db,
        served::Count,
        upstream::{Act, Ending, Upstream},
    },
};

on_both_stores!(
    what_was_paid_is_not_paid_again_after_a_500,
    what_was_paid_is_not_paid_again_after_a_panic,
    what_was_paid_is_not_paid_again_after_a_rollback,
    what_was_paid_is_not_paid_again_after_a_failed_commit,
    an_attempt_that_loses_its_lease,
    a_handler_that_succeeds_although_the_outcome_is_unknown,
    two_intents_of_one_name_at_once_are_refused,
    intents_told_apart_may_be_called_at_once,
    other_arguments_hold_the_key,
    other_arguments_are_called_after_a_call_that_was_turned_away,
    an_intent_inside_a_transaction_is_refused,
    a_loop_does_not_call_again_what_may_have_arrived,
    a_loop_calls_again_what_an_upstream_recognizes,
    a_handler_dropped_before_its_intent_is_open,
    a_handler_dropped_once_its_intent_is_open,
    a_handler_dropped_just_as_its_intent_is_open,
    a_handler_dropped_during_its_call,
    a_handler_dropped_while_its_call_is_settled,
    intents_of_one_name_keep_their_order,
);

/// Checks that a first run that pays and then does not succeed is made up for by a second one, without a call.
async fn survives<DB: Db>(site: &Site<DB>, node: &Node) {
    let first = node.send("k").await;
    assert!(first.status.is_server_error(), "{first:?}");
    assert_eq!((site.upstream.calls(), site.bank.charges().await), (1, 0), "{first:?}");
    site.assert_succeeds_at_last(node, "k").await;
    site.assert_paid_once(1).await;
    assert_eq!((site.bank.charges().await, site.intent().await.calls), (1, 1));
}

async fn not_deduplicating<DB: Db>() -> Site<DB> {
    Site::open(Upstream::not_deduplicating().await).await
}

async fn what_was_paid_is_not_paid_again_after_a_500<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    survives(&site, &site.node_after_paying(async || StatusCode::INTERNAL_SERVER_ERROR)).await;
}

async fn what_was_paid_is_not_paid_again_after_a_panic<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let node = site.node_after_paying(async || -> StatusCode { panic!("told to") });
    survives(&site, &node).await;
}

async fn what_was_paid_is_not_paid_again_after_a_rollback<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let node = site.node_after_paying(async |mut tx: Tx<DB>| {
        crate::bank::charge(&mut tx).await;
        StatusCode::SERVICE_UNAVAILABLE
    });
    survives(&site, &node).await;
}

async fn what_was_paid_is_not_paid_again_after_a_failed_commit<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let node = site.node_after_paying(async |mut tx: Tx<DB>| {
        DB::run(&mut tx, "INSERT INTO charges (amount, account) VALUES (2000, 99)").await.unwrap();
        StatusCode::CREATED
    });
    survives(&site, &node).await;
}

async fn an_attempt_that_loses_its_lease<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let (payer, gate, runs) = (site.payer(), Gate::new(), Count::default());
    let (handler_gate, counter) = (gate.clone(), runs.clone());
    let handler = move |idempotency: Idempotency| {
        let (payer, gate, run) = (payer.clone(), handler_gate.clone(), counter.add());
        async move {
            let paid = payer.pay(&idempotency).await;
            if run == 1 {
                gate.pass().await;
            }
            answer(paid)
        }
    };
    let [slow, other] = [(); 2].map(|()| site.node(handler.clone()));
    let first = slow.start("k");
    gate.entered().await;
    site.end_leases().await;
    let second = other.send("k").await;
    assert!(second.status == StatusCode::CREATED && !second.is_replay(), "{second:?}");
    gate.open();
    second.assert_same_replay(&first.await.unwrap());
    assert_eq!(runs.get(), 2);
    site.assert_paid_once(1).await;
}

/// Its answer is stored, and reconciling goes on.
async fn a_handler_that_succeeds_although_the_outcome_is_unknown<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let payer = site.payer();
    let node = site.node(move |idempotency: Idempotency| {
        let payer = payer.clone();
        async move {
            assert!(matches!(payer.pay(&idempotency).await, Err(IntentError::Unknown { .. })));
            (StatusCode::ACCEPTED, "it will be paid")
        }
    });
    site.upstream.then(Act::after(Ending::Reset));
    let first = node.send("k").await;
    assert_eq!(first.status, StatusCode::ACCEPTED);
    assert_eq!(site.intent().await.state, IntentState::Open { sent: true });
    first.assert_same_replay(&node.send("k").await);
    site.reconcile().await;
    site.assert_paid_once(1).await;
    first.assert_same_replay(&node.send("k").await);
}

async fn two_intents_of_one_name_at_once_are_refused<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let (payer, refused) = (site.payer(), Count::default());
    let counter = refused.clone();
    let node = site.node(move |idempotency: Idempotency| {
        let (payer, refused) = (payer.clone(), counter.clone());
        async move {
            let (first, second) = tokio::join!(payer.pay(&idempotency), payer.pay(&idempotency));
            if matches!(second, Err(IntentError::Misused(_))) {
                refused.add();
            }
            answer(first.and(second))
        }
    });
    node.send("k").await.assert_refused(RejectionCode::IntentMisused);
    assert_eq!((site.upstream.calls(), refused.get()), (1, 1));
    // What the first of them was told is there for the next attempt.
    node.send("k").await.assert_refused(RejectionCode::IntentMisused);
    site.assert_paid_once(1).await;
}

async fn intents_told_apart_may_be_called_at_once<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let payer = site.payer();
    let node = site.node(move |idempotency: Idempotency| {
        let payer = payer.clone();
        async move {
            let [first, second] = ["DE02", "DE03"].map(|recipient| {
                let intent = payer.intent(&idempotency).of(recipient).with_arguments(&(recipient, 1000));
                payer.call(intent)
            });
            let (first, second) = tokio::join!(first, second);
            match first.and(second) {
                Ok(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                Err(error) => error.into_response(),
            }
        }
    });
    for _ in 0..2 {
        assert_answer(&node.send("k").await, 503);
    }
    let made = site.upstream.transfers();
    assert!(made.len() == 2 && made[0].key != made[1].key, "{made:?}");
    assert_eq!((site.upstream.calls(), node.runs.get()), (2, 2));
}

/// Whatever became of the first call, unless it was turned away, and whatever the handler makes of the error.
async fn other_arguments_hold_the_key<DB: Db>() {
    for act in [Act::WORK, Act::after(Ending::Reset), Act::before(Ending::Status(402))] {
        for swallow in [false, true] {
            let site = Site::<DB>::open(Upstream::deduplicating().await).await;
            site.upstream.then(act);
            let node = paying_another(&site, swallow);
            assert_answer(&node.send("k").await, 500);
            node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
            node.until("k", End::Held).await;
            node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
            assert_eq!((node.runs.get(), site.upstream.calls()), (2, 1), "{act:?}");
        }
    }
}

/// The upstream has processed nothing: the next attempt may ask for something else.
async fn other_arguments_are_called_after_a_call_that_was_turned_away<DB: Db>() {
    for status in [425, 429] {
        let site = Site::<DB>::open(Upstream::not_deduplicating().await).await;
        site.upstream.then(Act::before(Ending::Status(status)));
        let node = paying_another(&site, false);
        assert_answer(&node.send("k").await, 500);
        assert_answer(&node.send("k").await, 201);
        assert_eq!((node.runs.get(), site.upstream.calls(), site.upstream.transfers().len()), (2, 2, 1));
    }
}

/// A node that pays with other arguments in each run, and answers 500 in its first.
fn paying_another<DB: Db>(site: &Site<DB>, swallow: bool) -> Node {
    let (payer, runs) = (site.payer(), Count::default());
    site.node(move |idempotency: Idempotency| {
        let (payer, run) = (payer.clone(), runs.add());
        async move {
            let paid = payer.call(payer.intent(&idempotency).with_arguments(&("DE02", run))).await;
            match (run, paid) {
                (1, _) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
                (_, Err(IntentError::OtherArguments)) if swallow => StatusCode::CREATED.into_response(),
                (_, paid) => answer(paid),
            }
        }
    })
}

async fn an_intent_inside_a_transaction_is_refused<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    let (payer, runs) = (site.payer(), Count::default());
    let node = site.node(move |idempotency: Idempotency, mut tx: Tx<DB>| {
        let (payer, run) = (payer.clone(), runs.add());
        async move {
            crate::bank::charge(&mut tx).await;
            // Also once it is given back: it stays open until the handler has returned.
            if run == 2 {
                drop(tx);
            }
            crate::bank::at_once(async { answer(payer.pay(&idempotency).await) }).await
        }
    });
    for _ in 0..2 {
        node.send("k").await.assert_refused(RejectionCode::IntentMisused);
        node.until("k", End::Released).await;
    }
    site.assert_untouched().await;
    assert_eq!(site.bank.charges().await, 0);
}

async fn a_loop_does_not_call_again_what_may_have_arrived<DB: Db>() {
    let site = not_deduplicating::<DB>().await;
    site.upstream.then(Act::before(Ending::Status(429)));
    site.upstream.then(Act::after(Ending::Reset));
    let node = looping(&site, 5);
    node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    assert_eq!(site.upstream.calls(), 2);
    node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
    site.reconcile().await;
    site.assert_succeeds(&node, "k").await;
    site.assert_paid_once(2).await;
}

async fn a_loop_calls_again_what_an_upstream_recognizes<DB: Db>() {
    let site = Site::<DB>::open(Upstream::deduplicating().await).await;
    let acts =
        [Act::before(Ending::Reset), Act::after(Ending::Status(500)), Act::before(Ending::Status(429))];
    acts.into_iter().for_each(|act| site.upstream.then(act));
    site.assert_succeeds(&looping(&site, 4), "k").await;
    site.assert_paid_once(4).await;
}

/// A node whose handler tries so often to pay.
fn looping<DB: Db>(site: &Site<DB>, tries: usize) -> Node {
    let payer = site.payer();
    site.node(move |idempotency: Idempotency| {
        let payer = payer.clone();
        async move {
            let mut paid = payer.pay(&idempotency).await;
            for _ in 1..tries {
                if paid.is_ok() {
                    break;
                }
                paid = payer.pay(&idempotency).await;
            }
            answer(paid)
        }
    })
}

/// A node whose handler pays, and is dropped when this is notified.
fn droppable<DB: Db>(site: &Site<DB>, store: Hooked, dropping: &Arc<Notify>) -> Node {
    let (payer, drops) = (site.payer(), Arc::clone(dropping));
    let cut = move |request: Request, next: Next| {
        let drops = Arc::clone(&drops);
        async move {
            tokio::select! {
                biased;
                () = drops.notified() => StatusCode::REQUEST_TIMEOUT.into_response(),
                response = next.run(request) => response,
            }
        }
    };
    let pay = move |idempotency: Idempotency| {
        let payer = payer.clone();
        async move { answer(payer.pay(&idempotency).await) }
    };
    let store: Arc<dyn Store> = Arc::new(store);
    node(layer(&store), pay, |router| router.layer(middleware::from_fn(cut)))
}

/// Sends a request whose handler is dropped once it is at the gate, which opens after that.
async fn drop_at<DB: Db>(site: &Site<DB>, gate: &Gate, store: Hooked) -> Node {
    let dropping = Arc::new(Notify::new());
    let node = droppable(site, store, &dropping);
    let first = node.start("k");
    gate.entered().await;
    dropping.notify_waiters();
    assert_eq!(first.await.unwrap().status, StatusCode::REQUEST_TIMEOUT);
    gate.open();
    node
}

async fn a_handler_dropped_before_its_intent_is_open<DB: Db>() {
    let (site, gate) = (not_deduplicating::<DB>().await, Gate::new());
    let store = Hooked::new(&site.bank.store).on_opening(Hook::WaitBefore(gate.clone()));
    let node = drop_at(&site, &gate, store).await;
    site.assert_succeeds_at_last(&node, "k").await;
    site.assert_paid_once(1).await;
}

async fn a_handler_dropped_once_its_intent_is_open<DB: Db>() {
    let (site, gate) = (not_deduplicating::<DB>().await, Gate::new());
    let store = Hooked::new(&site.bank.store).on_opening(Hook::WaitAfter(gate.clone()));
    let node = drop_at(&site, &gate, store).await;
    // It is withdrawn: nobody has to look it up.
    site.assert_succeeds_at_last(&node, "k").await;
    site.assert_paid_once(1).await;
}

/// It is told so, and dropped before it can look.
async fn a_handler_dropped_just_as_its_intent_is_open<DB: Db>() {
    let (site, dropping) = (not_deduplicating::<DB>().await, Arc::new(Notify::new()));
    let store = Hooked::new(&site.bank.store).on_opening(Hook::NotifyAfter(Arc::clone(&dropping)));
    let node = droppable(&site, store, &dropping);
    assert_answer(&node.send("k").await, 408);
    assert_eq!(site.upstream.calls(), 0);
    site.assert_succeeds_at_last(&node, "k").await;
    site.assert_paid_once(1).await;
}

async fn a_handler_dropped_during_its_call<DB: Db>() {
    for site in Site::<DB>::both().await {
        site.upstream.then(Act::after(Ending::Silence));
        let dropping = Arc::new(Notify::new());
        let node = droppable(&site, Hooked::new(&site.bank.store), &dropping);
        let first = node.start("k");
        site.upstream.until_called(1).await;
        dropping.notify_waiters();
        assert_eq!(first.await.unwrap().status, StatusCode::REQUEST_TIMEOUT);
        if !site.upstream.deduplicates() {
            node.send_until_ended("k").await.assert_refused(RejectionCode::OutcomeUnknown);
            site.reconcile().await;
        }
        site.assert_succeeds_at_last(&node, "k").await;
        site.assert_paid_once(1 + usize::from(site.upstream.deduplicates())).await;
    }
}

async fn a_handler_dropped_while_its_call_is_settled<DB: Db>() {
    let (site, gate) = (not_deduplicating::<DB>().await, Gate::new());
    let store = Hooked::new(&site.bank.store).on_settling(Hook::WaitBefore(gate.clone()));
    let node = drop_at(&site, &gate, store).await;
    site.assert_succeeds_at_last(&node, "k").await;
    site.assert_paid_once(1).await;
    assert!(site.recovery().list_intents(IntentFilter::Open, 1).await.unwrap().is_empty());
}

/// The first is not asked for again, and the second is called with the key that it had.
async fn intents_of_one_name_keep_their_order<DB: Db>() {
    let site = Site::<DB>::open(Upstream::deduplicating().await).await;
    site.upstream.then(Act::WORK);
    site.upstream.then(Act::after(Ending::Reset));
    let (payer, seen) = (site.payer(), Arc::new(Mutex::new(Vec::new())));
    let writer = Arc::clone(&seen);
    let node = site.node(move |request: Request| {
        let (payer, seen) = (payer.clone(), Arc::clone(&writer));
        async move { pay_twice(&payer, &idempotency(&request), &seen).await }
    });
    node.send("k").await.assert_refused(RejectionCode::OutcomePending);
    let second = site.send_until_created(&node, "k").await;
    let asked: Vec<_> = site.upstream.requests().into_iter().map(|asked| asked.key).collect();
    let [first, again, once_more] = asked[..] else { panic!("{asked:?}") };
    assert!(first != again && again == once_more, "{asked:?}");
    let made = site.upstream.transfers();
    assert!(made.len() == 2 && second.body == made[1].id, "{made:?} {second:?}");
    // Both attempts were told the same of the first.
    assert_eq!(*seen.lock().unwrap(), [made[0].id.clone(), made[0].id.clone()]);
}

async fn pay_twice(payer: &Payer, idempotency: &Idempotency, seen: &Mutex<Vec<String>>) -> Response {
    match payer.pay(idempotency).await {
        Err(error) => return error.into_response(),
        Ok(first) => seen.lock().unwrap().push(first.id),
    }
    let second = payer.intent(idempotency).with_arguments(&("DE02", 2000));
    match payer.call(second).await {
        Err(error) => error.into_response(),
        Ok(second) => created(&second),
    }
}
