//! Rules about records that were abandoned too often, and about held records.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, Fenced, Record, RecordFilter, RecordState};

/// A record becomes held when its last permitted attempt was abandoned. It keeps that attempt.
pub(super) async fn too_many_abandoned_attempts_hold_the_record(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = Claim { lease: fixture.lease(), max_abandoned: 3, ..claim_of("k") };
    store.win(&first, "first claim").await;
    run_out(fixture).await;
    store.win(&retry_of(&first), "after the first abandoned attempt").await;
    run_out(fixture).await;
    let third = retry_of(&first);
    assert_eq!(other.win(&third, "after the second").await, (first.record_id, 3), "id and number");
    run_out(fixture).await;

    let shown = other.be_refused(&retry_of(&first), "after the third of three").await;
    must_be_held_by(&shown, &third, 3);
    must_be_held_by(&store.get(&first, "after the refusal").await, &third, 3);
    let again = store.be_refused(&retry_of(&first), "once more").await;
    must_be_held_by(&again, &third, 3);
}

/// With `max_abandoned` 1, a request that was abandoned once is never run again.
pub(super) async fn one_permitted_attempt_holds_at_once(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let only = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("k") };
    store.win(&only, "first claim").await;
    store.be_refused(&retry_of(&only), "the lease is alive").await;
    run_out(fixture).await;
    must_be_held_by(&store.get(&only, "before a claim finds it so").await, &only, 1);
    must_be_held_by(&store.be_refused(&retry_of(&only), "abandoned once").await, &only, 1);
}

/// The claim that makes a record limits how often it may be abandoned. Later claims do not change
/// the limit.
pub(super) async fn the_limit_of_abandoned_attempts_is_the_records_own(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let strict = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("strict") };
    let lenient = Claim { lease: fixture.lease(), max_abandoned: 100, ..claim_of("lenient") };
    store.win(&strict, "first claim").await;
    store.win(&lenient, "first claim").await;
    run_out(fixture).await;

    let shown = store.be_refused(&Claim { max_abandoned: 100, ..retry_of(&strict) }, "claimed with 1").await;
    must_be_held_by(&shown, &strict, 1);
    let won = store.win(&Claim { max_abandoned: 1, ..retry_of(&lenient) }, "claimed with 100").await;
    assert_eq!(won, (lenient.record_id, 2), "id and number of the takeover");
}

/// Many claims find the last permitted attempt abandoned: none wins, and the attempt is counted
/// once.
pub(super) async fn simultaneous_claims_hold_an_abandoned_record_once(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let only = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("k") };
    handles[0].win(&only, "first claim").await;
    run_out(fixture).await;
    let claims = (0..24).map(|_| retry_of(&only)).collect();
    let winners = super::claims::race(&handles, claims).await;
    assert!(winners.is_empty(), "an attempt ran after the last permitted one: {winners:?}");
    must_be_held_by(&handles[1].be_refused(&retry_of(&only), "afterwards").await, &only, 1);
}

/// An owner can hold its record. After that, no attempt runs, even when the lease is over.
pub(super) async fn a_held_record_is_not_run_again(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win_and_hold(&owner).await;
    must_be_held_by(&other.be_refused(&retry_of(&owner), "the record is held").await, &owner, 0);
    run_out(fixture).await;
    must_be_held_by(&other.be_refused(&retry_of(&owner), "and its lease is over").await, &owner, 0);
    assert_eq!(store.hold(&owner.attempt).await, Fenced::Applied, "holding is repeatable");
}

/// A held record stays past its expiry: it is neither claimable nor purged.
pub(super) async fn a_held_record_stays_past_its_expiry(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { lease: fixture.lease(), retention: fixture.lease(), ..claim_of("k") };
    store.win_and_hold(&owner).await;
    run_out(fixture).await;
    store.be_refused(&retry_of(&owner), "held, past its expiry").await;
    store.be_refused(&other_request(&owner), "held, past its expiry; a different request").await;
    assert_eq!(store.purge(100).await, 0, "a held record was purged");
    must_be_held_by(&store.get(&owner, "held, past its expiry").await, &owner, 0);
}

/// A record that the next claim would find held stays as well, even if no claim has come since its
/// lease ran out.
pub(super) async fn a_record_that_would_be_found_held_stays_past_its_expiry(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let only =
        Claim { lease: fixture.lease(), retention: fixture.lease(), max_abandoned: 1, ..claim_of("k") };
    store.win(&only, "first claim").await;
    run_out(fixture).await;
    assert_eq!(store.purge(100).await, 0, "a record whose last permitted attempt was abandoned was purged");
    store.be_refused(&other_request(&only), "past its expiry, by a different request").await;
    must_be_held_by(&store.be_refused(&retry_of(&only), "past its expiry").await, &only, 1);
    assert_eq!(store.keys_listed(RecordFilter::Held, 100).await, ["k"], "held records");
}

/// A held record accepts a late completion from its own attempt, and from no other.
pub(super) async fn a_held_record_takes_a_late_completion_by_its_attempt_alone(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let held = claim_of("held by its owner");
    store.win_and_hold(&held).await;
    let abandoned =
        Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("held after it was abandoned") };
    store.win(&abandoned, "first claim").await;
    run_out(fixture).await;
    store.be_refused(&retry_of(&abandoned), "abandoned once").await;

    for owner in [held, abandoned] {
        let shown = other.lose_completion(&retry_of(&owner).attempt, "another attempt, held record").await;
        assert_eq!(shown.state, RecordState::Held, "state after another attempt's completion");
        store.complete_as_owner(&owner.attempt, response("late"), "late, by the attempt of the record").await;
        let replayed = other.be_refused(&retry_of(&owner), "completed late").await;
        assert_eq!(response_of(&replayed), "late", "response after a late completion");
    }
}

/// A held record that was completed late counts as absent after its expiry, and is purged.
pub(super) async fn a_late_completion_ends_the_hold(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { retention: fixture.lease(), ..claim_of("k") };
    store.win_and_hold(&owner).await;
    store.complete_as_owner(&owner.attempt, response("late"), "by the attempt of a held record").await;
    assert!(
        store.keys_listed(RecordFilter::Held, 100).await.is_empty(),
        "a completed record is listed as held"
    );
    run_out(fixture).await;
    assert_eq!(store.purge(100).await, 1, "purged records after the expiry of the only one");
}

fn must_be_held_by(record: &Record, owner: &Claim, abandoned: u16) {
    assert_eq!(record.state, RecordState::Held, "state of the record");
    assert_eq!(
        record.attempt,
        Some(owner.attempt.id),
        "a held record keeps the attempt that may still complete it"
    );
    assert_eq!(record.abandoned, abandoned, "abandoned attempts of a held record");
    assert_eq!(record.fingerprint, owner.fingerprint, "fingerprint of a held record");
}
