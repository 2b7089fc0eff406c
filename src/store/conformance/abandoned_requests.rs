//! Rules about taking requests that must be sent again.

use std::time::Duration;

use super::{
    Fixture,
    intents::{finalize, opening_of},
    requests::request,
    support::*,
};
use crate::stored::{
    intent::{IntentFence, Opening},
    record::{Claim, Fenced},
};

/// A request is not taken before its time, which counts from the moment when it was kept.
pub(super) async fn a_request_is_not_taken_before_its_time(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for (key, after) in [("soon", fixture.lease()), ("later", LONG)] {
        let claim = claim_of(key);
        recovery.store.win(&claim, "first claim").await;
        assert_eq!(recovery.keep(&claim, &request(), after).await, Fenced::Applied, "kept by the owner");
        recovery.abandon(&claim).await;
    }
    run_out(fixture).await;
    assert_eq!(recovery.keys_taken().await, ["soon"], "requests whose time has come");
}

/// A request is not taken while an attempt of its record may be running. That may be the attempt
/// that kept the request, or a later one.
pub(super) async fn a_request_is_not_taken_while_an_attempt_has_a_live_lease(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    recovery.abandoned_request("abandoned").await;
    recovery.win_with_request(&claim_of("running")).await;
    let taken_over = claim_of("taken over");
    recovery.win_with_request(&taken_over).await;
    recovery.lapse(&taken_over).await;
    recovery.store.win(&retry_of(&taken_over), "the lease has run out").await;
    assert_eq!(recovery.keys_taken().await, ["abandoned"], "requests that are taken");
}

/// A request is taken once the lease of its attempt has run out. It is also taken once its attempt
/// has released a record that stays.
pub(super) async fn a_request_is_taken_once_its_attempt_has_ended(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let lapsed = claim_of("lapsed");
    recovery.win_with_request(&lapsed).await;
    recovery.lapse(&lapsed).await;
    let with_intent = claim_of("released with an intent");
    recovery.win_with_request(&with_intent).await;
    let opening = opening_of(&with_intent, "a");
    recovery.must_open(&opening, "a new intent").await;
    recovery.must_update(opening.upstream_key, IntentFence::Call(opening.call), finalize()).await;
    assert_eq!(recovery.store.release(&with_intent.attempt).await, Fenced::Applied, "release by the owner");
    recovery.abandoned_request("released").await;
    let keys = ["lapsed", "released", "released with an intent"];
    assert_eq!(recovery.keys_taken().await, keys, "requests that are taken");
}

/// Calls that take requests simultaneously share them: no two calls get the same request.
pub(super) async fn an_abandoned_request_is_taken_by_one_at_a_time(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for n in 0..40 {
        recovery.abandoned_request(&format!("k {n}")).await;
    }
    fall_due().await;
    let tasks = (0..6).map(|_| {
        let recovery = recovery.clone();
        async move {
            let mut taken = Vec::new();
            for _ in 0..8 {
                taken.extend(expected(recovery.inner.take_abandoned(5, LONG).await, "take_abandoned"));
            }
            taken
        }
    });
    let mut taken: Vec<_> = at_once(tasks).await.into_iter().flatten().collect();
    assert!(taken.iter().all(|request| request.tries == 1), "a request was taken twice");
    assert_eq!(taken.len(), 40, "requests that were taken, of 40");
    taken.sort_by_key(|request| request.record_id.as_uuid());
    taken.dedup_by_key(|request| request.record_id);
    assert_eq!(taken.len(), 40, "different requests that were taken, of 40");
}

/// One call takes no more requests than it asks for.
pub(super) async fn requests_are_taken_up_to_a_limit(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    for key in ["a", "b", "c"] {
        recovery.abandoned_request(key).await;
    }
    fall_due().await;
    for count in [2, 1, 0] {
        let taken = expected(recovery.inner.take_abandoned(2, LONG).await, "take_abandoned");
        assert_eq!(taken.len(), count, "requests that are taken, at most 2");
    }
}

/// A taken request is taken again after the pause, unless the outcome of the try was recorded. Each
/// take counts as a try.
pub(super) async fn a_taken_request_is_taken_again_after_the_pause(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    recovery.abandoned_request("k").await;
    for tries in [1, 2] {
        let taken = recovery.take_requests(fixture.lease()).await;
        assert_eq!(taken.iter().map(|request| request.tries).collect::<Vec<_>>(), [tries], "tries");
        run_out(fixture).await;
    }
    assert_eq!(recovery.take_request("the pause is over").await.tries, 3, "tries");
    assert_eq!(recovery.keys_taken().await, [""; 0], "requests that are taken during the pause");
}

/// A request is not taken any more once its record is completed, is gone or counts as absent.
pub(super) async fn a_request_of_a_record_that_has_ended_is_not_taken(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let [abandoned, completed, evicted, released, expired] =
        ["abandoned", "completed", "evicted", "released", "expired"].map(claim_of);
    let expired = Claim { retention: fixture.lease(), ..expired };
    for claim in [&abandoned, &completed, &evicted, &released, &expired] {
        recovery.win_with_request(claim).await;
    }
    run_out(fixture).await;
    for claim in [&abandoned, &completed, &expired] {
        recovery.lapse(claim).await;
    }
    recovery.store.complete_as_owner(&completed.attempt, response("r"), "by the owner").await;
    assert!(recovery.store.evict(&evicted).await, "there was a record to evict");
    assert_eq!(recovery.store.release(&released.attempt).await, Fenced::Applied, "release by the owner");
    assert_eq!(recovery.keys_taken().await, ["abandoned"], "requests that are taken");
}

/// The request of an expired record is not taken for the record that has its key now.
pub(super) async fn a_request_does_not_reach_the_next_record_of_its_key(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let old = Claim { retention: fixture.lease(), ..claim_of("k") };
    recovery.win_with_request(&old).await;
    run_out(fixture).await;
    recovery.lapse(&old).await;
    let new = Claim { retention: LONG, ..other_request(&old) };
    assert_eq!(recovery.store.win(&new, "the record has expired").await, (new.record_id, 1), "a new record");
    recovery.lapse(&new).await;
    recovery.abandoned_request("abandoned").await;
    assert_eq!(recovery.keys_taken().await, ["abandoned"], "requests that are taken");
}

/// A request is not taken while its record is held, or while the next claim would find it held.
pub(super) async fn a_request_of_a_held_record_is_not_taken(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let held = claim_of("held");
    recovery.win_with_request(&held).await;
    assert_eq!(recovery.store.hold(&held.attempt).await, Fenced::Applied, "hold by the owner");
    let [once, twice] =
        ["abandoned once", "abandoned twice"].map(|key| Claim { max_abandoned: 2, ..claim_of(key) });
    for claim in [&once, &twice] {
        recovery.win_with_request(claim).await;
        recovery.lapse(claim).await;
    }
    let retry = retry_of(&twice);
    recovery.store.win(&retry, "the lease has run out").await;
    recovery.lapse(&retry).await;
    assert_eq!(recovery.keys_taken().await, ["abandoned once"], "requests that are taken");
}

/// A request is not taken while its record has an open intent that may not be called again. It is
/// taken once that intent is settled.
pub(super) async fn a_request_waits_for_the_intents_of_its_record(fixture: &dyn Fixture) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let mut intents = Vec::new();
    for (key, repeatable_for) in [("once", Duration::ZERO), ("deduplicated", LONG)] {
        let claim = claim_of(key);
        recovery.win_with_request(&claim).await;
        let opening = Opening { repeatable_for, ..opening_of(&claim, "a") };
        recovery.must_open(&opening, "a new intent").await;
        intents.push(opening.upstream_key);
        recovery.lapse(&claim).await;
    }
    assert_eq!(recovery.keys_taken().await, ["deduplicated"], "requests whose intents may be called again");
    recovery.must_update(intents[0], IntentFence::Operator, finalize()).await;
    assert_eq!(recovery.keys_taken().await, ["once"], "requests whose intents are settled");
}

/// A request is never taken if it was claimed under a policy that holds abandoned attempts. Only
/// its client may send it again.
pub(super) async fn a_request_is_not_taken_under_a_policy_that_holds_abandoned_attempts(
    fixture: &dyn Fixture,
) {
    let Some(recovery) = Recovery::of(fixture).await else { return };
    let [lapsed, released] = ["lapsed", "released"].map(|key| Claim { max_abandoned: 1, ..claim_of(key) });
    recovery.win_with_request(&lapsed).await;
    recovery.lapse(&lapsed).await;
    recovery.win_with_request(&released).await;
    recovery.abandon(&released).await;
    recovery.abandoned_request("under another policy").await;
    assert_eq!(recovery.keys_taken().await, ["under another policy"], "requests that are taken");
}
