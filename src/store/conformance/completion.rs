//! Rules about completing a record: its response is stored once.

use super::{Fixture, support::*};
use crate::stored::record::{Claim, CompleteOutcome, RecordState};

/// The owner stores its response, and every handle finds it.
pub(super) async fn the_owner_stores_its_response(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win(&owner, "first claim").await;
    let before = store.get(&owner, "before the completion").await;
    store.complete_as_owner(&owner.attempt, response("r"), "by the owner").await;

    let after = other.get(&owner, "after the completion").await;
    let expected = crate::stored::record::Record { state: RecordState::completed(response("r")), ..before };
    assert_eq!(after, expected, "the record after its completion");
}

/// A completion whose reply was lost may be repeated. The stored response does not change.
pub(super) async fn a_repeated_completion_is_completed(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("k");
    store.win_and_complete(&owner, response("first")).await;
    let before = store.get(&owner, "after the completion").await;
    store.complete_as_owner(&owner.attempt, response("first"), "repeated by the owner").await;
    other.complete_as_owner(&owner.attempt, response("second"), "repeated with another response").await;
    assert_eq!(
        store.get(&owner, "after repeating").await,
        before,
        "a repeated completion changed the record"
    );
}

/// An owner whose lease ran out still completes, if no other attempt took the record.
pub(super) async fn a_lapsed_owner_still_completes(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { lease: fixture.lease(), ..claim_of("k") };
    let last_permitted = Claim { lease: fixture.lease(), max_abandoned: 1, ..claim_of("last permitted") };
    store.win(&owner, "first claim").await;
    store.win(&last_permitted, "first claim").await;
    run_out(fixture).await;
    for claim in [owner, last_permitted] {
        store.complete_as_owner(&claim.attempt, response("late"), "no attempt has taken the record").await;
        let shown = store.be_refused(&retry_of(&claim), "the record is completed").await;
        assert_eq!(response_of(&shown), "late", "response after a late completion");
    }
}

/// A response that is stored after the expiry is kept for a whole retention from then on. So a
/// retry still gets it.
pub(super) async fn a_completion_after_the_expiry_is_kept(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let owner = Claim { retention: fixture.lease() * 2, ..claim_of("k") };
    store.win(&owner, "first claim").await;
    // Two waits of 5/4 leases: longer than the retention of two leases.
    for _ in 0..2 {
        run_out(fixture).await;
    }
    store
        .complete_as_owner(&owner.attempt, response("late"), "no attempt takes a record with a live lease")
        .await;
    assert_eq!(store.purge(100).await, 0, "records purged that were completed just now");
    let shown = store.be_refused(&retry_of(&owner), "the record was completed just now").await;
    assert_eq!(response_of(&shown), "late", "response after a completion past the expiry");
}

/// A completion by an attempt that does not own the record shows the record and changes nothing.
pub(super) async fn a_completion_by_another_attempt_changes_nothing(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let owner = claim_of("in progress");
    store.win(&owner, "first claim").await;
    let shown = other.lose_completion(&retry_of(&owner).attempt, "an attempt that never won").await;
    assert_eq!(shown.attempt, Some(owner.attempt.id), "attempt of the record shown");
    assert!(
        lease_of(&store.get(&owner, "afterwards").await) > LONG / 2,
        "another's completion ended the lease"
    );

    let completed = claim_of("completed");
    store.win_and_complete(&completed, response("r")).await;
    let shown = other.lose_completion(&retry_of(&completed).attempt, "the record is completed").await;
    assert_eq!(response_of(&shown), "r", "response of the record shown");
    let after = store.get(&completed, "afterwards").await;
    assert_eq!(response_of(&after), "r", "another's completion replaced the response");
}

/// After a takeover, the completion of the earlier attempt is lost. It shows the record as it is.
pub(super) async fn a_completion_after_a_takeover_is_lost(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let first = Claim { lease: fixture.lease(), ..claim_of("k") };
    store.win(&first, "first claim").await;
    run_out(fixture).await;
    let second = Claim { lease: LONG, ..retry_of(&first) };
    other.win(&second, "the lease ran out").await;

    let shown = store.lose_completion(&first.attempt, "another attempt has taken over").await;
    assert_eq!(shown.attempt, Some(second.attempt.id), "attempt of the record shown");
    assert!(lease_of(&shown) > LONG / 2, "the new owner's lease");
    other.complete_as_owner(&second.attempt, response("second"), "by the new owner").await;
    let shown = store.lose_completion(&first.attempt, "another attempt has completed").await;
    assert_eq!(response_of(&shown), "second", "response of the record shown");
    assert_eq!(response_of(&store.get(&first, "afterwards").await), "second", "response that is stored");
}

/// A completion whose record is gone is absent, and makes no record.
pub(super) async fn a_completion_without_a_record_is_absent(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let never_claimed = claim_of("never claimed");
    let evicted = claim_of("evicted");
    let released = claim_of("released");
    store.win(&evicted, "first claim").await;
    store.win(&released, "first claim").await;
    assert!(store.evict(&evicted).await, "evict found no record");
    store.release(&released.attempt).await;
    for claim in [never_claimed, evicted, released] {
        let key = claim.attempt.key.as_str();
        match store.complete(&claim.attempt, response("r")).await {
            CompleteOutcome::Absent => {}
            other => panic!("{key}: the completion should have found no record and was {other:?}"),
        }
        assert!(store.find(&claim).await.is_none(), "{key}: the completion made a record");
    }
}

/// Of a completion and a simultaneous takeover, exactly one is carried out.
pub(super) async fn a_completion_and_a_takeover_exclude_each_other(fixture: &dyn Fixture) {
    let handles = two_handles(fixture).await;
    let firsts: Vec<Claim> =
        (0..24).map(|n| Claim { lease: fixture.lease(), ..claim_of(&format!("key {n}")) }).collect();
    for first in &firsts {
        handles[0].win(first, "first claim").await;
    }
    run_out(fixture).await;
    for (round, first) in firsts.into_iter().enumerate() {
        let retry = Claim { lease: LONG, ..retry_of(&first) };
        let completion = {
            let (store, attempt) = (handles[0].clone(), first.attempt.clone());
            async move {
                matches!(store.complete(&attempt, response("completed")).await, CompleteOutcome::Completed)
            }
        };
        let (completed, won) = both_at_once(round, completion, wins(handles[1].clone(), retry.clone())).await;
        let taken_over = won.is_some();
        assert!(completed != taken_over, "completed: {completed}, taken over: {taken_over}");
        let record = handles[1].get(&first, "afterwards").await;
        let owner = if completed { first.attempt.id } else { retry.attempt.id };
        assert_eq!(record.attempt, Some(owner), "attempt of the record; completed: {completed}");
    }
}
