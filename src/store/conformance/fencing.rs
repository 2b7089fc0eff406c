//! Rules about writes by attempts that do not own the record.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, Fenced, RecordState, RenewOutcome};

/// A release by an attempt that does not own the record changes nothing.
pub(super) async fn a_release_by_another_attempt_changes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    let stranger = retry_of(&owner).attempt;
    assert_eq!(other.release(&stranger).await, Fenced::Lost, "answer to a release by another attempt");
    let record = store.get(&owner, "after a release by another attempt").await;
    assert_eq!(record.attempt, Some(owner.attempt.id), "attempt of the record");
    other.be_refused(&retry_of(&owner), "after a release by another attempt").await;
    store.complete_as_owner(&owner.attempt, response("r"), "by the owner").await;
}

/// A hold by an attempt that does not own the record changes nothing.
pub(super) async fn a_hold_by_another_attempt_changes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    let stranger = retry_of(&owner).attempt;
    assert_eq!(other.hold(&stranger).await, Fenced::Lost, "answer to a hold by another attempt");
    assert!(
        lease_of(&store.get(&owner, "after the hold").await) > LONG / 2,
        "another's hold ended the lease"
    );
}

/// After a takeover, no write of the earlier attempt has an effect.
pub(super) async fn an_attempt_that_was_taken_over_writes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&first, "first claim").await;
    run_out(fixture).await;
    let second = Claim { lease: LONG, ..retry_of(&first) };
    other.win(&second, "the lease ran out").await;
    let before = store.get(&first, "after the takeover").await;

    assert_eq!(store.release(&first.attempt).await, Fenced::Lost, "release after a takeover");
    assert_eq!(store.hold(&first.attempt).await, Fenced::Lost, "hold after a takeover");
    assert_eq!(
        store.renew_one(&first.attempt, LONG * 9).await,
        RenewOutcome::Lost,
        "renewal after a takeover"
    );
    store.be_refused(&first, "the attempt that was taken over claims again").await;

    let after = store.get(&first, "after the earlier attempt's writes").await;
    assert!(lease_of(&after) <= lease_of(&before), "the earlier attempt extended the lease");
    assert_eq!(but_for_the_lease(after), but_for_the_lease(before), "the earlier attempt changed the record");
}

/// An attempt cannot change the next record of its key after it has released its own.
pub(super) async fn an_attempt_of_an_earlier_record_writes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = claim_of("k");
    store.win(&first, "first claim").await;
    assert_eq!(store.release(&first.attempt).await, Fenced::Applied, "the owner could not release");
    let second = retry_of(&first);
    other.win(&second, "after the release").await;

    assert_eq!(store.release(&first.attempt).await, Fenced::Lost, "release of the next record");
    assert_eq!(store.hold(&first.attempt).await, Fenced::Lost, "hold of the next record");
    assert_eq!(store.renew_one(&first.attempt, LONG).await, RenewOutcome::Lost, "renewal of the next record");
    let shown = store.lose_completion(&first.attempt, "the next record is another's").await;
    assert_eq!(shown.id, second.record_id, "id of the record shown");
    let record = store.get(&second, "afterwards").await;
    assert_eq!(record.attempt, Some(second.attempt.id), "attempt of the next record");
}

/// An owner whose lease ran out may still release or hold, if no other attempt took the record.
pub(super) async fn a_lapsed_owner_still_releases_and_holds(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let released = Claim { lease: fixture.lease(), ..claim_of("released") };
    let held = Claim { lease: fixture.lease(), ..claim_of("held") };
    store.win(&released, "first claim").await;
    store.win(&held, "first claim").await;
    run_out(fixture).await;
    assert_eq!(store.release(&released.attempt).await, Fenced::Applied, "release after the lease");
    assert_eq!(store.hold(&held.attempt).await, Fenced::Applied, "hold after the lease");
    assert_eq!(store.win(&other_request(&released), "after the release").await.1, 1, "attempt number");
    store.be_refused(&retry_of(&held), "after the hold").await;
}

/// A release at the moment of a takeover never releases the record of the new attempt.
pub(super) async fn a_release_never_reaches_the_attempt_that_takes_over(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let firsts: Vec<Claim> =
        (0..24).map(|n| Claim { lease: fixture.lease(), ..claim_of(&format!("key {n}")) }).collect();
    for first in &firsts {
        handles[0].win(first, "first claim").await;
    }
    run_out(fixture).await;
    for (round, first) in firsts.into_iter().enumerate() {
        let retry = Claim { lease: LONG, ..retry_of(&first) };
        let release = {
            let store = handles[0].clone();
            async move { store.release(&first.attempt).await == Fenced::Applied }
        };
        let (released, won) = both_at_once(round, release, wins(handles[1].clone(), retry.clone())).await;
        // If the release came first, the key was free, and the claim made a new record.
        if let Some(number) = won {
            assert_eq!(number, if released { 1 } else { 2 }, "attempt number; released: {released}");
            let record = handles[1].get(&retry, "claimed while the earlier attempt released").await;
            assert_eq!(record.attempt, Some(retry.attempt.id), "attempt of the record; released: {released}");
        }
    }
}

/// A release or a hold without a record does nothing.
pub(super) async fn fenced_writes_without_a_record_do_nothing(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let nobody = claim_of("k");
    assert_eq!(store.release(&nobody.attempt).await, Fenced::Lost, "release of an absent key");
    assert_eq!(store.hold(&nobody.attempt).await, Fenced::Lost, "hold of an absent key");
    assert!(store.find(&nobody).await.is_none(), "a release or a hold made a record");

    store.win(&nobody, "first claim").await;
    assert_eq!(store.release(&nobody.attempt).await, Fenced::Applied, "first release");
    assert_eq!(store.release(&nobody.attempt).await, Fenced::Lost, "second release");
}

/// A completed record cannot be released or held, not even by the attempt that completed it.
pub(super) async fn a_completed_record_is_neither_released_nor_held(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = claim_of("k");
    store.win_and_complete(&owner, response("r")).await;
    let before = store.get(&owner, "after the completion").await;
    for attempt in [&owner.attempt, &retry_of(&owner).attempt] {
        assert_eq!(store.release(attempt).await, Fenced::Lost, "release of a completed record");
        assert_eq!(store.hold(attempt).await, Fenced::Lost, "hold of a completed record");
    }
    assert_eq!(store.get(&owner, "afterwards").await, before, "a completed record changed");
}

/// A held record is released by its own attempt, which has learned the outcome after all. No other
/// attempt can release it.
pub(super) async fn a_held_record_is_released_by_its_attempt_alone(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let held = claim_of("held by its owner");
    store.win_and_hold(&held).await;
    let abandoned =
        Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("held after it was abandoned") };
    store.win(&abandoned, "first claim").await;
    run_out(fixture).await;
    store.be_refused(&retry_of(&abandoned), "abandoned once").await;

    for owner in [held, abandoned] {
        let stranger = retry_of(&owner).attempt;
        assert_eq!(
            other.release(&stranger).await,
            Fenced::Lost,
            "release of a held record by another attempt"
        );
        let record = store.get(&owner, "after a release by another attempt").await;
        assert_eq!(record.state, RecordState::Held, "state after a release by another attempt");
        assert_eq!(
            store.release(&owner.attempt).await,
            Fenced::Applied,
            "release of a held record by its attempt"
        );
        let next = other_request(&owner);
        assert_eq!(other.win(&next, "after the release").await, (next.record_id, 1), "id and number");
    }
}
