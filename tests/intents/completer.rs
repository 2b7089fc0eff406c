//! Requests whose process died and whose client does not come back.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::Request,
    http::{StatusCode, header},
    middleware::{Next, from_fn},
    response::IntoResponse,
};
use tower_idempotency::{
    Consumer, IdempotencyKey, IdempotencyLayer, RejectionCode, ResultPolicy,
    recovery::Refused,
    store::{RecordState, StoreErrorKind},
};

use crate::records_alone::RecordsAlone;
use crate::shop::{
    Act, Dialect, Node, Shop, charge, completer, guarded, is_completed, on_both_stores, restore_user, until,
};

on_both_stores!(
    an_abandoned_request_is_completed_and_its_client_gets_the_response,
    a_request_whose_user_was_revoked_is_not_run,
    a_request_that_fails_every_time_needs_attention,
    a_request_is_sent_again_after_a_pause,
    panics_of_the_application_and_of_restore_are_survived,
    held_and_at_most_once_records_are_not_run,
    two_completers_complete_a_request_once,
    a_request_whose_record_has_gone_is_not_run,
    a_request_is_not_run_under_a_key_that_was_used_anew,
    draining_waits_for_requests_under_way_and_sends_no_more,
    a_request_of_an_unknown_version_is_not_sent,
    a_request_of_another_fingerprint_is_not_run,
    a_route_without_a_layer_needs_attention,
    a_look_that_nobody_waits_for_goes_on,
    errors_of_the_store_are_survived,
    a_client_that_comes_back_first_is_not_disturbed,
    nobody_from_outside_can_take_a_record_over,
);

async fn an_abandoned_request_is_completed_and_its_client_gets_the_response<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    let pass = node.complete(&node.completer(), 1).await;
    assert_eq!((pass.taken, pass.completed, shop.stage.runs.get()), (1, 1, 2), "{pass:?}");
    let body = node.assert_replays(|| charge("alice", "k"), "alice", "k").await;
    assert!(body.starts_with("alice a b Some(\"dry=no&n=1\") None amount=2000 "), "{body}");
    let record = node.record("alice", "k").await.unwrap();
    assert_eq!((record.attempt_number, record.abandoned), (2, 1));
    assert_eq!(shop.kept_requests().await, 0);
    assert_eq!(shop.stage.runs.get(), 2);
}

async fn a_request_whose_user_was_revoked_is_not_run<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("mallory", "k")).await;
    let node = shop.node();
    let revoked = Arc::new(AtomicBool::new(true));
    let is_revoked = Arc::clone(&revoked);
    let completer = node.completer_with(move |consumer| match is_revoked.load(Ordering::SeqCst) {
        true => Err(Refused::new(format!("{consumer} was revoked"))),
        false => restore_user(consumer),
    });
    let pass = node.complete(&completer, 1).await;
    assert_eq!((pass.taken, pass.need_attention, shop.stage.runs.get()), (1, 1, 1), "{pass:?}");
    let [request] = &node.handle.list_requests(10).await.unwrap()[..] else { panic!("one") };
    assert_eq!(request.attention.as_deref(), Some("mallory was revoked"));
    assert_eq!((request.consumer.as_str(), request.key.as_str()), ("mallory", "k"));
    assert_eq!(request.decode().unwrap().uri(), "/v1/accounts/a%20b/charges?dry=no&n=1");
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(node.handle.complete_abandoned(&completer).await.unwrap().taken, 0);

    revoked.store(false, Ordering::SeqCst);
    assert!(node.handle.send_again(request.record_id).await.unwrap());
    assert!(node.needs().await.is_empty());
    assert_eq!(node.complete(&completer, 1).await.completed, 1);
    node.assert_replays(|| charge("mallory", "k"), "mallory", "k").await;
    assert!(!node.handle.send_again(request.record_id).await.unwrap(), "it is not kept any more");
}

async fn a_request_that_fails_every_time_needs_attention<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    shop.stage.then([Act::Fail, Act::Panic, Act::Fail]);
    let node = shop.node();
    let completer = node.completer().with_max_tries(3);
    let pass = node.complete(&completer, 3).await;
    assert_eq!((pass.taken, pass.again, pass.need_attention), (3, 2, 1), "{pass:?}");
    assert_eq!(shop.stage.runs.get(), 4);
    let needs = node.needs().await;
    assert_eq!(
        needs,
        ["not completed after 3 tries; the last: the application answered 500 Internal Server Error"]
    );
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(node.handle.complete_abandoned(&completer).await.unwrap().taken, 0);

    // Only the completer has given up.
    let retry = node.send(charge("alice", "k")).await;
    assert!(retry.status == StatusCode::CREATED && !retry.is_replay(), "{retry:?}");
}

async fn a_request_is_sent_again_after_a_pause<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    shop.stage.then([Act::Fail]);
    let node = shop.node();
    let hour = Duration::from_secs(3600);
    let completer = node.completer().with_backoff(hour, hour);
    assert_eq!(node.complete(&completer, 1).await.again, 1);
    assert_eq!(node.handle.complete_abandoned(&completer).await.unwrap().taken, 0);
    let due = "SELECT count(*) FROM idempotency_requests WHERE tries = 1 AND next_at IS NOT NULL";
    assert_eq!((shop.number(due).await, shop.stage.runs.get()), (1, 2));
}

/// An application whose outermost layer panics for one user, and answers 503 for another.
fn unreliable(node: &Node) -> axum::Router {
    let outermost = async |request: Request, next: Next| match request
        .extensions()
        .get::<crate::shop::UserId>()
        .map(|user| user.0.as_str())
    {
        Some("trent") => panic!("as the test wants it"),
        Some("victor") => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => next.run(request).await,
    };
    node.app.clone().layer(from_fn(move |request: Request, next: Next| outermost(request, next)))
}

async fn panics_of_the_application_and_of_restore_are_survived<DB: Dialect>(shop: Shop<DB>) {
    for user in ["trent", "mallory", "victor", "alice"] {
        shop.abandon(Act::Hang, charge(user, "k")).await;
    }
    let node = shop.node();
    let restore = |consumer: &Consumer| match consumer.as_str() {
        "mallory" => panic!("as the test wants it"),
        _ => restore_user(consumer),
    };
    let completer = completer(unreliable(&node), restore).with_max_tries(2).with_concurrency(1);
    node.handle.start_completer(completer).unwrap();
    until("what becomes of them", async || {
        node.needs().await.len() == 3 && is_completed(node.record("alice", "k").await.as_ref())
    })
    .await;
    let mut needs = node.needs().await;
    needs.sort();
    let unguarded = "no idempotency layer guards its route any more: it may have been performed without one";
    let expected = [
        format!("{unguarded}; the application panicked"),
        "not completed after 2 tries; the last: Restore panicked".to_owned(),
        "not completed after 2 tries; the last: the application answered 503 Service Unavailable".to_owned(),
    ];
    assert_eq!(needs, expected);
    assert_eq!(shop.stage.runs.get(), 5);
    node.handle.drain(Duration::from_secs(30)).await.unwrap();
}

async fn held_and_at_most_once_records_are_not_run<DB: Dialect>(shop: Shop<DB>) {
    let at_most_once = shop.layer().with_policy(ResultPolicy::at_most_once());
    shop.abandon_behind(at_most_once, Act::Hang, charge("alice", "once")).await;
    shop.abandon(Act::HangInCall, charge("alice", "held")).await;
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    assert_eq!(shop.kept_requests().await, 3);
    let node = shop.node();
    let pass = node.complete(&node.completer(), 1).await;
    // The others were abandoned before this one.
    assert_eq!((pass.taken, pass.completed), (1, 1), "{pass:?}");
    for key in ["once", "held"] {
        let record = node.record("alice", key).await.unwrap();
        assert_eq!((record.state, record.attempt_number), (RecordState::Held, 1), "{key}");
        node.send(charge("alice", key)).await.assert_refused(RejectionCode::OutcomeUnknown);
    }
    assert_eq!(node.handle.complete_abandoned(&node.completer()).await.unwrap().taken, 0);
    assert_eq!((shop.stage.runs.get(), node.needs().await.len()), (4, 0));
}

async fn two_completers_complete_a_request_once<DB: Dialect>(shop: Shop<DB>) {
    let keys: Vec<String> = (0..6).map(|number| format!("k{number}")).collect();
    for key in &keys {
        shop.abandon(Act::Hang, charge("alice", key)).await;
    }
    shop.stage.then([Act::Slow(100); 12]);
    let nodes = [shop.node(), shop.node()];
    for node in &nodes {
        node.handle.start_completer(node.completer()).unwrap();
    }
    until("all to be completed", async || shop.kept_requests().await == 0).await;
    assert_eq!(shop.stage.runs.get(), 12);
    for key in &keys {
        let body = nodes[0].assert_replays(|| charge("alice", key), "alice", key).await;
        assert_eq!(nodes[1].assert_replays(|| charge("alice", key), "alice", key).await, body);
    }
}

async fn a_request_whose_record_has_gone_is_not_run<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    // It goes after the completer has looked, and before the layer claims.
    let (handle, key) = (node.handle.clone(), IdempotencyKey::new("k").unwrap());
    let completer = node.completer_with(move |consumer| {
        let evicted = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(handle.evict(consumer, &key))
        });
        assert!(evicted.unwrap());
        restore_user(consumer)
    });
    let pass = node.complete(&completer, 1).await;
    assert_eq!((pass.taken, pass.gone), (1, 1), "{pass:?}");
    until("the key to be given back", async || node.record("alice", "k").await.is_none()).await;
    assert_eq!((shop.stage.runs.get(), shop.kept_requests().await), (1, 0));
}

async fn a_request_is_not_run_under_a_key_that_was_used_anew<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    shop.stage.then([Act::Hang]);
    let (other, key) = (shop.node(), IdempotencyKey::new("k").unwrap());
    let completer = node.completer_with(move |consumer| {
        // The same request, whose handler hangs.
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                assert!(other.handle.evict(consumer, &key).await.unwrap());
                let other = other.clone();
                tokio::spawn(async move {
                    // For a moment the completer's own claim may have the key.
                    while other.send(charge("alice", "k")).await.rejection.is_some() {}
                });
            });
        });
        restore_user(consumer)
    });
    let first = node.record("alice", "k").await.unwrap();
    let pass = node.complete(&completer, 1).await;
    assert_eq!((pass.taken, pass.gone), (1, 1), "{pass:?}");
    until("the other request to run", async || shop.stage.runs.get() == 2).await;
    let record = node.record("alice", "k").await.unwrap();
    assert!(record.id != first.id && record.attempt_number == 1, "{record:?}");
    assert_eq!(shop.stage.runs.get(), 2);
}

async fn draining_waits_for_requests_under_way_and_sends_no_more<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k1")).await;
    shop.stage.then([Act::Slow(500)]);
    let node = shop.node();
    node.handle.start_completer(node.completer()).unwrap();
    until("it to run", async || shop.stage.runs.get() == 2).await;
    shop.abandon(Act::Hang, charge("alice", "k2")).await;
    node.handle.drain(Duration::from_secs(30)).await.unwrap();
    assert!(is_completed(node.record("alice", "k1").await.as_ref()));
    until("the second to be abandoned", async || node.is_abandoned("alice", "k2").await).await;
    assert_eq!(node.handle.complete_abandoned(&node.completer()).await.unwrap().taken, 0);
    assert_eq!((shop.stage.runs.get(), shop.kept_requests().await), (3, 1));
    let successor = shop.node();
    assert_eq!(successor.complete(&successor.completer(), 1).await.completed, 1);
}

async fn a_request_of_an_unknown_version_is_not_sent<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    shop.run(DB::NEWER).await;
    let node = shop.node();
    assert_eq!(node.complete(&node.completer(), 1).await.need_attention, 1);
    let needs = node.needs().await;
    assert!(needs.len() == 1 && needs[0].contains("has version 9"), "{needs:?}");
    assert_eq!(shop.stage.runs.get(), 1);
}

async fn a_request_of_another_fingerprint_is_not_run<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    let changed = async |mut request: Request, next: Next| {
        request.headers_mut().insert(header::CONTENT_TYPE, "text/html".parse().unwrap());
        next.run(request).await
    };
    let changing =
        node.app.clone().layer(from_fn(move |request: Request, next: Next| changed(request, next)));
    let pass = node.complete(&completer(changing, restore_user), 1).await;
    assert_eq!((pass.need_attention, shop.stage.runs.get()), (1, 1));
    let needs = node.needs().await;
    assert!(needs[0].contains("its fingerprint differs"), "{needs:?}");
}

async fn a_route_without_a_layer_needs_attention<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let (node, unguarded) = (shop.node(), guarded(&shop.stage, |router| router));
    let pass = node.complete(&completer(unguarded, restore_user), 1).await;
    assert_eq!(pass.need_attention, 1);
    let needs = node.needs().await;
    assert!(needs[0].contains("no idempotency layer") && needs[0].contains("500"), "{needs:?}");
}

async fn a_look_that_nobody_waits_for_goes_on<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    until("it to be abandoned", async || node.is_abandoned("alice", "k").await).await;
    let (waiting, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(tokio::sync::Notify::new()));
    let (is_waiting, gate) = (Arc::clone(&waiting), Arc::clone(&go_on));
    let fails = move |_: Request, _: Next| {
        let (is_waiting, gate) = (Arc::clone(&is_waiting), Arc::clone(&gate));
        async move {
            is_waiting.store(true, Ordering::SeqCst);
            gate.notified().await;
            StatusCode::SERVICE_UNAVAILABLE
        }
    };
    let app = node.app.clone().layer(from_fn(fails));
    let completer = completer(app, restore_user).with_max_tries(1);
    let handle = node.handle.clone();
    let look =
        tokio::spawn(async move { while handle.complete_abandoned(&completer).await.unwrap().taken == 0 {} });
    until("it to be sent", async || waiting.load(Ordering::SeqCst)).await;
    look.abort();
    assert!(look.await.unwrap_err().is_cancelled());
    go_on.notify_one();
    until("what became of it to be recorded", async || node.needs().await.len() == 1).await;
}

async fn errors_of_the_store_are_survived<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    shop.run("ALTER TABLE idempotency_requests RENAME TO away").await;
    assert!(node.handle.complete_abandoned(&node.completer()).await.is_err());
    node.handle.start_completer(node.completer()).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    shop.run("ALTER TABLE away RENAME TO idempotency_requests").await;
    until("it to be completed", async || is_completed(node.record("alice", "k").await.as_ref())).await;
    assert_eq!(shop.stage.runs.get(), 2);
}

async fn a_client_that_comes_back_first_is_not_disturbed<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    let retry = Mutex::new(None);
    until("the retry to run", async || {
        let answer = node.send(charge("alice", "k")).await;
        let ran = answer.rejection != Some(RejectionCode::InProgress);
        *retry.lock().unwrap() = Some(answer);
        ran
    })
    .await;
    let retry = retry.into_inner().unwrap().unwrap();
    assert!(retry.status == StatusCode::CREATED && !retry.is_replay(), "{retry:?}");
    assert_eq!(node.handle.complete_abandoned(&node.completer()).await.unwrap().taken, 0);
    retry.assert_same_replay(&node.send(charge("alice", "k")).await);
    assert_eq!(shop.stage.runs.get(), 2);
}

async fn nobody_from_outside_can_take_a_record_over<DB: Dialect>(shop: Shop<DB>) {
    shop.abandon(Act::Hang, charge("alice", "k")).await;
    let node = shop.node();
    let record = node.record("alice", "k").await.unwrap();
    let address = crate::support::served::serve(node.app.clone()).await;
    let (id, token) = (record.id.to_string(), format!("Bearer {}mallory", crate::shop::TOKEN));
    let forged = [
        ("resent", id.as_str()),
        ("record-id", &id),
        ("x-consumer", "alice"),
        ("consumer", "alice"),
        ("userid", "alice"),
        ("x-tenant", "t"),
        ("idempotency-key", "k"),
        ("content-type", "text/plain; charset=utf-8"),
    ];
    let send = async |headers: &[(&str, &str)]| {
        let head = [headers, &[("connection", "close")]].concat();
        let path = "/v1/accounts/a%20b/charges?dry=no&n=1";
        let request = crate::support::http::request("POST", path, &head, "amount=2000");
        crate::support::http::exchange(address, request).await
    };
    until("the lease to be over", async || node.is_abandoned("alice", "k").await).await;
    assert_eq!(send(&forged).await.status, 401);
    let mallory = send(&[&forged[..], &[("authorization", &token)]].concat()).await;
    assert!(mallory.status == 201 && String::from_utf8_lossy(&mallory.body).starts_with("mallory"));
    let after = node.record("alice", "k").await.unwrap();
    assert_eq!((after.id, after.attempt_number), (record.id, 1));
    assert!(!is_completed(Some(&after)));
}

#[tokio::test]
async fn a_store_without_kept_requests_has_nothing_to_complete() {
    let handle = IdempotencyLayer::new(RecordsAlone::default()).handle();
    let completer = completer(axum::Router::new(), restore_user);
    let refused = [
        handle.start_completer(completer.clone()).unwrap_err(),
        handle.complete_abandoned(&completer).await.unwrap_err(),
    ];
    assert!(refused.iter().all(|error| error.kind() == StoreErrorKind::Misconfigured), "{refused:?}");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let with =
        |change: fn(tower_idempotency::recovery::Completer) -> tower_idempotency::recovery::Completer| {
            let app = axum::Router::new();
            catch_unwind(AssertUnwindSafe(|| change(completer(app, restore_user)))).is_err()
        };
    assert!(!with(|completer| completer.with_timeout(Duration::from_secs(1))));
    assert!(with(|completer| completer.with_interval(Duration::ZERO)));
    assert!(with(|completer| completer.with_batch(0)));
    assert!(with(|completer| completer.with_concurrency(0)));
    assert!(with(|completer| completer.with_max_tries(0)));
    assert!(with(|completer| completer.with_timeout(Duration::ZERO)));
    assert!(with(|completer| completer.with_backoff(Duration::ZERO, Duration::from_secs(1))));
    assert!(with(|completer| completer.with_backoff(Duration::from_secs(2), Duration::from_secs(1))));
}
